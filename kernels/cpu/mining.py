"""Which pairs and triplets the metric losses use, found on the CPU block by block.

Shapes: b local rows (rows offset..offset+b of the batch), B all rows, D width, R the most positives
any anchor has, r anchors of one block, S columns picked in each of its rows.
Nothing here is differentiated.  Rows of a class are known from one sort (blocks.Classes), so a
block's positives are picked and overwritten by number; no (r, B) mask of labels is made.  Ties go
to the lowest row number.
"""

import math

import torch
from torch import Tensor

from ..centre import centre_of
from ..random import exponential
from ..reference.mining import FARTHEST, NEAREST
from ..reference.pairs import unit_rows
from .blocks import Classes, SquaredDistances, computed


def hardest_pairs(
    z_bD: Tensor, z_BD: Tensor, labels_b: Tensor, labels_B: Tensor, *, offset: int
) -> tuple[Tensor, Tensor]:
    """The farthest row of each anchor's class and the nearest of another, int64 (b,); -1 where
    there is none."""
    z_bD, z_BD = computed(z_bD, z_BD)
    distances = SquaredDistances(z_bD, z_BD, None, centre_D=centre_of(z_BD))
    classes = Classes(labels_b, labels_B)
    positive_b, negative_b = torch.empty_like(labels_b), torch.empty_like(labels_b)
    for rows in distances.blocks():
        squared_rB = distances.product(rows)
        member_rS = classes.members(rows)
        # -1 lies below every squared distance, inf above.
        itself_rS = (
            member_rS
            == torch.arange(rows.start, rows.stop, device=member_rS.device)[:, None] + offset
        )
        within_rS = distances.picked(rows, squared_rB, member_rS).masked_fill_(itself_rS, -1.0)
        farthest = within_rS.max(1)
        positive_r = member_rS.gather(1, farthest.indices[:, None]).squeeze(1)
        positive_b[rows] = positive_r.masked_fill_(farthest.values == -1.0, -1)
        squared_rB.scatter_(1, member_rS, math.inf)
        distances.mend(rows, squared_rB)
        nearest = squared_rB.min(1)
        negative_b[rows] = nearest.indices.masked_fill_(nearest.values == math.inf, -1)
    return positive_b, negative_b


def semihard_negatives(
    z_bD: Tensor, z_BD: Tensor, labels_b: Tensor, labels_B: Tensor, positive_bR: Tensor
) -> Tensor:
    """For each positive the nearest negative strictly farther than it; without one, the nearest
    negative.

    positive_bR: row numbers, -1 on padding, where the result (b, R) is -1 too.
    """
    z_bD, z_BD = computed(z_bD, z_BD)
    distances = SquaredDistances(z_bD, z_BD, None, centre_D=centre_of(z_BD))
    classes = Classes(labels_b, labels_B)
    negative_bR = torch.empty_like(positive_bR)
    for rows in distances.blocks():
        squared_rB = distances.product(rows)
        reach_rR = distances.picked(rows, squared_rB, positive_bR[rows].clamp_min(0))
        squared_rB.scatter_(1, classes.members(rows), math.inf)
        distances.mend(rows, squared_rB)
        nearest_r = squared_rB.min(1).indices
        # From the nearest positive to the farthest: what lies within reach of one is within reach
        # of the next.
        reach_rR, order_rR = reach_rR.sort(1)
        for r in range(positive_bR.shape[1]):
            beyond_rB = squared_rB - reach_rR[:, r, None]
            torch.threshold_(beyond_rB, 0.0, math.inf)
            farther = beyond_rB.min(1)
            chosen_r = torch.where(farther.values.isfinite(), farther.indices, nearest_r)
            negative_bR[rows].scatter_(1, order_rR[:, r, None], chosen_r[:, None])
    return negative_bR.masked_fill_(positive_bR < 0, -1)


def sampled_negatives(
    z_bD: Tensor,
    z_BD: Tensor,
    labels_b: Tensor,
    labels_B: Tensor,
    positive_bR: Tensor,
    *,
    offset: int,
    seed: int,
) -> Tensor:
    """One negative for each positive, drawn as in `reference.mining.distance_weighted_negatives`;
    int64 (b, R).

    z: rows of any length; distances are those of the unit rows.  positive_bR: -1 on padding, where
    the result is -1 too.
    The reference takes the largest of log weight + gumbel; as gumbel = -log E with E = -log(1 - v),
    that is the smallest E / weight, and the weights serve all positives of an anchor.
    """
    x_bD, x_BD = (unit_rows(rows) for rows in computed(z_bD, z_BD))
    # Distances below NEAREST are all alike here, so there is nothing to centre or mend.
    distances = SquaredDistances(x_bD, x_BD, None, centre_D=torch.zeros_like(x_BD[0]))
    classes = Classes(labels_b, labels_B)
    row_B = torch.arange(x_BD.shape[0], dtype=torch.int32, device=x_BD.device)
    negative_bR = torch.empty_like(positive_bR)
    for rows in distances.blocks():
        squared_rB = distances.product(rows)
        log_q_rB = _log_density(squared_rB, x_BD.shape[1])
        squared_rB.scatter_(1, classes.members(rows), math.inf)
        log_q_rB.masked_fill_(squared_rB > FARTHEST**2, math.inf)
        least_r1 = log_q_rB.amin(1, keepdim=True)
        # Relative to the likeliest negative, so that at least one is finite.
        inverse_weight_rB = log_q_rB.sub_(least_r1).exp_()
        unreached_r = least_r1.squeeze(1) == math.inf
        if unreached_r.any():
            negative_SB = squared_rB[unreached_r] < math.inf
            inverse_weight_rB[unreached_r] = squared_rB.new_ones(()).where(negative_SB, math.inf)
        anchor_r1 = (row_B[: x_bD.shape[0]] + offset)[rows, None]
        for r in range(positive_bR.shape[1]):
            noise_rB = exponential(
                seed, anchor_r1, positive_bR[rows, r, None], row_B, dtype=x_BD.dtype
            )
            negative_bR[rows, r] = noise_rB.mul_(inverse_weight_rB).min(1).indices
    return negative_bR.masked_fill_(positive_bR < 0, -1)


def _log_density(squared_rB: Tensor, D: int) -> Tensor:
    """log q of `reference.mining.log_weights`, from squared distances."""
    clamped_rB = squared_rB.clamp(NEAREST**2, FARTHEST**2)
    log_q_rB = (clamped_rB * -0.25).log1p_().mul_((D - 3) / 2)
    return log_q_rB.add_(clamped_rB.log_(), alpha=(D - 2) / 2)
