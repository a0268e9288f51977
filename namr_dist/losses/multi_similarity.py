"""Multi-similarity loss of one rank's rows among all."""

from __future__ import annotations

from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.losses.registry import MultiSimilarityConfig
from namr_dist.losses.rows import Batches, Rows, RowsLoss, through_unit_rows


class MultiSimilarityRows(RowsLoss):
    """Multi-similarity loss on unit vectors with its own pair mining (Wang et al. 2019).

    alpha, beta: sharpness on positives and on negatives.
    base: the similarity around which pairs are weighted (λ in docs/algorithm.md).
    epsilon: how far past the hardest opposite pair a pair is still mined.
    """

    def __init__(
        self, *, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float = 0.1
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.epsilon = epsilon

    @classmethod
    def configured(cls, settings: MultiSimilarityConfig, batches: Batches) -> MultiSimilarityRows:
        """From loss.multi_similarity; nothing of the batches is needed."""
        return cls(
            alpha=settings.alpha, beta=settings.beta, base=settings.base, epsilon=settings.epsilon
        )

    def forward(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor]:
        """The batch's loss and its gradient for rows.z_bD, of any length. seed: not used, nothing
        is sampled."""
        unit = rows.unit()
        loss, grad_x_bD = kernels.multi_similarity_of_rows(
            unit.z_bD,
            unit.labels_b,
            unit.z_ND,
            unit.labels_N,
            offset=unit.offset,
            gather=unit.gather,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            epsilon=self.epsilon,
            with_grad=True,
        )
        return loss, through_unit_rows(rows.z_bD, grad_x_bD)

    def definition(self, x_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """Of the rows at length 1. seed: not used."""
        return reference.multi_similarity_loss(
            nn.functional.normalize(x_BD, dim=1),
            labels_B,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            epsilon=self.epsilon,
        )

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}, epsilon={self.epsilon}"
