"""The result tables: as rows for the report, and for the console.

Every figure is in percent; "–" stands where a run has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from namr_dist.retrieval.modes import CONTROLS, MODES, row_name
from namr_dist.retrieval.reidentification import METRICS
from namr_dist.terminal import plain

BASELINES = ("raw pixels", "untrained model", "frozen backbone")
_LAST_COLUMNS = ("MAP@R", "R-precision")


@dataclass(frozen=True, kw_only=True)
class ShownMode:
    """What tables tell of a retrieval mode, also of one whose code is not here."""

    name: str
    sentence: str
    looks_at_gallery: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    name: str
    figures: dict[str, float]
    key: str = ""
    """what its figures are called in metrics.json"""
    control: bool = False
    looks_at_gallery: bool = False
    sentence: str = ""
    """a mode's distance in words"""


def number(value: Any, digits: int = 1) -> str:
    """A figure with a fixed number of digits, or "–" for what is missing or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"


def columns(rows: Iterable[Row]) -> list[str]:
    """R@k by k, then MAP@R and R-precision, then mAP@k and precision@k by k and MRR: those that any
    row has."""
    names = {name for row in rows for name in row.figures}

    def by_cut_off(beginning: str) -> list[str]:
        found = [one for one in names if one.startswith(beginning)]
        return sorted(
            (one for one in found if one[len(beginning) :].isdigit()),
            key=lambda one: int(one[len(beginning) :]),
        )

    return [
        *by_cut_off("R@"),
        *(name for name in _LAST_COLUMNS if name in names),
        *by_cut_off("mAP@"),
        *by_cut_off("precision@"),
        *(["MRR"] if "MRR" in names else []),
    ]


def baseline_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """What training is measured against, in the order of BASELINES, then any other."""
    baselines = metrics.get("baselines") or {}
    names = [name for name in BASELINES if name in baselines]
    names += [name for name in baselines if name not in BASELINES]
    return [Row(name=name, figures=baselines[name]) for name in names]


def shown_modes(metrics: Mapping[str, Any]) -> list[ShownMode]:
    """The built-in modes, then those that the user brought along to the evaluation (its block
    "own_modes")."""
    shown = [
        ShownMode(name=mode.name, sentence=mode.sentence, looks_at_gallery=mode.looks_at_gallery)
        for mode in MODES
    ]
    own = metrics.get("own_modes")
    for name, told in own.items() if isinstance(own, dict) else ():
        if isinstance(told, dict) and _is_name(name):
            shown.append(
                ShownMode(
                    name=name,
                    sentence=str(told.get("sentence", "")),
                    looks_at_gallery=told.get("looks_at_gallery") is True,
                )
            )
    return shown


def _is_name(name: str) -> bool:
    """Whether an own mode may be called so, as `modes.with_own` asks when it is measured."""
    return name.isprintable() and bool(name.strip()) and name not in [mode.name for mode in MODES]


def mode_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Every mode that was measured on the test split, each followed by its controls."""
    return _rows(metrics["test"], shown_modes(metrics))


def reidentification_rows(metrics: Mapping[str, Any]) -> list[Row]:
    """The same for re-identification; none where it was not measured."""
    return _rows((metrics.get("reidentification") or {}).get("modes") or {}, shown_modes(metrics))


def _rows(figures: Mapping[str, Any], modes: Iterable[ShownMode]) -> list[Row]:
    rows = []
    for mode in modes:
        if mode.name in figures:
            rows.append(
                Row(
                    name=mode.name,
                    figures=figures[mode.name],
                    key=mode.name,
                    looks_at_gallery=mode.looks_at_gallery,
                    sentence=mode.sentence,
                )
            )
        for control, meaning in CONTROLS.items():
            if (name := row_name(mode.name, control)) in figures:
                rows.append(Row(name=meaning, figures=figures[name], key=name, control=True))
    return rows


def mean_and_deviation(row: Row, name: str) -> str:
    """A figure of re-identification, such as "91.2 ± 0.3"."""
    return f"{number(row.figures.get(name))} ± {number(row.figures.get(f'{name} std'))}"


def results_table(metrics: Mapping[str, Any]) -> Group:
    """The content of metrics.json for the console: baselines, then trained modes and controls;
    re-identification, where it was measured, in a table of its own."""
    before, trained = baseline_rows(metrics), mode_rows(metrics)
    names = columns([*before, *trained])
    counts = metrics.get("test_counts") or {}
    title = "Test retrieval, %"
    if "queries" in counts:
        title += (
            f" ({counts['queries']:,} queries, {counts.get('left_out', 0):,} left out, "
            f"{counts.get('items', 0):,} images searched)"
        )
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
        table.add_row(plain(row.name), *(number(row.figures.get(name)) for name in names))
    if before:
        table.add_section()
    _add_trained(
        table, trained, [[number(row.figures.get(name)) for name in names] for row in trained]
    )
    again = reidentification_rows(metrics)
    return (
        Group(table, _reidentification_table(metrics["reidentification"], again))
        if again
        else Group(table)
    )


def _reidentification_table(block: Mapping[str, Any], rows: list[Row]) -> Table:
    title = (
        f"Re-identification, % ({block['queries']:,} queries, gallery of {block['gallery']:,}, mean ± deviation "
        f"of {block['draws']} draws)"
    )
    table = Table("", title=title)
    for name in METRICS:
        table.add_column(name, justify="right")
    _add_trained(table, rows, [[mean_and_deviation(row, name) for name in METRICS] for row in rows])
    return table


def _add_trained(table: Table, rows: list[Row], values: list[list[str]]) -> None:
    for row, cells in zip(rows, values, strict=True):
        label = (
            f"  {row.name}" if row.control else f"trained, {row.name}" + " *" * row.looks_at_gallery
        )
        table.add_row(plain(label), *cells, style="dim" if row.control else None)
