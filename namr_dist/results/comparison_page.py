"""A comparison of runs as tables: on the console, and as one self-contained page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from namr_dist.atomic import write_atomic
from namr_dist.results.comparison import Comparison, Estimate, Gain, Setting
from namr_dist.results.comparison_charts import glance
from namr_dist.results.page import template
from namr_dist.results.tables import Row, columns, number
from namr_dist.retrieval.intervals import DRAWS, LEVEL
from namr_dist.run.folder import RunFolder
from namr_dist.terminal import Console, plain
from namr_dist.text import printable

_DIGITS = 2
_FIGURE_COLUMNS = len("± 0.00")
"""to which a figure is broken on a narrow terminal"""
_FILE_COLUMNS = 400
"""a file has room for whole lines"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of texts; `labels` columns come before those of figures."""

    title: str
    note: str
    labels: list[str]
    figures: list[str]
    rows: list[list[str]]


def grids(comparison: Comparison) -> list[Grid]:
    """All tables, the most wanted first."""
    tables = [_results(comparison)]
    if comparison.differences:
        tables.append(_gains(comparison))
    if any(len(setting.figures) > 1 for setting in comparison.settings):
        tables += [_by_mode(comparison, name) for name in _headlines(comparison)]
    return tables


def print_comparison(comparison: Comparison) -> None:
    """The same tables on stdout, and the runs that are in none."""
    parts: list[RenderableType] = [plain(f"Test retrieval, %, on {comparison.test}").append("\n")]
    for grid in grids(comparison):
        parts += [console_table(grid), Text()]
    parts += [plain(f"left out: {one.run}: {one.why}") for one in comparison.left_out]
    print_wide(Group(*parts))


