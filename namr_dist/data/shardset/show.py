"""The figures of a shard set as tables for the console."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.bar import Bar
from rich.console import RenderableType
from rich.table import Table

from namr_dist.data.shardset.histogram import bin_name
from namr_dist.terminal import plain

_BAR_CELLS = 14
_LABELS = {"mib": "MiB", "height": "px high: least / median / most", "width": "px wide"}


def statistics_tables(figures: dict[str, Any]) -> Iterator[Table]:
    """Tables of what `statistics` counts: a column for each split and subset; super-classes where
    the set has any."""
    rows = {**figures["splits"], **figures["subsets"]}
    table = _table(figures["name"], "", *rows)
    for figure in next(iter(rows.values())):
        table.add_row(
            _LABELS.get(figure, figure.replace("_", " ")),
            *(_number(row[figure]) for row in rows.values()),
        )
    yield table
    yield _histogram(figures["histogram"])
    if figures["categories"]:
        table = _table("Super-classes", "super-class", "classes", *figures["splits"])
        for name, row in figures["categories"].items():
            table.add_row(
                plain(name or "–"), _number(row["classes"]), *map(_number, row["images"].values())
            )
        yield table


def near_duplicate_tables(audit: dict[str, Any]) -> Iterator[Table]:
    """What `near_duplicates` found: counts for each split, and the nearest pairs of any two."""
    *others, _ = audit["splits"]
    table = _table(
        f"Images within {audit['near_bits']} bits of an image of another split",
        "split",
        "images",
        "flat, not compared",
        *(f"near {other}" for other in others),
    )
    for split, row in audit["splits"].items():
        near = [_number(comparison["near"]) for comparison in row["against"].values()]
        table.add_row(plain(split), _number(row["images"]), _number(row["flat"]), *near)
    yield table
    for split, row in audit["splits"].items():
        for other, comparison in row["against"].items():
            table = Table(
                title=plain(f"Nearest pairs of {split} and {other}"), title_justify="left"
            )
            for column in (split, other):
                table.add_column(plain(column), overflow="fold")
            table.add_column("bits", justify="right")
            for pair in comparison["nearest"]:
                table.add_row(plain(pair["key"]), plain(pair["other_key"]), _number(pair["bits"]))
            yield table


def _histogram(histogram: dict[str, Any]) -> Table:
    table = Table(
        title="Classes by number of images", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    table.add_column("images", justify="right", no_wrap=True)
    for split in histogram["classes"]:
        table.add_column(plain(split), justify="right", no_wrap=True)
        table.add_column(min_width=_BAR_CELLS)
    for position, (first, last) in enumerate(histogram["bins"]):
        cells: list[RenderableType] = []
        for counts in histogram["classes"].values():
            cells += [
                _number(counts[position]),
                Bar(max(counts), 0, counts[position], width=_BAR_CELLS),
            ]
        table.add_row(bin_name(first, last), *cells)
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=plain(title), title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(plain(column), justify="right")
    return table


def _number(value: int | float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{part:,.0f}" for part in value.values())
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
