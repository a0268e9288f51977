"""How far long work is, for people: a bar on a terminal, a plain line every ten seconds
elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from namr_dist.terminal import Console, plain
from namr_dist.text import duration, printable

_LINE_EVERY_S, _BAR_EVERY_S = 10.0, 0.1


class Progress:
    """So much done of all, on stderr."""

    def __init__(
        self, name: str, total: int, note: Callable[[int, float], str], *, shown: bool = True
    ) -> None:
        """note: what is done, and how much a second → what is said of it. shown: or nothing is."""
        self._name, self._total, self._note, self._shown = name, total, note, shown
        self._done = 0
        self._console = Console(file=sys.stderr)
        self._bar: Bar | None = None
        if shown and self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(printable(name), total=total, note="")
        self._began = self._told = time.perf_counter()

    def __enter__(self) -> Progress:
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

    def advance(self, amount: int) -> None:
        """So much more is done."""
        if not self._done:  # worker processes have started only now
            self._began = self._told = time.perf_counter()
        self._done += amount
        every_s = _BAR_EVERY_S if self._bar else _LINE_EVERY_S
        if self._shown and time.perf_counter() - self._told >= every_s:
            self._tell()

    def _tell(self) -> None:
        self._told = time.perf_counter()
        note = self._note(self._done, self._done / max(self._told - self._began, 1e-9))
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=note)
        else:
            self._console.print(plain(f"{self._name}  {note}"), soft_wrap=True)


def counted(name: str, total: int, what: str, *, shown: bool) -> Progress:
    """Of so many things, called `what`."""

    def note(done: int, rate: float) -> str:
        left = f"  {duration((total - done) / rate)} left" if rate else ""
        return f"{done:,}/{total:,} {what}  {rate:.0f}/s{left}"

    return Progress(name, total, note, shown=shown)