def console_table(grid: Grid) -> Table:
    """The table for a terminal."""
    table = Table(
        title=plain(grid.title),
        caption=plain(grid.note),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in grid.labels:
        table.add_column(plain(name), overflow="fold")
    for name in grid.figures:
        table.add_column(plain(name), justify="right", overflow="fold", min_width=_FIGURE_COLUMNS)
    for row in grid.rows:
        table.add_row(*map(plain, row))
    return table


def print_wide(content: RenderableType) -> None:
    """Print on stdout, with whole lines where that is a file."""
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    console.print(content)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page `path`, with links to the runs' own reports where there are any. Folders are
    named as seen from the page."""
    headline = next(iter(_columns(comparison, "sample")), "R@1")
    runs = [
        (
            _seen_from(path, folder),
            _link(path, folder),
            _label(setting, comparison),
            seed,
            number(figure, _DIGITS),
        )
        for setting in comparison.settings
        for folder, seed, figure in zip(
            setting.runs, setting.seeds, _each(setting, headline), strict=True
        )
    ]
    page = template("comparison.html").render(
        title=path.parent.resolve().name,
        test=comparison.test,
        glance=glance(
            comparison,
            _headlines(comparison),
            run_name=_run_names(path, comparison).__getitem__,
            label=lambda setting: _label(setting, comparison) if comparison.fields else "",
        ),
        level=f"{100 * LEVEL:g} %",
        draws=DRAWS,
        grids=grids(comparison),
        runs=runs,
        headline=headline,
        left_out=[(_seen_from(path, one.run), one.why) for one in comparison.left_out],
    )
    write_atomic(path, page)


def _results(comparison: Comparison) -> Grid:
    names = _columns(comparison, "sample")
    rows = [
        [
            *_values(setting, comparison),
            str(len(setting.seeds)),
            *(_mean_and_deviation(setting.figures.get("sample", {}).get(name)) for name in names),
        ]
        for setting in comparison.settings
    ]
    note = "Plain distance between sample embeddings. Mean ± sample standard deviation over seeds."
    return Grid(
        title="Results", note=note, labels=[*_short(comparison), "seeds"], figures=names, rows=rows
    )


def _gains(comparison: Comparison) -> Grid:
    """Without and with multi-cluster ranking, side by side, and the difference."""
    shown = _headlines(comparison)
    rows = []
    for one in comparison.differences:
        baseline, ranked = comparison.settings[one.baseline], comparison.settings[one.ranked]
        cells = [
            cell
            for name in shown
            for cell in (
                _mean_and_deviation(baseline.figures["sample"].get(name)),
                _mean_and_deviation(ranked.figures["sample"].get(name)),
                _mean_and_error(one.gains.get(name)),
            )
        ]
        seeds = (
            f"{len(ranked.seeds)}, paired"
            if one.paired
            else f"{len(baseline.seeds)} and {len(ranked.seeds)}"
        )
        rows.append([*_values(ranked, comparison), seeds, *cells])
    note = (
        "Without: the same setting with ranking.weight 0. Gain ± its standard error, seed by seed where both have "
        "the same seeds."
    )
    return Grid(
        title="What multi-cluster ranking adds",
        note=note,
        labels=[*_short(comparison), "seeds"],
        rows=rows,
        figures=[f"{name} {part}" for name in shown for part in ("without", "with", "gain")],
    )


def _by_mode(comparison: Comparison, name: str) -> Grid:
    modes = [
        mode.name
        for mode in comparison.modes
        if any(mode.name in setting.figures for setting in comparison.settings)
    ]
    rows = [
        [
            *_values(setting, comparison),
            str(len(setting.seeds)),
            *(_mean_and_deviation(setting.figures.get(mode, {}).get(name)) for mode in modes),
        ]
        for setting in comparison.settings
    ]
    looking = [mode.name for mode in comparison.modes if mode.looks_at_gallery]
    names = ", ".join(looking)
    note = (
        "Controls stand in each run’s own report. "
        f"{names[0].upper()}{names[1:]} look{'s' * (len(looking) == 1)} at the whole gallery."
    )
    return Grid(
        title=f"{name} by way of search",
        note=note,
        labels=[*_short(comparison), "seeds"],
        figures=modes,
        rows=rows,
    )


def _headlines(comparison: Comparison) -> list[str]:
    """R@k of the smallest k, and MAP@R."""
    names = _columns(comparison, "sample")
    return [*names[:1], *(["MAP@R"] if "MAP@R" in names[1:] else [])]


def _columns(comparison: Comparison, mode: str) -> list[str]:
    return columns(
        [
            Row(
                name=mode,
                figures={name: one.mean for name, one in setting.figures.get(mode, {}).items()},
            )
            for setting in comparison.settings
        ]
    )


def _short(comparison: Comparison) -> list[str]:
    """The last two parts of each field's name, or all where that is not enough; one column at
    least."""
    ends = [".".join(name.split(".")[-2:]) for name in comparison.fields]
    return [
        end if ends.count(end) == 1 else name
        for end, name in zip(ends, comparison.fields, strict=True)
    ] or ["setting"]


def _values(setting: Setting, comparison: Comparison) -> list[str]:
    return [_text(setting.values[name]) for name in comparison.fields] or ["all alike"]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return printable(str(value))


def _label(setting: Setting, comparison: Comparison) -> str:
    return ", ".join(
        f"{name} {value}"
        for name, value in zip(_short(comparison), _values(setting, comparison), strict=True)
    )


def _each(setting: Setting, name: str) -> tuple[float | None, ...]:
    """A figure of each run; None where some run has none."""
    return setting.each.get("sample", {}).get(name) or (None,) * len(setting.runs)


def _mean_and_deviation(figure: Estimate | None) -> str:
    if figure is None:
        return number(None)
    return number(figure.mean, _DIGITS) + _plus_minus(figure.deviation)


def _mean_and_error(gain: Gain | None) -> str:
    return number(None) if gain is None else f"{gain.mean:+.{_DIGITS}f}" + _plus_minus(gain.error)


def _plus_minus(value: float | None) -> str:
    return "" if value is None else f" ± {number(value, _DIGITS)}"


def _seen_from(page: Path, folder: str) -> str:
    return os.path.relpath(folder, page.parent)


def _run_names(page: Path, comparison: Comparison) -> dict[str, str]:
    """Each run by its folder's own name, or as seen from the page where two have one name."""
    folders = [folder for setting in comparison.settings for folder in setting.runs]
    names = [Path(folder).resolve().name for folder in folders]
    return {
        folder: printable(name if names.count(name) == 1 else _seen_from(page, folder))
        for folder, name in zip(folders, names, strict=True)
    }


def _link(page: Path, folder: str) -> str | None:
    """Where the run's own report lies, seen from the page; None if there is none."""
    report = RunFolder(Path(folder)).report
    return quote(_seen_from(page, str(report))) if report.exists() else None
