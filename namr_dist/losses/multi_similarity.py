"""Multi-similarity loss as a module."""

from torch import Tensor, nn

from namr_dist import kernels


class MultiSimilarityLoss(nn.Module):
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

    def forward(self, z_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """z_BD: floating (B, D), any length.  labels_B: integers.  seed: not used, nothing is sampled."""
        return kernels.multi_similarity_loss(
            kernels.unit_rows(z_BD),
            labels_B,
            alpha=self.alpha,
            beta=self.beta,
            base=self.base,
            epsilon=self.epsilon,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}, epsilon={self.epsilon}"
