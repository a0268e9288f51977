"""Time that ends, whatever file system, driver or node does not answer. Imports nothing slow, such
as torch."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from namr_dist.text import printable

EXIT_CODE = 2
MORE_TIME = "(if it is only slow, give it time with --limit, in a Slurm job NAMR_PREFLIGHT_SECONDS)"
_T = TypeVar("_T")


class TooLateError(Exception):
    """A function has not ended in its time."""


def within(seconds: float, function: Callable[[], _T]) -> _T:
    """What the function returns or raises; TooLateError if it takes longer.

    Its thread is then left behind: nothing ends a call that a file system or a driver does not
    answer.
    """
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    wait([future], max(0.0, seconds))
    if not future.done():
        raise TooLateError
    return future.result()


class Deadline:
    """Ends this process with EXIT_CODE after `limit_s`, saying what it was doing."""

    def __init__(self, limit_s: float) -> None:
        self.doing = "importing torch: is the file system of this Python slow?"
        self._limit_s = limit_s
        self._began_s = time.monotonic()
        timer = threading.Timer(limit_s, self._end)
        timer.daemon = True
        timer.start()

    @property
    def passed_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began_s

    def left_s(self, share: float) -> float:
        """Seconds until this share of the limit, 0 once it is over."""
        return max(0.0, share * self._limit_s - self.passed_s)

    def _end(self) -> None:
        # Not by print: a thread that was stopped within one holds its lock.
        text = (
            f"namr: error: preflight: {node_name()}: not done after {self._limit_s:g} s, still {self.doing} "
            f"{MORE_TIME}\n"
        )
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            printable(text, keep="\n").encode(),
        )
        os._exit(EXIT_CODE)


def node_name() -> str:
    """This machine as Slurm calls it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
