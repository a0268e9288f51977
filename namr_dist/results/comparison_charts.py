"""A comparison to look at: curves of all runs in one chart, and bars with intervals over classes.

Shapes: F figures, C test classes that have queries.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from namr_dist import verified_json
from namr_dist.results.charts import HUES, swatch
from namr_dist.results.class_figures import ClassFigures, read_class_figures
from namr_dist.results.comparison import Comparison, Setting
from namr_dist.results.curves import Chart, Curves, overlaid_charts
from namr_dist.results.record import training_steps, validations
from namr_dist.retrieval.arrays import Float64
from namr_dist.retrieval.intervals import over_classes
from namr_dist.retrieval.modes import SAMPLE
from namr_dist.run.folder import RunFolder
from namr_dist.run.log import read_log

MOST = 2 * HUES
"""series that can be told apart: each colour, full and dashed"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """What has one colour: a run, or a setting's runs where there are many."""

    name: str
    setting: str
    """what tells it from the others; "" where nothing does"""
    css: str
    swatch: Markup
    runs: tuple[Path, ...]
    each: dict[str, tuple[float, ...]]
    """figure of the sample mode → its value of each run"""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure of a series, in percent."""

    series: Series
    value: float
    ends: tuple[float, float] | None
    """its interval over classes"""
    gain: float | None = None
    """over the first series, on the same classes"""
    gain_ends: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Glance:
    """All charts of a comparison."""

    series: list[Series]
    bars: list[tuple[str, list[Bar]]]
    """by figure"""
    charts: list[Chart]
    shown: str
    """what of the runs they show, in words; "" where that is all"""


def glance(
    comparison: Comparison,
    figures: Sequence[str],
    *,
    run_name: Callable[[str], str],
    label: Callable[[Setting], str],
) -> Glance:
    """The charts of `figures`. run_name: what a run is called, from its folder; label: what a
    setting is called, "" where there is only one.

    Up to MOST runs have a colour each, of more each setting has one.
    Raises InputError for a run whose classes.json is damaged.
    """
    settings = comparison.settings
    by_run = sum(len(setting.runs) for setting in settings) <= MOST
    parts = [
        (setting, range(number, number + 1) if by_run else range(len(setting.runs)))
        for setting in settings
        for number in range(len(setting.runs) if by_run else 1)
    ]
    series = [
        Series(
            name=run_name(setting.runs[members[0]]) if by_run else label(setting),
            setting=label(setting) if by_run else _seeds(setting),
            css=_css(place),
            swatch=swatch(_css(place)),
            runs=tuple(Path(setting.runs[number]) for number in members),
            each={
                name: tuple(values[number] for number in members)
                for name, values in setting.each.get(SAMPLE.name, {}).items()
            },
        )
        for place, (setting, members) in enumerate(parts[:MOST])
    ]
    curves = []
    for one in series:
        for run in one.runs:
            path = RunFolder(run).log
            if path.exists():
                log = read_log(path)
                curves.append(
                    Curves(
                        name=one.name,
                        css=one.css,
                        steps=training_steps(log),
                        validations=validations(log),
                    )
                )
    by_class = [_classes_of(one) for one in series]
    bars = [(name, _bars(series, by_class, name)) for name in figures]
    shown = "" if by_run else "A colour for each setting, whose bar is the mean over its seeds."
    if len(parts) > MOST:
        shown += f" The first {MOST} of {len(parts)} settings of the table below."
    return Glance(
        series=series,
        bars=[(name, of_name) for name, of_name in bars if of_name],
        charts=list(overlaid_charts(curves, figures)),
        shown=shown.strip(),
    )


def _seeds(setting: Setting) -> str:
    count = len(setting.seeds)
    return f"{count} seed{'s' * (count > 1)}"


def _css(place: int) -> str:
    return f"p{place % HUES}" + (" dashed" if place >= HUES else "")


def _classes_of(series: Series) -> list[ClassFigures] | None:
    """Of each run; None where one has none, or where they are of different classes."""
    every = []
    for run in series.runs:
        files = RunFolder(run)
        if not files.classes.exists():
            return None
        metrics = verified_json.loads_object(
            files.metrics.read_bytes(), str(files.metrics), "evaluate it again"
        )
        every.append(read_class_figures(files.classes, metrics["test"]))
    return every if all(_same_classes(one, every[0]) for one in every) else None


def _same_classes(one: ClassFigures, other: ClassFigures) -> bool:
    return one.label_C == other.label_C and bool((one.queries_C == other.queries_C).all())


def _bars(
    series: Sequence[Series], by_class: Sequence[list[ClassFigures] | None], name: str
) -> list[Bar]:
    """A bar for each series that has the figure."""
    bars: list[Bar] = []
    first: tuple[float, ClassFigures, Float64] | None = None
    for one, classes in zip(series, by_class, strict=True):
        if name not in one.each:
            continue
        value = statistics.fmean(one.each[name])
        values_C = _mean_of_runs(classes, name)
        if classes is None or values_C is None:
            bars.append(Bar(series=one, value=value, ends=None))
            continue
        gain, gain_ends = None, None
        if first is None and not bars:
            first = value, classes[0], values_C
        elif first is not None and _same_classes(classes[0], first[1]):
            gain = value - first[0]
            gain_ends = _ends(values_C - first[2], classes[0].queries_C)
        ends = _ends(values_C, classes[0].queries_C)
        bars.append(Bar(series=one, value=value, ends=ends, gain=gain, gain_ends=gain_ends))
    return bars


def _mean_of_runs(classes: Sequence[ClassFigures] | None, name: str) -> Float64 | None:
    """(C,) means over the runs; None where one lacks the figure."""
    rows = [one.rows.get(SAMPLE.name, {}) for one in classes or ()]
    if not rows or any(name not in row for row in rows):
        return None
    mean_C: Float64 = np.mean([row[name] for row in rows], axis=0)
    return mean_C


def _ends(values_C: Float64, queries_C: Float64) -> tuple[float, float] | None:
    [low], [high] = over_classes(values_C[None], queries_C)
    return None if low is None or high is None else (low, high)
