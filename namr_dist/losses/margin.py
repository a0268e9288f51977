"""Margin loss as a module, with its learnt boundary."""

import torch
from torch import Tensor, nn

from namr_dist import kernels


class MarginLoss(nn.Module):
    """Margin loss on unit vectors with distance-weighted negatives (Wu et al. 2017).

    alpha: half the gap between positives and negatives.
    beta: first value of the distance between the two, a learnt scalar (float32 parameter `beta`).
    most_positives: as in `TripletLoss`.
    """

    def __init__(self, *, alpha: float = 0.2, beta: float = 1.2, most_positives: int | None = None) -> None:
        super().__init__()
        self.alpha = alpha
        self.most_positives = most_positives
        # One element, not a scalar: DeepSpeed cannot broadcast a parameter without dimensions.
        self.beta = nn.Parameter(torch.full((1,), float(beta)))

    def forward(self, z_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """z_BD: floating (B, D), any length.  labels_B: integers.  seed: picks the sampled negatives."""
        return kernels.margin_loss(
            kernels.unit_rows(z_BD), labels_B, beta=self.beta, alpha=self.alpha, seed=seed,
            most_positives=self.most_positives)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
