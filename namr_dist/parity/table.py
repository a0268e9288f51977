"""Parity: the same loss and the same parameter gradients, however a batch is cut among ranks and
whoever reduces them.

One process without any wrapper is the yardstick: TrainingModule on a fixed batch, forward and
backward. Every other way of running the same batch is measured against it by one number for the
loss and one for the gradients:

    loss       |L - L₁| / |L₁|, the worst rank
    gradients  the largest ‖g - g₁‖ / ‖g₁‖ over all trainable parameters (network, β, proxies,
               learnt centres)

A parameter whose true gradient is 0 has no size of its own to compare with (the bias of the sample
head under losses that see only differences, a linear map's bias before batch norm, the structure
head without NAMR). For those, and only those, ‖g₁‖ is that of the whole gradient. Which they are is
read off one process in float64.

Bounds. Where everything is float64: 1e-10. DeepSpeed keeps and averages gradients in float32 even
if parameters are float64: 1e-6 for ZeRO, the network and the loss still computed in float64. A
float32 network rounds: one process is itself `rounding` away from float64, two ways of adding up
may differ by twice that, and batch norm makes it more than 1e-6; hence the larger of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import get_args

import numpy as np

from namr_dist.config import ModelConfig
from namr_dist.losses.centres import CentresObjective
from namr_dist.parallel.pool import Ranks
from namr_dist.parity.steps import (
    LOSSES,
    Case,
    Precision,
    Step,
    Way,
    step_alone,
    step_by_definition,
    step_on_rank,
)

ENGINES: tuple[Way, ...] = ("DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")
WORLD_SIZES = (1, 2, 4)
PRECISIONS: tuple[Precision, ...] = ("float64", "float32")

LEARNT: dict[str, CentresObjective] = dict(
    zip(LOSSES, itertools.cycle(get_args(CentresObjective)), strict=False)
)
"""What centres are learnt by in each loss's cases with NAMR, so that it takes no further cases."""

_ZERO = 1e-9
"""A gradient below this share of the whole one is rounding, in float64."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far a step is from another one, relative, as the module's text defines it."""

    loss: float
    gradient: float
    worst: str
    """The parameter that `gradient` is from."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A case, measured."""

    case: Case
    errors: Errors
    rounding: Errors | None
    """One float32 process against float64; None for float64 cases."""

    @property
    def loss_bound(self) -> float:
        """Largest error of the loss that counts as equal."""
        return 1e-10 if self.rounding is None else max(1e-6, 2 * self.rounding.loss)

    @property
    def gradient_bound(self) -> float:
        """Largest error of a gradient that counts as equal."""
        if self.rounding is not None:
            return max(1e-6, 2 * self.rounding.gradient)
        return 1e-6 if self.case.way.startswith("ZeRO") else 1e-10

    @property
    def good(self) -> bool:
        """True if both errors are within their bounds."""
        return self.errors.loss <= self.loss_bound and self.errors.gradient <= self.gradient_bound


def all_cases() -> list[Case]:
    """The whole table, by number of ranks."""
    ways: list[tuple[Way, int]] = [
        ("definition", 1),
        *((way, ranks) for ranks, way in itertools.product(WORLD_SIZES, ENGINES)),
    ]
    return [
        Case(
            loss=loss,
            namr=namr,
            way=way,
            ranks=ranks,
            dtype=dtype,
            learnt=LEARNT[loss] if namr else None,
        )
        for (way, ranks), loss, namr, dtype in itertools.product(
            ways, LOSSES, (True, False), PRECISIONS
        )
    ]


def measure(cases: Sequence[Case], pool: Ranks | None) -> Iterator[Verdict]:
    """Run the cases, one after the other, on a pool of as many ranks as they have (None: this
    process alone)."""
    for case in cases:
        assert case.ranks == (pool.world_size if pool else 1)
        yield judge(case, pool(step_on_rank, case) if pool else [step_by_definition(case)])


def judge(case: Case, steps: Sequence[Step]) -> Verdict:
    """The ranks' steps against one process."""
    exact, alone = (
        _alone(case.loss, case.namr, case.learnt, dtype, case.model)
        for dtype in ("float64", case.dtype)
    )
    errors = compare(steps[0], alone, exact=exact)
    loss = float(np.max([abs(step.loss / alone.loss - 1) for step in steps]))  # NaN, if one is
    rounding = compare(alone, exact, exact=exact) if case.dtype == "float32" else None
    return Verdict(
        case=case,
        errors=Errors(loss=loss, gradient=errors.gradient, worst=errors.worst),
        rounding=rounding,
    )


def compare(step: Step, other: Step, *, exact: Step) -> Errors:
    """One step against another; `exact` tells which gradients are 0 but for rounding."""
    if step.gradients.keys() != other.gradients.keys():
        return Errors(loss=float("inf"), gradient=float("inf"), worst="other parameters")
    whole = float(np.sqrt(sum(np.square(value).sum() for value in exact.gradients.values())))
    errors = {}
    for name, value in other.gradients.items():
        size = (
            np.linalg.norm(value)
            if np.linalg.norm(exact.gradients[name]) > _ZERO * whole
            else whole
        )
        errors[name] = float(np.linalg.norm(step.gradients[name] - value) / size)
    # A NaN is the worst there is, and max() would pass it over.
    worst = max(
        errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf")
    )
    return Errors(loss=abs(step.loss / other.loss - 1), gradient=errors[worst], worst=worst)


@cache
def _alone(
    loss: str, namr: bool, learnt: CentresObjective | None, dtype: Precision, model: ModelConfig
) -> Step:
    """The yardstick."""
    return step_alone(
        Case(
            loss=loss,
            namr=namr,
            learnt=learnt,
            way="definition",
            ranks=1,
            dtype=dtype,
            model=model,
        )
    )
