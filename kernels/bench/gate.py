"""Who computes the right thing: every provider against the definition in float64, before anything
is timed.

Two comparisons, on the values the timed run uses, rounded to its dtype:
    the reference on the first min(B, 512) rows, always;
    all rows in float64: by the eager form, where there is one, (B, B) tensors of float64 are
    affordable and nothing is drawn, else, up to a limit, by this project's blocked PyTorch, which
    serves float64 on every device and shares no kernel with what is timed on a GPU.
Errors are relative: of the loss; of each gradient the greater of |g - g*| / |g*| in the Euclidean
norm and in the largest entry.  A NaN agrees with nothing.

Near ties.  Where a comparison decides a pair's slope (mining, a hinge, the sign in |D - η|),
rounding may decide a near tie the other way; that moves the gradient of the few rows concerned by
as much as a term's weight, in every implementation.  Up to 5 % of such a loss's rows may therefore
stand apart; they are counted in the note, and the errors are those of the other rows.  Their share
grows with B in multi-cluster ranking, where all B² pairs have a kink (two rows in 512 in float32).
A sampled loss is a mean over other draws then, hence its wider bound on the loss itself.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import eager
from .cases import LOSSES, Batch, Case, Form
from .providers import OURS, REFERENCE

GATE_ROWS = 512
EAGER_ROWS = {"cuda": 16384, "cpu": 4096}
"""Up to this batch the eager form is evaluated in float64 on all rows."""
BLOCKED_ROWS = {"cuda": 65536, "cpu": 4096}
"""Up to this batch blocked PyTorch is, where the eager form is not."""
SPARE_SHARE = 0.05
LOSS_BOUND = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}
GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 2**-7, "float16": 2**-8}
"""A gradient of a half type is itself rounded to it, and the plain forms multiply it in TF32 on a
GPU."""
_SAMPLED_LOSS_BOUND = 1e-3


@dataclass(frozen=True)
class Answer:
    """A loss and the gradients of its leaves, in float64."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of the comparisons; errors are the worst of all."""

    agrees: bool
    loss_error: float
    gradient_error: float
    apart: int
    """Rows beside a near tie, left out of the gradient's error."""


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """One true answer, and the number of rows it is for."""

    rows: int
    answer: Answer
    name: str


def answer(form: Form, batch: Batch) -> Answer:
    """Evaluate a form and its gradients on fresh copies of the leaves."""
    fresh = batch.leaf_copy()
    loss = form(fresh.labels_B, *fresh.leaves)
    gradients = torch.autograd.grad(loss, fresh.leaves)
    return Answer(loss.detach().double(), tuple(gradient.double() for gradient in gradients))


def yardsticks(case: Case, batch: Batch) -> list[Yardstick]:
    """The true answers for a case."""
    exact = batch.leaf_copy(torch.float64)
    rows = min(case.rows, GATE_ROWS)
    sticks = [
        Yardstick(
            rows=rows, answer=answer(REFERENCE[case.loss], exact.head(rows)), name="reference"
        )
    ]
    kind = torch.device(case.device).type
    if rows == case.rows or case.rows > BLOCKED_ROWS[kind]:
        return sticks
    if case.rows <= EAGER_ROWS[kind] and case.loss in eager.FORMS and not LOSSES[case.loss].sampled:
        form, name = eager.FORMS[case.loss], "eager float64"
    else:
        form, name = OURS[case.loss], "blocked float64"
    with contextlib.suppress(torch.OutOfMemoryError):  # the comparison on few rows remains
        sticks.append(Yardstick(rows=case.rows, answer=answer(form, exact), name=name))
    return sticks


def judge(form: Form, case: Case, batch: Batch, against: list[Yardstick]) -> Verdict:
    """Compare a form with every yardstick."""
    loss = LOSSES[case.loss]
    loss_bound = max(LOSS_BOUND[case.dtype], _SAMPLED_LOSS_BOUND if loss.sampled else 0.0)
    gradient_bound = GRADIENT_BOUND[case.dtype]
    loss_errors, gradient_errors, apart = [], [], 0
    for yardstick in against:
        got, want = answer(form, batch.head(yardstick.rows)), yardstick.answer
        loss_errors.append(_relative((got.loss - want.loss).abs(), want.loss.abs()))
        spare = math.ceil(SPARE_SHARE * yardstick.rows) if loss.kinked else 0
        for g, g_true in zip(got.gradients, want.gradients, strict=True):
            if g.dim() == 2:
                keep = _keep(g, g_true, bound=gradient_bound, spare=spare)
                apart += int((~keep).sum())
                g, g_true = g[keep], g_true[keep]
            gradient_errors.append(_relative((g - g_true).norm(), g_true.norm()))
            gradient_errors.append(_relative((g - g_true).abs().max(), g_true.abs().max()))
    worst_loss, worst_gradient = _worst(loss_errors), _worst(gradient_errors)
    return Verdict(
        agrees=worst_loss <= loss_bound and worst_gradient <= gradient_bound,
        loss_error=worst_loss,
        gradient_error=worst_gradient,
        apart=apart,
    )


def _keep(got_BD: Tensor, want_BD: Tensor, *, bound: float, spare: int) -> Tensor:
    """Mask of the rows to compare: all, unless at most `spare` of them, all finite, lie beyond the
    bound."""
    beyond_B = ~((got_BD - want_BD).abs().amax(1) <= bound * want_BD.abs().max())
    spared = int(beyond_B.sum()) <= spare and bool(got_BD.isfinite().all())
    return ~beyond_B if spared else torch.ones_like(beyond_B)


def _relative(error: Tensor, size: Tensor) -> float:
    return float(error / size.clamp_min(torch.finfo(torch.float64).tiny))


def _worst(errors: list[float]) -> float:
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)
