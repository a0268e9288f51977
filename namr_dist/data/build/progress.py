"""How far a build is, for people: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from namr_dist.terminal import Console, plain
from namr_dist.text import printable

_LINE_EVERY_S, _BAR_EVERY_S = 10.0, 0.1


class BuildProgress:
    """Images and bytes that have been read of all that are to be read, on stderr."""

    def __init__(self, name: str, *, images: int, size: int) -> None:
        """size: bytes."""
        self._name, self._images, self._size = name, images, size
        self._done_images = self._done_size = 0
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(printable(name), total=size, note="")
        self._began = self._told = time.perf_counter()

    def __enter__(self) -> BuildProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._tell()
            self._bar.stop()

    def advance(self, images: int, size: int) -> None:
        """So many more images of so many bytes together have been read."""
        if not self._done_images:  # worker processes have started only now
            self._began = self._told = time.perf_counter()
        self._done_images += images
        self._done_size += size
        if time.perf_counter() - self._told >= (_BAR_EVERY_S if self._bar else _LINE_EVERY_S):
            self._tell()

    def _tell(self) -> None:
        self._told = time.perf_counter()
        rate = self._done_size / max(self._told - self._began, 1e-9)  # bytes a second
        left = f"{(self._size - self._done_size) / rate:,.0f} s left" if rate else ""
        note = f"{self._done_images:,}/{self._images:,} images  {rate / 2**20:.1f} MiB/s  {left}"
        if self._bar:
            self._bar.update(self._task, completed=self._done_size, note=note)
        else:
            self._console.print(plain(f"{self._name}  {note}"), soft_wrap=True)
