"""Tables as CSV files that hold what is in them, and that no spreadsheet runs.

Spreadsheets take a cell that begins with = + - or @ for a formula, also behind a tab or a carriage
return (OWASP, "CSV Injection"). Such texts get an apostrophe in front, and so do those that already
have one there, so that reading takes off just what writing has put on. Numbers stay as they are.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from namr_dist.atomic import write_atomic

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-](inf|nan)", re.ASCII)


def cell(value: object) -> object:
    """What is written for a value."""
    formula = isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value)
    return f"'{value}" if formula else value


def value_of(text: str) -> str:
    """The text of a value from what `cell` made of it."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """A table with a header. Raises ValueError for a row with another column."""
    lines = [_line(columns)]
    for row in rows:
        if unknown := row.keys() - set(columns):
            raise ValueError(f"no column {min(unknown)}")
        lines.append(_line([row.get(column, "") for column in columns]))
    return "".join(lines)


def _line(values: Iterable[object]) -> str:
    text = io.StringIO()
    # The end of a line decides which characters of a cell need quotes: either of these does.
    csv.writer(text, lineterminator="\r\n").writerow(map(cell, values))
    return text.getvalue().removesuffix("\r\n") + "\n"


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Replace `path` by a table with a line a row, of which there is one at least; all have the
    first's columns.

    Writes and raises as `write_atomic`.
    """
    write_atomic(path, csv_text(list(rows[0]), rows))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of such a table, as texts by column."""
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {value_of(name): value_of(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]
