"""What people read on a terminal: texts of others, durations, a bar while something takes long."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def printable(text: str) -> str:
    """A text that came from a file, with escapes in place of characters that a terminal obeys or
    that turn the direction of reading."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


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


def transient_bar() -> Progress:
    """Counts on stderr, if that is a terminal, and leaves nothing behind."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
