"""The parity table: run it, as rows of a CSV file, as a table on a terminal and in Markdown.

Columns beside the obvious:
    provider         NAMR-dist, or pytorch-metric-learning with its version
    namr             whether multi-cluster ranking is on, and what centres are learnt by, if any are
    way              no ranks (one process, the definition by autograd), DDP, ZeRO 0..3; for the
                     library's comparison ours, wrapper (DistributedLossWrapper) or wrapper,
                     efficient (efficient=True)
    dtype            of parameters, network and loss
    worst_parameter  the one whose gradient error is given; in the library's comparison `network` or
                     `loss`
    loss_rounding, gradient_rounding   one float32 process against float64
    norm_ratio       ‖g‖ / ‖g₁‖, in the library's comparison, where nothing is judged
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from namr_dist import csv_file
from namr_dist.atomic import write_atomic
from namr_dist.parallel.pool import Ranks
from namr_dist.parity import library
from namr_dist.parity.table import ENGINES, WORLD_SIZES, Verdict, all_cases, measure
from namr_dist.provenance import provenance

_OURS = "NAMR-dist"
_WAYS = {"definition": "no ranks"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the file; None where a column does not apply."""

    provider: str
    loss: str
    namr: str
    way: str
    ranks: int
    dtype: str
    loss_error: float | None = None
    gradient_error: float
    worst_parameter: str
    loss_bound: float | None = None
    gradient_bound: float | None = None
    loss_rounding: float | None = None
    gradient_rounding: float | None = None
    norm_ratio: float | None = None
    good: str = ""
    """yes, no, or empty where nothing is judged."""


_ORIGIN = ("timestamp", "machine", "versions", "commit")
_COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def origin() -> dict[str, str]:
    """When and where figures are made, and by what."""
    made = provenance()
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": made["machine"],
        "versions": f"{made['versions']}, DeepSpeed {importlib.metadata.version('deepspeed')}",
        "commit": made["commit"],
    }


