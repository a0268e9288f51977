"""One rank's rows among all, what a loss on them has to offer, and losses whose gradients are
known.

Shapes: b rows of this rank, B rows of all ranks, N candidates, D width, W ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from namr_dist import kernels


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a rank needs to know of a batch to compute its loss, and the gradient of its own rows,
    by itself."""

    z_bD: Tensor
    """This rank's embeddings, the same as z_ND[offset : offset + b]."""
    labels_b: Tensor
    z_ND: Tensor
    """The embeddings of all ranks, in the order of ranks, and behind them those of a memory, if
    there is one."""
    labels_N: Tensor
    offset: int = 0
    gather: kernels.Gather = kernels.alone
    """(b, …) of this rank → (B, …) of all."""
    gather_one: kernels.Gather = kernels.alone
    """(1, …) of each rank → (W, …)."""
    ranks: int = 1
    """W."""

    def unit(self) -> Rows:
        """The same with rows of length 1."""
        return replace(self, z_bD=kernels.unit_rows(self.z_bD), z_ND=kernels.unit_rows(self.z_ND))


@dataclass(frozen=True, kw_only=True)
class ScaledRows:
    """Rows divided by the mean pairwise distance of the batch: distances in units of their mean."""

    rows: Rows
    mean: Tensor
    """What they were divided by; 1 where all rows are equal."""
    grad_mean_bD: Tensor
    """The gradient of that mean for this rank's rows."""

    def through(self, grad_x_bD: Tensor) -> Tensor:
        """Gradient for the scaled rows → gradient for the rows before, both (b, D). Ranks exchange
        one number each."""
        # x = z / m(z) with every row's gradient g for x gives (g - (Σ g·x) dm/dz) / m.
        pull = self.rows.gather_one((grad_x_bD * self.rows.z_bD).sum()[None]).sum()
        return (grad_x_bD - pull * self.grad_mean_bD) / self.mean


def scaled_rows(rows: Rows, *, batch: int) -> ScaledRows:
    """The rows divided by the mean pairwise distance of the first `batch` candidates: those of the
    batch, and not of a memory."""
    mean, grad_mean_bD = kernels.mean_distance_of_rows(
        rows.z_bD, rows.z_ND[:batch], offset=rows.offset, gather=rows.gather, with_grad=True
    )
    mean = mean.where(mean > 0, 1.0)
    assert grad_mean_bD is not None
    return ScaledRows(
        rows=replace(rows, z_bD=rows.z_bD / mean, z_ND=rows.z_ND / mean),
        mean=mean,
        grad_mean_bD=grad_mean_bD,
    )


def all_rows(z_BD: Tensor, labels_B: Tensor) -> Rows:
    """The rows of a batch that one process holds by itself."""
    return Rows(z_bD=z_BD, labels_b=labels_B, z_ND=z_BD, labels_N=labels_B)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What is known of all batches that a loss will meet, before the first."""

    classes: int
    """Training classes: labels are 0..classes-1."""
    images_per_class: int
    """K: rows of a class in a batch."""
    width: int
    """D."""
    memory: bool = False
    """Rows of earlier batches may be candidates too."""

    @property
    def most_positives(self) -> int | None:
        """Of any row; None where a class may stand any number of times, as in a memory."""
        return None if self.memory else self.images_per_class - 1


class RowsLoss(nn.Module, ABC):
    """A metric loss of one rank's rows among all ranks'.

    Its gradient is computed with the loss; what the loss itself carries to autograd is the gradient
    of the module's own parameters (β, proxies). `train.objective.Objective` makes one
    differentiable loss of these.
    """

    @classmethod
    @abstractmethod
    def configured(cls, settings: Any, batches: Batches) -> RowsLoss:
        """The loss with its section of the configuration."""

    @abstractmethod
    def forward(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor]:
        """The loss of the whole batch, carrying this rank's share of the gradient for the module's
        parameters, and its gradient for rows.z_bD, (b, D). seed: of what is drawn at random, the
        same on all ranks."""

    @abstractmethod
    def definition(self, x_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """The loss of a whole batch as defined in kernels.reference, differentiable by autograd;
        for checks.

        x_BD: as rows.z_bD, scaled to mean pairwise distance 1.
        """


def through_unit_rows(z_bD: Tensor, grad_x_bD: Tensor) -> Tensor:
    """Gradient for x = z / ‖z‖ → gradient for z, both (b, D)."""
    with torch.enable_grad():
        z_bD = z_bD.detach().requires_grad_()
        return torch.autograd.grad(kernels.unit_rows(z_bD), z_bD, grad_x_bD.to(z_bD.dtype))[0]


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, *pairs: Tensor) -> Tensor:
        tensors, gradients = pairs[::2], pairs[1::2]
        ctx.save_for_backward(
            *(gradient.to(of.dtype) for of, gradient in zip(tensors, gradients, strict=True))
        )
        return value.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        return None, *(part for gradient in saved for part in (grad * gradient, None))


def with_gradients(value: Tensor, *known: tuple[Tensor, Tensor]) -> Tensor:
    """`value`, a scalar, with its gradient for each tensor given beside that tensor; first order
    only."""
    return _WithGradients.apply(value, *(tensor for pair in known for tensor in pair))
