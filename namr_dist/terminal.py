"""Tables and bars for terminals, by rich, with the texts of others made harmless."""

from __future__ import annotations

from collections.abc import Iterable

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import MofNCompleteColumn, Progress
from rich.segment import Segment
from rich.text import Text

from namr_dist.text import printable


class Console(rich.console.Console):
    """A console on which only rich itself moves the cursor or sets colours: whatever text is
    printed, characters that a terminal would obey are shown as escapes."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of what is printed."""
        for segment in super().render(renderable, options):
            yield (
                segment
                if segment.control
                else segment._replace(text=printable(segment.text, keep="\n"))
            )


def plain(text: str) -> Text:
    """A text as it stands: one line, without markup. For whatever came from a file, a name or an
    error, in tables and titles."""
    return Text(printable(text))


def say_above(bar: Progress, text: str) -> None:
    """One line above a bar, or on stderr where there is none."""
    bar.console.print(plain(text), soft_wrap=True)


def transient_bar() -> Progress:
    """Counts on stderr, if that is a terminal, and leaves nothing behind."""
    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