def run(progress: Callable[[int, int], None]) -> list[Row]:
    """The whole table on this machine's CPU, and the library's wrapper where it is installed;
    minutes.

    progress: told how many of how many cases are done.
    """
    cases = all_cases()
    rows: list[Row] = []
    # As the ranks of a pool have: another number cuts sums elsewhere, and float32 shows it.
    torch.set_num_threads(1)

    def add(verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            rows.append(row(verdict))
            progress(len(rows), len(cases))

    add(measure([case for case in cases if case.way == "definition"], None))
    ratios: list[library.Ratio] = []
    for ranks in WORLD_SIZES:
        with Ranks(ranks) as pool:
            add(
                measure(
                    [case for case in cases if case.way != "definition" and case.ranks == ranks],
                    pool,
                )
            )
            if ranks > 1 and library.version():
                ratios += library.measure(pool)
    return rows + [_library_row(ratio) for ratio in ratios]


def failures(rows: Sequence[Row]) -> list[str]:
    """What is above its bound, a line each."""
    return [
        f"{row.loss}, NAMR {row.namr}, {row.way}, {row.ranks} ranks, {row.dtype}: loss {row.loss_error:.1e} "
        f"(bound {row.loss_bound:.0e}), gradient {row.gradient_error:.1e} of {row.worst_parameter} "
        f"(bound {row.gradient_bound:.0e})"
        for row in rows
        if row.good == "no"
    ]


def write_csv(path: Path, rows: Sequence[Row], made: dict[str, str]) -> None:
    """Replace the file. made: what `origin` said."""
    lines = (
        made
        | {
            name: f"{value:.3e}" if isinstance(value, float) else value
            for name, value in dataclasses.asdict(row).items()
        }
        for row in rows
    )
    write_atomic(path, csv_file.csv_text((*_ORIGIN, *_COLUMNS), lines))


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of a file that write_csv wrote, and where they were made."""
    lines = csv_file.read_csv(path)
    return [_read(line) for line in lines], {name: lines[0][name] for name in _ORIGIN}


def _read(line: dict[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(line[name]) if line[name] else None

    return Row(
        provider=line["provider"],
        loss=line["loss"],
        namr=line["namr"],
        way=line["way"],
        ranks=int(line["ranks"]),
        dtype=line["dtype"],
        loss_error=number("loss_error"),
        gradient_error=float(line["gradient_error"]),
        worst_parameter=line["worst_parameter"],
        loss_bound=number("loss_bound"),
        gradient_bound=number("gradient_bound"),
        loss_rounding=number("loss_rounding"),
        gradient_rounding=number("gradient_rounding"),
        norm_ratio=number("norm_ratio"),
        good=line["good"],
    )


def tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heading and lines of each table: per dtype, rows loss × NAMR, columns way × ranks."""
    ours = [row for row in rows if row.good]
    columns = [("no ranks", 1), *((way, ranks) for way in ENGINES for ranks in WORLD_SIZES)]
    heading = [
        "loss",
        "NAMR",
        *("no ranks" if way == "no ranks" else f"{way} ×{ranks}" for way, ranks in columns),
    ]
    made = []
    for dtype in dict.fromkeys(row.dtype for row in ours):
        cells = {
            (row.loss, row.namr, row.way, row.ranks): row for row in ours if row.dtype == dtype
        }
        lines = []
        for loss, namr in dict.fromkeys((row.loss, row.namr) for row in ours):
            across = [cells.get((loss, namr, *column)) for column in columns]
            line = [loss, namr, *("–" if row is None else _cell(row) for row in across)]
            if dtype == "float32":
                line.append(next(_short(row.gradient_rounding or 0.0) for row in across if row))
            lines.append(line)
        made.append(
            (
                f"{dtype}: largest relative error of a gradient, ×W on W ranks",
                heading + ["rounding"] * (dtype == "float32"),
                lines,
            )
        )
    return made


def library_table(rows: Sequence[Row]) -> tuple[str, list[str], list[list[str]]] | None:
    """Likewise ‖g‖ / ‖g₁‖ of the library's wrapper and ours; None if the library was not there."""
    compared = [row for row in rows if row.norm_ratio is not None]
    if not compared:
        return None
    columns = [(way, ranks) for way in library.WAYS for ranks in WORLD_SIZES if ranks > 1]
    cells = {
        (row.loss, row.worst_parameter, row.way, row.ranks): f"{row.norm_ratio:.3f}"
        for row in compared
    }
    lines = [
        [
            loss,
            {"network": "network", "loss": "β or proxies"}[part],
            *(cells.get((loss, part, *column), "refused") for column in columns),
        ]
        for loss, part in dict.fromkeys((row.loss, row.worst_parameter) for row in compared)
    ]
    packages = sorted({row.provider for row in compared if row.way != library.WAYS[0]})
    return (
        f"gradient norm over that of one process; wrapper: DistributedLossWrapper of {', '.join(packages)}",
        ["loss", "gradient of", *(f"{way} ×{ranks}" for way, ranks in columns)],
        lines,
    )


def row(verdict: Verdict) -> Row:
    """A verdict as a line."""
    case, errors, rounding = verdict.case, verdict.errors, verdict.rounding
    return Row(
        provider=_OURS,
        loss=case.loss,
        namr=", ".join(["on" if case.namr else "off", *filter(None, [case.learnt])]),
        way=_WAYS.get(case.way, case.way),
        ranks=case.ranks,
        dtype=case.dtype,
        loss_error=errors.loss,
        gradient_error=errors.gradient,
        worst_parameter=errors.worst,
        loss_bound=verdict.loss_bound,
        gradient_bound=verdict.gradient_bound,
        loss_rounding=rounding.loss if rounding else None,
        gradient_rounding=rounding.gradient if rounding else None,
        good="yes" if verdict.good else "no",
    )


def _library_row(ratio: library.Ratio) -> Row:
    ours = ratio.way == library.WAYS[0]
    return Row(
        provider=_OURS if ours else f"{library.PACKAGE} {library.version()}",
        loss=ratio.loss,
        namr="off",
        way=ratio.way,
        ranks=ratio.ranks,
        dtype="float64",
        gradient_error=ratio.error,
        worst_parameter=ratio.part,
        norm_ratio=ratio.norm,
    )


def _cell(row: Row) -> str:
    return _short(row.gradient_error) + ("" if row.good == "yes" else " ✗")


def _short(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"
