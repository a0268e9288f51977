"""Cluster centres of embeddings by k-means (Lloyd 1982), over the rows of all ranks.

Shapes: N rows of all ranks, n rows of this one, M centres, D width, E empty clusters.

Every rank assigns its own rows; sums and counts are added up over ranks in float64, so that any
number of ranks finds the same centres. Libraries have k-means for one process, not for rows that
lie on many.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from namr_dist import kernels
from namr_dist.parallel.gather import RowGather, sum_ranks
from namr_dist.parallel.ranks import world_size

_MOST_ROUNDS = 100


def starting_rows(rows: int, centres: int, *, seed: int) -> np.ndarray:
    """(M,) indices of the rows at which the centres begin, drawn without looking at them: the same
    on any number of ranks, whatever rounding made of the rows."""
    return np.random.default_rng(seed).choice(rows, size=centres, replace=False)


@torch.no_grad()
def k_means(rows_nD: Tensor, start_MD: Tensor, *, most_rounds: int = _MOST_ROUNDS) -> Tensor:
    """Centres (M, D) that Lloyd's iteration comes to from `start_MD`, in its dtype.

    rows_nD: this rank's rows, any number of them. start_MD: the same on all ranks, which call this
    together. A cluster that loses all its rows takes the row that lies farthest from its centre. It
    ends when no centre moves, or after `most_rounds`.
    """
    centres_MD = start_MD.clone()
    for _ in range(most_rounds):
        squared_n, index_n = (
            found_n1[:, 0] for found_n1 in kernels.nearest_centres(rows_nD, centres_MD, k=1)
        )
        # One more column counts the rows.
        ones_n1 = rows_nD.new_ones((len(rows_nD), 1), dtype=torch.float64)
        sums_MC = ones_n1.new_zeros((len(centres_MD), rows_nD.shape[1] + 1))
        sums_MC.index_add_(0, index_n, torch.cat([rows_nD.double(), ones_n1], dim=1))
        sums_MC = sum_ranks(sums_MC)
        counts_M1 = sums_MC[:, -1:]
        moved_MD = (sums_MC[:, :-1] / counts_M1.clamp_min(1)).to(centres_MD.dtype)
        empty_E = (counts_M1[:, 0] == 0).nonzero()[:, 0]
        if len(empty_E):
            moved_MD[empty_E] = _farthest(rows_nD, squared_n, len(empty_E)).to(moved_MD.dtype)
        if torch.equal(moved_MD, centres_MD):
            break
        centres_MD = moved_MD
    return centres_MD


def _farthest(rows_nD: Tensor, squared_n: Tensor, count: int) -> Tensor:
    """(count, D) the rows of all ranks that are farthest from their centres, the first of equal
    ones; all ranks have them in the same order."""
    own = min(count, len(squared_n))
    first_e = squared_n.argsort(descending=True, stable=True)[:own]
    # Ranks with fewer rows fill up with rows that are never taken while there are others.
    found_eC = rows_nD.new_full((count, rows_nD.shape[1] + 1), -1.0)
    found_eC[:own, :-1], found_eC[:own, -1] = rows_nD[first_e], squared_n[first_e]
    found_FC = RowGather((count,) * world_size())(found_eC)
    return found_FC[found_FC[:, -1].argsort(descending=True, stable=True)[:count], :-1]
