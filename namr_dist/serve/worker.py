"""One thread for calls that must not run at the same time, and no endless queue before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


class BusyError(Exception):
    """All places are taken."""


class Worker:
    """Runs calls one after the other, in the order in which they come.

    A caller takes a place before it asks for work, and there are `most` places: memory is bounded
    by what so many callers hold. For one event loop.
    """

    def __init__(self, name: str, most: int) -> None:
        self.taken = 0
        """Places, now."""
        self._most = most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place until the end of the `with`. Raises BusyError if none is free."""
        if self.taken >= self._most:
            raise BusyError
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def run(
        self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs
    ) -> Result:
        """What `work` returns, or raises, in the thread."""
        future = self._thread.submit(work, *args, **kwargs)
        return await asyncio.wrap_future(future)
