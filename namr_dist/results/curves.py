"""Charts of training: losses and validation over steps, of one run or of several in one chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from namr_dist.results.charts import Line, line_chart, smoothed, thinned
from namr_dist.results.record import number_in
from namr_dist.run.log import Entry

_POINTS_OF_EACH = 200
"""of a curve among several"""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the page with its heading and the one thing to know about it."""

    heading: str
    note: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What one run logged, for a chart that it shares with others."""

    name: str
    css: str
    steps: Sequence[Entry]
    """lines of training steps"""
    validations: Sequence[Entry]


def run_charts(steps: Sequence[Entry], validations: Sequence[Entry]) -> Iterator[Chart]:
    """The charts of one run."""
    panels = [
        ("metric_loss", "Metric loss", "c0"),
        ("ranking_loss", "Multi-cluster ranking loss", "c1"),
        ("structure_loss", "Loss of the learnt centres", "c2"),
    ]
    if not any(key in entry for entry in steps for key, _, _ in panels):
        panels = [("loss", "Training loss", "c0")]
    for key, heading, css in panels:
        xs, ys = _logged(steps, key)
        lines = [
            Line(name="each step", xs=thinned(xs), ys=thinned(ys), css=f"{css} faint"),
            Line(name="smoothed", xs=thinned(xs), ys=thinned(smoothed(ys)), css=css),
        ]
        svg = line_chart(
            lines, title=f"{heading} over training steps", x_label="step", allow_log=True
        )
        if svg is not None:
            note = "Pale: as logged. Strong: moving average. Lower is better."
            yield Chart(heading=heading, note=note, svg=svg)
    curves = [
        _validation_line(validations, name, css=css, name=name, label=True)
        for css, name in (("c0", "R@1"), ("c1", "MAP@R"))
    ]
    svg = line_chart(
        curves, title="Validation R@1 and MAP@R over training steps, %", x_label="step"
    )
    if svg is not None:
        note = "On classes that were not trained on. Higher is better."
        yield Chart(heading="Validation, %", note=note, svg=svg)


def overlaid_charts(runs: Sequence[Curves], figures: Sequence[str]) -> Iterator[Chart]:
    """The charts of several runs: their loss, and each figure of validation."""
    key, heading = "metric_loss", "Metric loss"
    if not any(key in entry for run in runs for entry in run.steps):
        key, heading = "loss", "Training loss"
    lines = []
    for run in runs:
        xs, ys = _logged(run.steps, key)
        lines.append(
            Line(
                name=run.name,
                xs=thinned(xs, _POINTS_OF_EACH),
                ys=thinned(smoothed(ys), _POINTS_OF_EACH),
                css=run.css,
            )
        )
    svg = line_chart(lines, title=f"{heading} over training steps", x_label="step", allow_log=True)
    if svg is not None:
        note = "Moving average. Losses of different kinds have different scales."
        yield Chart(heading=heading, note=note, svg=svg)
    for figure in figures:
        curves = [
            _validation_line(run.validations, figure, css=run.css, name=run.name) for run in runs
        ]
        svg = line_chart(
            curves, title=f"Validation {figure} over training steps, %", x_label="step"
        )
        if svg is not None:
            note = "On classes that were not trained on. Higher is better."
            yield Chart(heading=f"Validation {figure}, %", note=note, svg=svg)


def _logged(steps: Sequence[Entry], key: str) -> tuple[list[float], list[float]]:
    """Steps and the values of a field, NaN where it has none."""
    values = [number_in(entry, key) for entry in steps]
    return (
        [float(entry["step"]) for entry in steps],
        [math.nan if value is None else value for value in values],
    )


def _validation_line(
    validations: Sequence[Entry], figure: str, *, css: str, name: str, label: bool = False
) -> Line:
    pairs = [(float(entry["step"]), number_in(entry["val"], figure)) for entry in validations]
    known = [(step, value) for step, value in pairs if value is not None]
    return Line(
        name=name,
        xs=[step for step, _ in known],
        ys=[value for _, value in known],
        css=css,
        dots=True,
        label=label,
    )
