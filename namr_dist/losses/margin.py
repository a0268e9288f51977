"""Margin loss of one rank's rows among all, with its learnt boundary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.losses.registry import MarginConfig
from namr_dist.losses.rows import Batches, Rows, RowsLoss, through_unit_rows, with_gradients


class MarginRows(RowsLoss):
    """Margin loss on unit vectors with distance-weighted negatives (Wu et al. 2017).

    alpha: half the gap between positives and negatives.
    beta: first value of the distance between the two, a learnt scalar (float32 parameter `beta`).
    most_positives: as in `TripletRows`.
    """

    def __init__(
        self, *, alpha: float = 0.2, beta: float = 1.2, most_positives: int | None = None
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.most_positives = most_positives
        # One element, not a scalar: DeepSpeed cannot broadcast a parameter without dimensions.
        self.beta = nn.Parameter(torch.full((1,), float(beta)))

    @classmethod
    def configured(cls, settings: MarginConfig, batches: Batches) -> MarginRows:
        """From loss.margin; positives are counted only where a memory makes their number open."""
        return cls(alpha=settings.alpha, beta=settings.beta, most_positives=batches.most_positives)

    def forward(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor]:
        """The batch's loss, carrying this rank's share of the gradient for β, and its gradient for
        rows.z_bD, of any length. seed: picks the sampled negatives."""
        unit = rows.unit()
        loss, grad_x_bD, grad_beta = kernels.margin_of_rows(
            unit.z_bD,
            unit.labels_b,
            unit.z_ND,
            unit.labels_N,
            self.beta.detach(),
            offset=unit.offset,
            gather=unit.gather,
            alpha=self.alpha,
            seed=seed,
            most_positives=self.most_positives,
            with_grad=True,
        )
        return with_gradients(loss, (self.beta, grad_beta)), through_unit_rows(rows.z_bD, grad_x_bD)

    def definition(self, x_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """Of the rows at length 1; differentiable in β too. seed: picks the sampled negatives."""
        unit_BD = nn.functional.normalize(x_BD, dim=1)
        return reference.margin_loss(unit_BD, labels_B, alpha=self.alpha, beta=self.beta, seed=seed)

    def extra_repr(self) -> str:
        """The settings, for repr(); β, which is learnt, is none."""
        return f"alpha={self.alpha}"
