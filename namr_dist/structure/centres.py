"""The structure embedding from cluster centres: where an image lies among M clusters of the
training embeddings. Formulas: docs/algorithm.md, "The structure embedding".

Shapes: b rows, M centres, D width, k nearest centres, N training rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.parallel.ranks import rank_number, world_size
from namr_dist.structure.k_means import k_means, starting_rows

MOST_CENTRES = 512
ROWS_A_CENTRE = 4
SCALE_ROWS = 4096
"""of which a mean distance is taken: its error is far below one in a thousand"""
HEAD_ROOM = 2.0
"""ρ_max over the largest ρ that was seen when the model was saved."""


def default_centres(rows: int) -> int:
    """M where the settings leave it open: min(512, N / 4), at least 1."""
    return max(1, min(MOST_CENTRES, rows // ROWS_A_CENTRE))


def _nearest(rows_bD: Tensor, centres_MD: Tensor, k: int) -> Tensor:
    """`kernels.nearest_centres`, its distances, by PyTorch's own operators: for exported programs,
    which run without this package."""
    near_bM = centres_MD.square().sum(dim=1) - 2 * rows_bD @ centres_MD.T
    index_bk = near_bM.topk(k, dim=1, largest=False).indices
    difference_bkD = rows_bD[:, None] - centres_MD[index_bk]
    return difference_bkD.square().sum(dim=2)


class Centres(nn.Module):
    """M centres, and what of them is subtracted from an item's squared distances: γ ρ.

    centres: M.  width: D.  nearest: k, of the centres; at most M.  unit: rows are divided by their
    length first, for a search by cosine.

    All of it is in buffers, so every checkpoint and export has it. Before centres are fitted, γ is
    0.
    """

    centres_MD: Tensor
    gamma: Tensor
    rho_max: Tensor
    """an item beyond it is clamped"""

    def __init__(self, *, centres: int, width: int, nearest: int, unit: bool) -> None:
        super().__init__()
        self.nearest = min(nearest, centres)
        self.unit = unit
        self.register_buffer("centres_MD", torch.zeros(centres, width))
        self.register_buffer("gamma", torch.zeros(()))
        self.register_buffer("rho_max", torch.zeros(()))

    def forward(self, z_bD: Tensor) -> Tensor:
        """z (b, D) → structure embedding (b, k + 1): the squared distances to the k nearest
        centres, nearest first, and ρ, their mean."""
        rows_bD, centres_MD = self.rows(z_bD.float()), self.centres_MD.float()
        if torch.compiler.is_exporting():
            squared_bk = _nearest(rows_bD, centres_MD, self.nearest)
        else:
            squared_bk, _ = kernels.nearest_centres(rows_bD, centres_MD, k=self.nearest)
        return torch.cat([squared_bk, squared_bk.mean(dim=1, keepdim=True)], dim=1)

    def rows(self, z_bD: Tensor) -> Tensor:
        """z in the geometry that is searched."""
        return kernels.unit_rows(z_bD) if self.unit else z_bD

    @torch.no_grad()
    def fit(self, z_ND: Tensor, *, seed: int) -> None:
        """Place the centres by k-means in the rows of all ranks, which call this together with the
        same rows (at least M): each assigns a share of them."""
        rows_ND = self.rows(z_ND.to(self.centres_MD.device, torch.float32))
        start_M = starting_rows(len(rows_ND), len(self.centres_MD), seed=seed)
        rank, world = rank_number(), world_size()
        share = slice(len(rows_ND) * rank // world, len(rows_ND) * (rank + 1) // world)
        start_MD = rows_ND[torch.from_numpy(start_M).to(rows_ND.device)]
        self.centres_MD.copy_(k_means(rows_ND[share], start_MD))

    @torch.no_grad()
    def place(self, learnt_MD: Tensor, z_ND: Tensor, *, seed: int) -> None:
        """Take centres (M, D) in units of the mean pairwise distance, which is that of the rows
        z_ND, or of SCALE_ROWS of them. Every rank calls it with the same rows."""
        some_N = starting_rows(len(z_ND), min(len(z_ND), SCALE_ROWS), seed=seed)
        rows_ND = self.rows(z_ND[torch.from_numpy(some_N)].to(self.centres_MD))
        self.centres_MD.copy_(learnt_MD * kernels.mean_pairwise_distance(rows_ND))

    def settle(self, *, gamma: float, rho_max: float) -> None:
        """Fix what the search makes of ρ."""
        self.gamma.fill_(gamma)
        self.rho_max.fill_(rho_max)

    @property
    def fitted(self) -> bool:
        """Whether they have been placed and γ chosen. Waits for a GPU."""
        return float(self.rho_max) > 0

    def bonus(self, rho_N: np.ndarray) -> np.ndarray:
        """(N,) float64 γ min(ρ, ρ_max): what the structure mode subtracts from an item's squared
        distances."""
        limit = float(self.rho_max)
        return float(self.gamma) * np.minimum(rho_N.astype(np.float64), limit)

    def clamped(self, rho_N: np.ndarray) -> int:
        """How many items lie beyond ρ_max."""
        return int((rho_N > float(self.rho_max)).sum())

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        M, D = self.centres_MD.shape
        return f"centres={M}, width={D}, nearest={self.nearest}, unit={self.unit}"
