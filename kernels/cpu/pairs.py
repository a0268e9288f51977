"""Distances of listed pairs and their gradient, on the CPU, from the differences of rows and so
exact.

Shapes: b local rows, B all rows, D width, S pairs each row has as anchor, P pairs in one list, Q of
them in one chunk.
"""

import torch
from torch import Tensor

from .blocks import chunks, computed


def pair_distance(z_bD: Tensor, z_BD: Tensor, index_bS: Tensor) -> Tensor:
    """‖z_i - z_j‖ with j = index_bS[i, s], (b, S); 0 where the index is -1."""
    z_bD, z_BD = computed(z_bD, z_BD)
    distance_bS = z_bD.new_empty(index_bS.shape)
    for rows in chunks(index_bS.shape[0], index_bS.shape[1] * z_bD.shape[1]):
        index_rS = index_bS[rows]
        diff_rSD = z_BD[index_rS.clamp_min(0)].sub_(z_bD[rows, None])
        distance_bS[rows] = torch.linalg.vector_norm(diff_rSD, 2, 2).masked_fill_(index_rS < 0, 0.0)
    return distance_bS


def pair_gradient(
    z_BD: Tensor, index_BS: Tensor, weight_BS: Tensor, *, first: int, rows: int
) -> Tensor:
    """Rows first..first+rows of the gradient of Σ_is weight_is ‖z_i - z_index_is‖, (rows, D).

    weight_BS: d loss / d distance.  Each row receives its own pairs and those in which it is the
    other one. Pairs at distance 0, with index -1 or weight 0 give nothing.  index_add_ adds in list
    order on the CPU, so equal calls give equal bits.
    """
    (z_BD,) = computed(z_BD)
    grad_rD = z_BD.new_zeros(rows, z_BD.shape[1])
    used_BS = (index_BS >= 0) & (weight_BS != 0)
    anchor_P, slot_P = used_BS.nonzero(as_tuple=True)
    other_P, weight_P = index_BS[anchor_P, slot_P], weight_BS[anchor_P, slot_P].to(z_BD.dtype)
    for ends_P, towards in ((anchor_P, 1.0), (other_P, -1.0)):
        local_P = ((ends_P >= first) & (ends_P < first + rows)).nonzero().squeeze(1)
        for part in chunks(local_P.shape[0], z_BD.shape[1]):
            pair_Q = local_P[part]
            diff_QD = z_BD[anchor_P[pair_Q]].sub_(z_BD[other_P[pair_Q]])
            distance_Q = torch.linalg.vector_norm(diff_QD, 2, 1)
            pull_Q = (weight_P[pair_Q] / distance_Q).masked_fill_(distance_Q == 0, 0.0)
            grad_rD.index_add_(
                0, ends_P[pair_Q] - first, diff_QD.mul_(pull_Q[:, None]), alpha=towards
            )
    return grad_rD
