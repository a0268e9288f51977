"""The figures of each test class, classes.json, and what follows from them: intervals over classes.

Shapes: C test classes that have queries, F figures. Figures are in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from namr_dist import verified_json
from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float64
from namr_dist.retrieval.intervals import over_classes
from namr_dist.run.folder import METRICS

ROUNDED = 0.01
"""Percentage points by which the mean of classes' figures, which are rounded, may differ from
that of all queries."""
_LARGEST = 1e15
"""of a percentage or a count: sums of more are not worth having"""

Intervals = dict[str, dict[str, tuple[float, float]]]
"""row of metrics.json → figure → lower and upper end, of level intervals.LEVEL"""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassFigures:
    """Means over the queries of each class."""

    label_C: tuple[int, ...]
    queries_C: Float64
    """(C,) whole numbers"""
    rows: Mapping[str, Mapping[str, Float64]]
    """row of metrics.json → figure → (C,)"""

    def mean(self, row: str, name: str) -> float:
        """A figure over all queries."""
        return float(np.average(self.rows[row][name], weights=self.queries_C))

    def difference(self, row: str, other: str, name: str) -> tuple[float, float] | None:
        """The interval of a figure of a row less that of another, class by class; None where it is
        not known of both, or of a single class."""
        one, two = (self.rows.get(each, {}).get(name) for each in (row, other))
        if one is None or two is None:
            return None
        [low], [high] = over_classes((one - two)[None], self.queries_C)
        return None if low is None or high is None else (low, high)

    def intervals(self) -> Intervals:
        """Of every figure; none of a single class."""
        result: Intervals = {}
        for row, figures in self.rows.items():
            if not figures:
                continue
            low_F, high_F = over_classes(np.stack(list(figures.values())), self.queries_C)
            result[row] = {
                name: (low, high)
                for name, low, high in zip(figures, low_F, high_F, strict=True)
                if low is not None and high is not None
            }
        return result


def read_class_figures(path: Path, test: Mapping[str, Any]) -> ClassFigures:
    """The figures by class of the rows in `test`, that block of the run's metrics.json.

    Raises InputError if the file does not hold such figures, or if they are not those of the same
    evaluation.
    """
    where, again = str(path), "evaluate it again"
    by_class = verified_json.loads_object(path.read_bytes(), where, again)
    try:
        label_C = tuple(int(label) for label in by_class["label"])
        queries_C = np.asarray(by_class["queries"], dtype=np.float64)
        rows = {
            row: {
                name: np.asarray(values, dtype=np.float64) for name, values in by_class[row].items()
            }
            for row, whole in test.items()
            if row in by_class and isinstance(whole, Mapping)
        }
        columns = [queries_C, *(values_C for row in rows.values() for values_C in row.values())]
        if {len(values_C) for values_C in columns} != {len(label_C)}:
            raise ValueError(f"{len(label_C)} labels, {len(queries_C)} numbers of queries")
        if any(values_C.ndim != 1 or not (abs(values_C) < _LARGEST).all() for values_C in columns):
            raise ValueError("what should be a number is none, or is far too large")
        if len(set(label_C)) != len(label_C) or not (queries_C >= 1).all():
            raise ValueError("a label stands twice, or a class without queries")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{where} does not hold figures by class ({type(error).__name__}: {error}); {again}"
        ) from None
    figures = ClassFigures(label_C=label_C, queries_C=queries_C, rows=rows)
    for row, names in rows.items():
        for name in names:
            whole = test[row].get(name)
            if not is_number(whole):
                continue
            mean = figures.mean(row, name)
            if not abs(mean - whole) <= ROUNDED:
                raise InputError(
                    f"{where} has {name} {mean:.3f} in row {row}, {METRICS} {whole:.3f}: they "
                    f"are of two evaluations; {again}"
                )
    return figures


def is_number(value: Any) -> bool:
    """Whether a figure is one, and finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
