"""What multi-cluster ranking and the structure embedding add to each loss: means, and differences
that are paired by seed, with 95 % intervals over seeds and over test classes.

A difference is always taken within a seed, where both sides saw the same batches from the same
first weights. Its interval over seeds is Student's, of the paired differences; that over classes is
the bootstrap of retrieval/intervals.py, of the mean over seeds. Figures are in percent.

Shapes: F figures, C test classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from namr_dist.errors import InputError
from namr_dist.reproduce.cells import ALONE, FIGURES, RANKING, Cell, CellName
from namr_dist.retrieval.intervals import LEVEL, over_classes
from namr_dist.retrieval.modes import SAMPLE, STRUCTURE, row_name

Side = tuple[str, str]
"""(variant of the network, row of its figures)"""
_SHUFFLED = row_name(STRUCTURE.name, "shuffled")

QUANTITIES: dict[str, Side] = {
    "alone": (ALONE, SAMPLE.name),
    "ranking": (RANKING, SAMPLE.name),
    "structure": (ALONE, STRUCTURE.name),
    "namr": (RANKING, STRUCTURE.name),
}
"""What is compared. With s = 1, which "one" stands for, the structure row is the sample row of the
same network."""
DIFFERENCES: dict[str, tuple[Side, Side]] = {
    "namr - alone": (QUANTITIES["namr"], QUANTITIES["alone"]),
    "ranking - alone": (QUANTITIES["ranking"], QUANTITIES["alone"]),
    "structure - one": (QUANTITIES["structure"], QUANTITIES["alone"]),
    "structure - shuffled": (QUANTITIES["structure"], (ALONE, _SHUFFLED)),
    "namr - ranking": (QUANTITIES["namr"], QUANTITIES["ranking"]),
    "namr - shuffled": (QUANTITIES["namr"], (RANKING, _SHUFFLED)),
}
GAIN, OVER_CLASSES = "gain", "gain over classes"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its interval of level LEVEL."""

    mean: float
    low: float | None = None
    """None where nothing can be known of it: of a single seed, or a single class"""
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A difference, over the seeds that both sides have."""

    seeds: tuple[int, ...]
    over_seeds: dict[str, Interval]
    """by figure"""
    over_classes: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class LossGains:
    """All that was measured of one loss. What no cell has is left out."""

    loss: str
    seeds: dict[str, tuple[int, ...]]
    """of each variant of the network"""
    means: dict[str, dict[str, Interval]]
    """by name in QUANTITIES, then by rival, then by `with_structure` of a rival, and by figure"""
    gains: dict[str, Gain]
    """by name in DIFFERENCES, then "RIVAL - alone", then the same with structure"""

    @property
    def rivals(self) -> list[str]:
        """The regularisers in place of the ranking."""
        return [variant for variant in self.seeds if variant not in (ALONE, RANKING)]


def with_structure(variant: str) -> str:
    """The name of a variant's figures with the structure embedding."""
    return "namr" if variant == RANKING else f"{variant} + structure"


def gains(cells: Sequence[Cell]) -> list[LossGains]:
    """The statistics of each loss, in the order of its first cell. `cells`: as `read_cells` gives
    them.

    Raises InputError for a variant whose name is taken.
    """
    losses = dict.fromkeys(cell.name.loss for cell in cells)
    return [_of_loss(loss, [cell for cell in cells if cell.name.loss == loss]) for loss in losses]


def missing(cells: Sequence[Cell]) -> list[CellName]:
    """What the grid of these cells' losses, variants and seeds lacks."""
    names = [cell.name for cell in cells]
    grid = itertools.product(
        dict.fromkeys(name.loss for name in names),
        dict.fromkeys(name.variant for name in names),
        sorted({name.seed for name in names}),
    )
    wanted = [CellName(loss=loss, variant=variant, seed=seed) for loss, variant, seed in grid]
    return [name for name in wanted if name not in names]


