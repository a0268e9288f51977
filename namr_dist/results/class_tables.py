"""The figures of each class and each super-class as rows of tables, the worst first.

Figures are in percent, means over queries of the sample mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from namr_dist.results.class_figures import ClassFigures
from namr_dist.results.searches import worst_classes
from namr_dist.retrieval.intervals import over_classes
from namr_dist.retrieval.modes import SAMPLE

FIGURES = ("R@1", "MAP@R")
LEAST_CLASSES = 5
"""of a super-class that gets an interval: it is drawn from them"""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class."""

    title: str
    """its name and number"""
    category: str
    queries: int
    figures: tuple[float, ...]
    """in the order of FIGURES"""
    taken_for: str
    """the class that most of its wrong first neighbours are of, and how many; "" where none is
    wrong"""


@dataclass(frozen=True, kw_only=True)
class CategoryRow:
    """One super-class."""

    name: str
    classes: int
    queries: int
    figures: tuple[float, ...]
    intervals: tuple[tuple[float, float] | None, ...]
    """over its classes, in the order of FIGURES"""


def class_rows(
    figures: ClassFigures,
    others: Mapping[int, tuple[int, int]],
    title: Callable[[int], str],
    category_of: Mapping[int, str],
    *,
    most: int,
) -> list[ClassRow]:
    """The worst classes, `most` of them. others: as `searches.taken_for` gives them; title: a
    class's name from its label."""
    rows = []
    for place in worst_classes(figures)[:most]:
        label = figures.label_C[place]
        other, count = others.get(label, (None, 0))
        rows.append(
            ClassRow(
                title=title(label),
                category=category_of.get(label, ""),
                queries=int(figures.queries_C[place]),
                figures=tuple(float(figures.rows[SAMPLE.name][name][place]) for name in FIGURES),
                taken_for="" if other is None else f"{title(other)}, {count} ×",
            )
        )
    return rows


def category_rows(figures: ClassFigures, category_of: Mapping[int, str]) -> list[CategoryRow]:
    """Every super-class, by R@1, then MAP@R, then name; classes without one are left out."""
    of_class = np.array([category_of.get(label, "") for label in figures.label_C])
    value_FC = np.stack([figures.rows[SAMPLE.name][name] for name in FIGURES])
    rows = []
    for name in sorted(set(of_class.tolist()) - {""}):
        inside_C = of_class == name
        queries_C, values_FC = figures.queries_C[inside_C], value_FC[:, inside_C]
        intervals: tuple[tuple[float, float] | None, ...] = (None,) * len(FIGURES)
        if len(queries_C) >= LEAST_CLASSES:
            intervals = tuple(
                None if low is None or high is None else (low, high)
                for low, high in zip(*over_classes(values_FC, queries_C), strict=True)
            )
        rows.append(
            CategoryRow(
                name=name,
                classes=len(queries_C),
                queries=int(queries_C.sum()),
                figures=tuple(np.average(values_FC, axis=1, weights=queries_C).tolist()),
                intervals=intervals,
            )
        )
    return sorted(rows, key=lambda row: (*row.figures, row.name))
