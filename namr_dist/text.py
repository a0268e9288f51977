"""What people read, as text: names and messages of others made harmless, lines, durations."""

from __future__ import annotations

import sys
from typing import TextIO


def printable(text: str, *, keep: str = "") -> str:
    """A text that came from a file, a name or an error, with escapes such as `\\x1b` in place of
    characters that a terminal obeys, that turn the direction of reading, or that nothing shows.

    keep: characters that stay, such as the line ends of a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in keep
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print each line (on stdout, unless a file is given) and flush. A line end within one is shown
    as an escape: no name can add a line of its own."""
    file = file or sys.stdout
    file.writelines(f"{printable(line)}\n" for line in lines)
    file.flush()


def duration(seconds: float) -> str:
    """Two units: "12 s", "4 min 05 s", "2 h 03 min", "3 d 04 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
