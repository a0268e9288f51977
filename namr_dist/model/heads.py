"""The two heads: pooled features → sample embedding z and structure embedding s.

Shapes: b rows, F pooled features, D embedding width. Formulas: docs/algorithm.md, "Heads".
"""

from __future__ import annotations

from torch import Tensor, nn

from namr_dist.parallel.batchnorm import GlobalBatchNorm


class SampleHead(nn.Linear):
    """(b, F) → z (b, D), one linear map; z is not normalised."""


class StructureHead(nn.Module):
    """(b, F) → s (b, D): one positive weight per dimension of z, each within 1 ± `delta`.

    Two linear maps, each followed by batch norm over the global batch, with nothing between them.
    Without the batch norms, s would stay alike for all images and carry nothing.
    """

    def __init__(self, features: int, width: int, *, hidden: int, delta: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            GlobalBatchNorm(hidden),
            nn.Linear(hidden, width),
            GlobalBatchNorm(width),
        )
        self.delta = delta

    def forward(self, features_bF: Tensor) -> Tensor:
        """(b, F) → s (b, D). In training all ranks call it together, for the batch norms."""
        u_bD = self.layers(features_bF)
        return 1 + self.delta * (2 * u_bD.sigmoid() - 1)
