"""How far a figure may lie from where other test classes would put it.

Shapes: F figures, C test classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from namr_dist.retrieval.arrays import Float64

LEVEL = 0.95
DRAWS = 2000
"""of the test classes"""
_DRAWS_SEED = 0
_BLOCK = 2**21
"""classes drawn at a time: memory"""


def over_classes(
    value_FC: Float64, queries_C: Float64
) -> tuple[Sequence[float | None], Sequence[float | None]]:
    """(F,) lower and upper ends of the interval of level LEVEL of the mean over all queries.
    value_FC: float64, means over the queries of each class; queries_C: how many those are. None for
    a single class.

    The percentile bootstrap (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993,
    chapter 13), classes drawn with replacement. The same input gives the same ends.
    """
    figures, classes = value_FC.shape
    if classes < 2:
        return [None] * figures, [None] * figures
    interval = stats.bootstrap(
        (value_FC * queries_C, np.broadcast_to(queries_C, value_FC.shape)),
        lambda total_FC, queries_FC, axis: total_FC.sum(axis=axis) / queries_FC.sum(axis=axis),
        paired=True,
        vectorized=True,
        axis=-1,
        n_resamples=DRAWS,
        batch=max(1, _BLOCK // value_FC.size),
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(_DRAWS_SEED),
    ).confidence_interval
    return interval.low.tolist(), interval.high.tolist()
