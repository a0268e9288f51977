"""A run's log, a line of JSON for each thing that training tells, read with one temper by all who
read it.

A line counts if it is whole (it has its line end) and is a JSON object, in UTF-8, with a
whole-numbered step. Any other is skipped and counted: a process that was killed leaves half a line,
a broken disk any bytes, and neither may hide the rest. Empty lines are nothing. Fields of an entry
may hold anything, so that they are asked for by the functions here.

No torch is imported: people look often.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from namr_dist.atomic import write_atomic
from namr_dist.errors import InputError
from namr_dist.json_file import json_object
from namr_dist.text import say

Entry = Mapping[str, Any]
"""One line: `step`, and what was told."""

_MOST = 10**18
"""Of an integer: any of so many digits is a float as well, and no count that a run makes has
more."""
_LONGEST_S = 1e12


@dataclass(frozen=True, kw_only=True)
class Log:
    """What was read of a log at once."""

    path: Path
    entries: tuple[Entry, ...]
    unreadable: int
    """lines that were skipped"""

    def warn(self) -> None:
        """Say on stderr how many lines were skipped, if there are any."""
        if self.unreadable:
            say(f"WARNING: {skipped(self.unreadable, self.path)}; left out", file=sys.stderr)


def skipped(count: int, path: Path) -> str:
    """So many lines in words."""
    return f"{count} line{'s' if count > 1 else ''} of {path} could not be read"


def read_log(path: Path) -> Log:
    """All that stands in a log. Raises InputError if it is missing."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing: train the run first") from None
    entries = [entry for _, entry in _lines(content)]
    kept = tuple(entry for entry in entries if entry is not None)
    return Log(path=path, entries=kept, unreadable=len(entries) - len(kept))


def cut_log(path: Path, step: int) -> Log:
    """Drop from a log what comes after `step`, and every line that cannot be read; what stays, and
    how many those were. A log that is not there is an empty one."""
    if not path.exists():
        return Log(path=path, entries=(), unreadable=0)
    lines = list(_lines(path.read_bytes()))
    kept = [(line, entry) for line, entry in lines if entry is not None and entry["step"] <= step]
    write_atomic(path, b"".join(line for line, _ in kept))
    return Log(
        path=path,
        entries=tuple(entry for _, entry in kept),
        unreadable=sum(entry is None for _, entry in lines),
    )


class GrowingLog:
    """A log that is looked at again and again: it is read once, and then only what was added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.unreadable = 0
        """lines that were skipped; what stands behind the last line end is still being written, and
        does not count"""
        self.changed: float | None = None
        """when the last line came, seconds since 1970"""
        self._inode, self._read_bytes = -1, 0

    def read(self) -> tuple[bool, list[Entry]]:
        """(whether the entries are those of a log from its beginning, and what was read before is
        to be forgotten; the entries since the last call)."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                # A run that goes on cuts the log, by another file in its place.
                anew = status.st_ino != self._inode or status.st_size < self._read_bytes
                if anew:
                    self._forget()
                self._inode = status.st_ino
                file.seek(self._read_bytes)
                added, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            self._forget()
            return True, []
        self._read_bytes += len(added) + len(end)
        entries = [entry for _, entry in _lines(added + end)]
        kept = [entry for entry in entries if entry is not None]
        self.unreadable += len(entries) - len(kept)
        if self._read_bytes:
            self.changed = status.st_mtime
        return anew, kept

    def _forget(self) -> None:
        self._inode, self._read_bytes, self.unreadable, self.changed = -1, 0, 0, None


def number_of(entry: Entry, name: str) -> float | None:
    """A field's number; None where it is missing, of another type or not finite."""
    value = entry.get(name)
    return (
        value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def count_of(entry: Entry, name: str) -> int | None:
    """A field's integer; None where it is missing or of another type."""
    value = entry.get(name)
    return value if type(value) is int and abs(value) < _MOST else None


def text_of(entry: Entry, name: str) -> str | None:
    """A field's text; None where it is missing, of another type or has characters that no terminal
    shows."""
    value = entry.get(name)
    return value if isinstance(value, str) and value.isprintable() else None


def time_of(entry: Entry) -> float | None:
    """Seconds of training until this line; None where it does not say."""
    time_s = number_of(entry, "time_s")
    return time_s if time_s is not None and 0 <= time_s < _LONGEST_S else None


def figures_of(entry: Entry) -> dict[str, float] | None:
    """What a validation found, percent, by name; None for a line of something else."""
    figures = entry.get("val")
    if not isinstance(figures, dict):
        return None
    known = {name: number_of(figures, name) for name in figures if name.isprintable()}
    return {name: value for name, value in known.items() if value is not None}


def _lines(content: bytes) -> Iterator[tuple[bytes, Entry | None]]:
    """Each line that is not empty with its entry; None for one that cannot be read."""
    *whole, half = content.split(b"\n")
    for line in whole:
        if line.strip():
            yield line + b"\n", _entry(line)
    if half.strip():
        yield half, None


def _entry(line: bytes) -> Entry | None:
    try:
        entry = json_object(line, "the line", "")
    except InputError:
        return None
    return entry if count_of(entry, "step") is not None else None
