"""The gains as tables: on the console, and in Markdown for the pages of this repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from namr_dist.reproduce.cells import ALONE, FIGURES, RANKING, Cell, CellName
from namr_dist.reproduce.gains import (
    QUANTITIES,
    Gain,
    Interval,
    LossGains,
    with_structure,
)
from namr_dist.results.comparison_page import Grid, console_table, print_wide
from namr_dist.results.tables import number
from namr_dist.retrieval.intervals import DRAWS, LEVEL
from namr_dist.text import printable

_DIGITS = 2
_SHOWN = ("namr - alone", "structure - one", "structure - shuffled", "ranking - alone")
_LEVEL = f"{100 * LEVEL:.0f} %"
_NOTE = (
    f"Test retrieval, %. ± and the first brackets: {_LEVEL} interval by Student’s t over seeds, of differences "
    f"paired by seed; the second brackets: {_LEVEL} bootstrap interval over test classes ({DRAWS:,} draws). A "
    "single seed has no interval over seeds."
)
_SUMMARY_NOTE = (
    f"Test retrieval, %. Gains are means of differences paired by seed, in brackets the {_LEVEL} bootstrap "
    "interval over test classes."
)
_PROTOCOL = ("data set", "test split", "query", "steps", "batch", "trained on", "trained with")


def grids(every: Sequence[LossGains]) -> list[Grid]:
    """A table for each figure."""
    return [_by_loss(every, figure) for figure in FIGURES]


def rival_grids(every: Sequence[LossGains]) -> list[Grid]:
    """For each figure a table of the ranking loss and its rivals; none where no loss has any."""
    if not any(one.rivals for one in every):
        return []
    return [_by_rival(every, figure) for figure in FIGURES]


def print_gains(every: Sequence[LossGains]) -> None:
    """All tables on stdout."""
    parts: list[RenderableType] = []
    for grid in (*grids(every), *rival_grids(every)):
        parts += [console_table(grid), Text()]
    print_wide(Group(*parts, Text(_NOTE)))


def markdown(cells: Sequence[Cell], every: Sequence[LossGains]) -> str:
    """What the method adds to each loss, and how the networks were made. every: the gains of these
    cells."""
    kept = [cell for cell in cells if cell.name.variant in (ALONE, RANKING)]
    return _markdown(kept, grids(every))


def rivals_markdown(cells: Sequence[Cell], every: Sequence[LossGains]) -> str:
    """What simpler regularisers add in place of the ranking; empty where there are none."""
    tables = rival_grids(every)
    return _markdown(cells, tables) if tables else ""


def summary_markdown(grid_gains: Mapping[str, Sequence[LossGains]]) -> str:
    """The gain of the whole method and of its structure embedding: one row per loss of each grid.
    grid_gains: title → the gains of a grid."""
    heading = ["networks", "loss"]
    for figure in FIGURES:
        heading += [f"{figure} alone", "NAMR", "gain"]
    heading.append(f"structure − s = 1, {FIGURES[-1]}")
    rows = []
    for title, every in grid_gains.items():
        for one in every:
            row = [f"{title}, {_seeds(one)} seeds", printable(one.loss)]
            for figure in FIGURES:
                row += [
                    number(one.means[name][figure].mean if name in one.means else None)
                    for name in ("alone", "namr")
                ]
                row.append(_short_gain(one.gains.get("namr - alone"), figure))
            rows.append([*row, _short_gain(one.gains.get("structure - one"), FIGURES[-1])])
    return "\n".join([*_table(heading[:2], heading[2:], rows), "", _SUMMARY_NOTE])


def _markdown(cells: Sequence[Cell], tables: Sequence[Grid]) -> str:
    lines = [_protocol(cells), ""]
    for grid in tables:
        lines += [f"{grid.title}:", "", *_table(grid.labels, grid.figures, grid.rows), ""]
    return "\n".join([*lines, _NOTE])


def _table(
    labels: Sequence[str], figures: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
    marks = ["---"] * len(labels) + ["---:"] * len(figures)
    return [f"| {' | '.join(row)} |" for row in ([*labels, *figures], marks, *map(_escaped, rows))]


def listed(names: Sequence[CellName]) -> str:
    """What a grid lacks, in a line."""
    return ", ".join(map(str, names))


def _by_loss(every: Sequence[LossGains], figure: str) -> Grid:
    rows = [
        [
            printable(one.loss),
            _seeds(one),
            *(_mean(one.means.get(name, {}).get(figure)) for name in QUANTITIES),
            *(_gain(one.gains.get(name), figure) for name in _SHOWN),
        ]
        for one in every
    ]
    return Grid(
        title=figure,
        note="",
        labels=["loss", "seeds"],
        figures=[*QUANTITIES, *map(_title, _SHOWN)],
        rows=rows,
    )


def _by_rival(every: Sequence[LossGains], figure: str) -> Grid:
    rows = []
    for one in every:
        for name in (RANKING, *one.rivals) if one.rivals else ():
            gain = one.gains.get(f"{name} - alone")
            both = with_structure(name)
            rows.append(
                [
                    printable(one.loss),
                    printable(name),
                    str(len(gain.seeds)) if gain else "0",
                    _mean(one.means.get(name, {}).get(figure)),
                    _gain(gain, figure),
                    _mean(one.means.get(both, {}).get(figure)),
                    _gain(one.gains.get(f"{both} - alone"), figure),
                ]
            )
    return Grid(
        title=f"{figure}, with a simpler regulariser in place of the ranking",
        note="",
        labels=["loss", "regulariser", "paired seeds"],
        figures=[figure, "− alone", "with structure", "with structure − alone"],
        rows=rows,
    )


def _seeds(one: LossGains) -> str:
    """How many seeds; where networks have different ones, how many each, and how many are
    paired."""
    shown = {name: seeds for name, seeds in one.seeds.items() if name not in one.rivals}
    if len(set(shown.values())) == 1:
        return str(len(next(iter(shown.values()))))
    paired = one.gains.get("ranking - alone")
    counts = ", ".join(f"{len(seeds)} {name}" for name, seeds in shown.items())
    return f"{counts}, {len(paired.seeds) if paired else 0} paired"


def _title(difference: str) -> str:
    side, other = difference.split(" - ")
    return f"{side} − {'s = 1' if other == 'one' else other}"


def _mean(of: Interval | None) -> str:
    if of is None:
        return number(None)
    half = "" if of.high is None else f" ± {number(of.high - of.mean, _DIGITS)}"
    return number(of.mean, _DIGITS) + half


def _gain(gain: Gain | None, figure: str) -> str:
    if gain is None:
        return number(None)
    seeds, classes = gain.over_seeds[figure], gain.over_classes[figure]
    return f"{seeds.mean:+.{_DIGITS}f} {_brackets(seeds)} {_brackets(classes)}"


def _short_gain(gain: Gain | None, figure: str) -> str:
    if gain is None:
        return number(None)
    of = gain.over_classes[figure]
    if of.low is None or of.high is None:
        return _signed(of.mean)
    return f"{_signed(of.mean)} [{_signed(of.low)}, {_signed(of.high)}]"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: no "-0.0"


def _brackets(of: Interval) -> str:
    if of.low is None or of.high is None:
        return f"[{number(None)}]"
    return f"[{of.low:+.{_DIGITS}f}, {of.high:+.{_DIGITS}f}]"


def _escaped(row: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def _protocol(cells: Sequence[Cell]) -> str:
    """What is known of how all cells were made; of a fact in which they differ, all values."""
    facts = [
        f"{name}: {' / '.join(values)}"
        for name in _PROTOCOL
        if (
            values := dict.fromkeys(
                # Each cell's metrics.json names the commit.
                str(cell.protocol[name]).partition(", commit ")[0]
                for cell in cells
                if name in cell.protocol
            )
        )
    ]
    seeds = sorted({cell.name.seed for cell in cells})
    return "; ".join(
        [
            f"{len(cells)} networks, seeds {', '.join(map(str, seeds))}",
            f"{len(cells[0].label_C):,} test classes, {int(cells[0].queries_C.sum()):,} queries",
            *facts,
        ]
    )
