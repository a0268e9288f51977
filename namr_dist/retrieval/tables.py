"""The result tables: as rows for the report, and for the console.

Every figure is in percent; "–" stands where a run has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from namr_dist.retrieval.evaluate import LOOKS_AT_GALLERY, MODES

BASELINES = ("raw pixels", "untrained model", "frozen backbone")
_LAST_COLUMNS = ("MAP@R", "R-precision")
_CONTROL_NAMES = {"s1": "with s = 1 everywhere", "shuffled": "with s shuffled between images"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    name: str
    figures: dict[str, float]
    control: bool = False
    looks_at_gallery: bool = False


def number(value: Any, digits: int = 1) -> str:
    """A figure with a fixed number of digits, or "–" for what is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"


def columns(rows: Iterable[Row]) -> list[str]:
    """R@k by k, then MAP@R and R-precision: those that any row has."""
    names = {name for row in rows for name in row.figures}
    cut_offs = [name for name in names if name.startswith("R@") and name[2:].isdigit()]
    cut_offs.sort(key=lambda name: int(name[2:]))
    return cut_offs + [name for name in _LAST_COLUMNS if name in names]


def baseline_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """What training is measured against, in the order of BASELINES, then any other."""
    baselines = metrics.get("baselines") or {}
    names = [name for name in BASELINES if name in baselines]
    names += [name for name in baselines if name not in BASELINES]
    return [Row(name=name, figures=baselines[name]) for name in names]


def mode_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Every measured mode, each followed by its controls."""
    test = metrics["test"]
    rows = []
    for mode in MODES:
        if mode in test:
            rows.append(Row(name=mode, figures=test[mode], looks_at_gallery=mode in LOOKS_AT_GALLERY))
        for suffix, meaning in _CONTROL_NAMES.items():
            control = f"{mode}_{suffix}"
            if control in test:
                rows.append(Row(name=meaning, figures=test[control], control=True))
    return rows


def results_table(metrics: Mapping[str, Any]) -> Table:
    """The content of metrics.json as a table for the console: baselines, then trained modes and controls."""
    before, trained = baseline_rows(metrics), mode_rows(metrics)
    names = columns([*before, *trained])
    counts = metrics.get("test_counts") or {}
    title = "Test retrieval, %"
    if "queries" in counts:
        title += f" ({counts['queries']:,} queries, {counts.get('left_out', 0):,} left out)"
    notes = []
    if any(row.looks_at_gallery for row in trained):
        notes.append("* looks at the whole gallery, not only at the two images compared")
    if "rerank_certified_percent" in counts:
        share = number(counts["rerank_certified_percent"])
        notes.append(f"rerank: {share} % of the queries provably as in adaptive")
    table = Table(title=title, caption="\n".join(notes) or None, caption_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for row in before:
        table.add_row(Text(row.name), *(number(row.figures.get(name)) for name in names))
    if before:
        table.add_section()
    for row in trained:
        label = f"  {row.name}" if row.control else f"trained, {row.name}" + " *" * row.looks_at_gallery
        values = [number(row.figures.get(name)) for name in names]
        table.add_row(Text(label), *values, style="dim" if row.control else None)
    return table
