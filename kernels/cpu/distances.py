"""Sums over all distances of a batch, d_ij = ‖z_i - z_j‖, on the CPU; see blocks.py for how blocks
work.

Shapes: b local rows (rows offset..offset+b of the batch), B all rows, D width, r rows of one block.
"""

import torch
from torch import Tensor

from ..centre import centre_of
from .blocks import SquaredDistances, computed


def row_moments(z_bD: Tensor, z_BD: Tensor, *, offset: int) -> tuple[Tensor, Tensor]:
    """Mean over all B of d_ij (own zero included), and Σ_j (d_ij - mean_i)², both (b,).

    Accumulated about a pivot close to the mean, the root of the mean square, so that nothing
    cancels.
    """
    z_bD, z_BD = computed(z_bD, z_BD)
    distances = SquaredDistances(z_bD, z_BD, None, centre_D=centre_of(z_BD))
    B = z_BD.shape[0]
    mean_D = distances.z_BD.mean(0)
    pivot_b = (
        (distances.norm_b + distances.norm_B.mean() - 2 * distances.z_bD @ mean_D)
        .clamp_min_(0.0)
        .sqrt_()
    )
    first_b, second_b = torch.empty_like(pivot_b), torch.empty_like(pivot_b)
    for rows in distances.blocks():
        d_rB, _ = distances.squared(rows, offset=offset)
        d_rB.sqrt_().sub_(pivot_b[rows, None])
        first_b[rows] = d_rB.sum(1)
        second_b[rows] = torch.linalg.vector_norm(d_rB, 2, 1).square_()
    return pivot_b + first_b / B, (second_b - first_b.square() / B).clamp_min_(0.0)


def distance_sum_gradient(z_bD: Tensor, z_BD: Tensor, *, offset: int) -> Tensor:
    """Gradient (b, D) of Σ_{i≠j} d_ij: 2 Σ_j (z_i - z_j) / d_ij; a pair at distance 0 gives 0."""
    z_bD, z_BD = computed(z_bD, z_BD)
    distances = SquaredDistances(z_bD, z_BD, None, centre_D=centre_of(z_BD))
    grad_bD = torch.zeros_like(z_bD)
    if distances.largest == 0:
        return grad_bD
    for rows in distances.blocks():
        squared_rB, (row_P, column_P) = distances.squared(rows, offset=offset)
        inverse_rB = squared_rB.rsqrt_()
        inverse_rB.diagonal(rows.start + offset).zero_()
        # Near-duplicates' directions would cancel in the product; they come from the differences
        # instead.
        inverse_P = inverse_rB[row_P, column_P]
        inverse_P.masked_fill_(inverse_P.isinf(), 0.0)
        inverse_rB[row_P, column_P] = 0.0
        grad_rD = grad_bD[rows]
        torch.addcmul(
            -inverse_rB @ distances.z_BD,
            inverse_rB.sum(1, keepdim=True),
            distances.z_bD[rows],
            out=grad_rD,
        )
        for part, diff_PD in distances.differences(row_P + rows.start, column_P):
            grad_rD.index_add_(0, row_P[part], diff_PD.mul_(inverse_P[part, None]))
    return grad_bD.mul_(2.0)
