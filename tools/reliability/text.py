"""Markdown of the tables."""

from __future__ import annotations


def table(heading: list[str], lines: list[list[str]], *, words: int) -> list[str]:
    """A table whose first columns, so many, are words and the rest figures, and an empty line."""
    marks = ["---" if column < words else "---:" for column in range(len(heading))]
    rows = (heading, marks, *lines)
    return [*(f"| {' | '.join(cells)} |" for cells in rows), ""]