def as_json(every: Sequence[LossGains]) -> dict[str, Any]:
    """{LOSS: {QUANTITY or RIVAL: {FIGURE: [mean, low, high]}, GAIN: {DIFFERENCE: …}, OVER_CLASSES:
    …}}; low and high are None where there is no interval."""
    return {
        one.loss: {
            **{name: _lists(of_figures) for name, of_figures in one.means.items()},
            GAIN: {name: _lists(gain.over_seeds) for name, gain in one.gains.items()},
            OVER_CLASSES: {name: _lists(gain.over_classes) for name, gain in one.gains.items()},
        }
        for one in every
    }


def _lists(of_figures: Mapping[str, Interval]) -> dict[str, list[float | None]]:
    return {name: [one.mean, one.low, one.high] for name, one in of_figures.items()}


def _of_loss(loss: str, cells: Sequence[Cell]) -> LossGains:
    by_variant: dict[str, dict[int, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.name.seed):
        by_variant.setdefault(cell.name.variant, {})[cell.name.seed] = cell
    order = [ALONE, RANKING]
    rivals = sorted(by_variant.keys() - set(order))
    for variant in rivals:
        if variant in (*QUANTITIES, GAIN, OVER_CLASSES):
            cell = next(iter(by_variant[variant].values()))
            raise InputError(
                f"{cell.folder} is of the variant {variant!r}, which is the name of something else; give "
                "it another"
            )
    of_rivals = {rival: (rival, SAMPLE.name) for rival in rivals}
    of_rivals |= {with_structure(rival): (rival, STRUCTURE.name) for rival in rivals}
    quantities = QUANTITIES | of_rivals
    differences = DIFFERENCES | {
        f"{name} - alone": (side, quantities["alone"]) for name, side in of_rivals.items()
    }

    def measured(side: Side) -> dict[int, Cell]:
        variant, row = side
        of_variant = by_variant.get(variant, {})
        return {seed: cell for seed, cell in of_variant.items() if row in cell.test}

    means = {
        name: {
            figure: over_seeds([cell.test[side[1]][figure] for cell in measured(side).values()])
            for figure in FIGURES
        }
        for name, side in quantities.items()
        if measured(side)
    }
    every: dict[str, Gain] = {}
    for name, (side, other) in differences.items():
        new, old = measured(side), measured(other)
        if seeds := tuple(seed for seed in new if seed in old):
            every[name] = _gain(
                [(new[seed], old[seed]) for seed in seeds], seeds, side[1], other[1]
            )
    return LossGains(
        loss=loss,
        seeds={
            variant: tuple(by_variant[variant])
            for variant in (*order, *rivals)
            if variant in by_variant
        },
        means=means,
        gains=every,
    )


def _gain(
    pairs: Sequence[tuple[Cell, Cell]], seeds: tuple[int, ...], row: str, other_row: str
) -> Gain:
    by_seed = {
        figure: over_seeds(
            [new.test[row][figure] - old.test[other_row][figure] for new, old in pairs]
        )
        for figure in FIGURES
    }
    difference_FC = np.mean(
        [
            [new.classes[row][figure] - old.classes[other_row][figure] for figure in FIGURES]
            for new, old in pairs
        ],
        axis=0,
    )
    low_F, high_F = over_classes(difference_FC, pairs[0][0].queries_C)
    return Gain(
        seeds=seeds,
        over_seeds=by_seed,
        # The same quantity, so the same mean, which classes' figures only have rounded.
        over_classes={
            figure: Interval(mean=by_seed[figure].mean, low=low, high=high)
            for figure, low, high in zip(FIGURES, low_F, high_F, strict=True)
        },
    )


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean ± t s / √n of n values, where s is their sample standard deviation and t Student's
    quantile for n − 1 degrees of freedom. Alike values have an interval of length 0."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean=mean)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean=mean, low=mean - half, high=mean + half)
