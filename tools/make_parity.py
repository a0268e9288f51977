"""Put the figures of `namr doctor --parity --csv FILE` into docs/results/parity.csv and
docs/parity.md.

python tools/make_parity.py FILE
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from namr_dist.parity.report import library_table, read_csv, tables

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"


def markdown(heading: list[str], lines: list[list[str]], *, words: int) -> list[str]:
    """A table whose first columns, so many, are words and the rest figures."""
    marks = ["---" if column < words else "---:" for column in range(len(heading))]
    return [f"| {' | '.join(cells)} |" for cells in (heading, marks, *lines)]


def main(source: Path) -> None:
    """Copy the figures and replace what stands between the page's marks."""
    rows, made = read_csv(source)
    target = DOCS / "results" / "parity.csv"
    if source.resolve() != target.resolve():
        shutil.copy(source, target)
    judged = [row for row in rows if row.good]
    good = sum(row.good == "yes" for row in judged)
    text = [
        f"{good} of {len(judged)} cases are within their bounds. {made['machine']}; {made['versions']}; commit "
        f"{made['commit']}; figures with losses and bounds: [results/parity.csv](results/parity.csv).",
        "",
    ]
    for title, heading, lines in tables(rows):
        text += [f"{title}:", "", *markdown(heading, lines, words=2), ""]
    if library := library_table(rows):
        title, heading, lines = library
        text += [
            f"For comparison, not judged: {title}, without and with `efficient=True`. A linear map in float64, "
            "gradients averaged over ranks as DDP does; 1 is right:",
            "",
            *markdown(heading, lines, words=2),
            "",
        ]
    page = DOCS / "parity.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(
        f"{before}{BEGIN}\n" + "\n".join(text) + END + rest.split(END)[1], encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
