"""Write what multi-cluster ranking and the structure embedding add into README.md and docs/*.md,
from the finished cells of docs/results/gains-*:

    namr reproduce --results docs/results/gains-images
    namr reproduce --track features --results docs/results/gains-features
    python tools/make_gains.py

A table stands in every page that has its marks, <!-- gains-images:begin --> and <!--
gains-images:end -->, that of simpler regularisers between those of gains-images-rivals, and the
gains of all grids between those of gains-summary. What is missing is reported: cells of a grid that
is not whole, folders, and marks.
"""

from __future__ import annotations

import re
from pathlib import Path

from namr_dist.reproduce.cells import complete_cells, read_cells
from namr_dist.reproduce.gains import gains, missing
from namr_dist.reproduce.gains_table import listed, markdown, rivals_markdown, summary_markdown

ROOT = Path(__file__).parents[1]
TITLES = {
    "gains-images": "homeware, end to end",
    "gains-features": "homeware, heads",
    "gains-letters": "letters, heads",
}
SUMMARY = "gains-summary"


def write(root: Path) -> list[str]:
    """Replace what stands between the marks in the pages of a repository; return what is missing, a
    line each."""
    lacking = []
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    every = {}
    for name, title in TITLES.items():
        folder = root / "docs" / "results" / name
        cells = read_cells(complete_cells(folder))
        where = folder.relative_to(root)
        if not cells:
            lacking.append(f"{where} has no finished cell; its table is left as it is")
            continue
        every[title] = of_grid = gains(cells)
        if absent := missing(cells):
            lacking.append(f"{where} lacks {listed(absent)}")
        for marks, content in (
            (name, markdown(cells, of_grid)),
            (f"{name}-rivals", rivals_markdown(cells, of_grid)),
        ):
            if not content:
                continue
            made = f"{content} Cells: `{where}`, table by `tools/make_gains.py`."
            if not _between(marks, made, pages):
                lacking.append(f"no page has the marks of {marks}")
    made = f"{summary_markdown(every)} Table by `tools/make_gains.py`."
    if every and not _between(SUMMARY, made, pages):
        lacking.append(f"no page has the marks of {SUMMARY}")
    return lacking


def _between(name: str, content: str, pages: list[Path]) -> int:
    """Put it between the marks of that name; return how many there were."""
    marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    marks = 0
    for page in pages:
        text, found = marked.subn(
            lambda match: f"{match[1]}{content}\n{match[2]}", page.read_text(encoding="utf-8")
        )
        if found:
            page.write_text(text, encoding="utf-8")
        marks += found
    return marks


if __name__ == "__main__":
    print("\n".join(write(ROOT)) or "all tables are written")
