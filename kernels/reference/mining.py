"""Which triplets the sampled losses use: for every (anchor, positive) pair, one negative.

Shapes: B rows of the global batch, N candidates (these rows and, behind them, those of a memory), D
width, R the most positives any anchor has.
Nothing here is differentiated.  A Python loop runs over the r-th positive of each anchor, so memory
is O(B·N) whatever the class sizes.  Ties go to the lowest row number (argmin and argmax promise
that).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..random import gumbel
from .pairs import off_diagonal, pairwise_distance, unit_rows

NEAREST = 0.5
"""Distance-weighted sampling clamps distances below at this value, to bound the weights (Wu et al.
2017)."""
FARTHEST = 1.4
"""Negatives farther than this are never drawn: from √2 on the loss has no gradient (Wu et al.
2017)."""


class Pairs(NamedTuple):
    """Who is like whom. The first count_B[i] entries of row i of positive_BR are i's positives,
    ascending; what follows is padding. An anchor without any negative counts 0."""

    same_BN: Tensor  # bool, an anchor and itself excluded
    differ_BN: Tensor  # bool
    positive_BR: Tensor  # int64 row numbers
    valid_BR: Tensor  # bool, false on the padding


def pairs_of(labels_B: Tensor, labels_N: Tensor | None = None) -> Pairs:
    """Positive and negative pairs of a batch among the candidates (None: the batch).  Memory
    O(B·N)."""
    labels_N = labels_B if labels_N is None else labels_N
    equal_BN = labels_B[:, None] == labels_N[None, :]
    same_BN = equal_BN & off_diagonal(
        labels_B.shape[0], labels_B.device, candidates=labels_N.shape[0]
    )
    differ_BN = ~equal_BN
    count_B = same_BN.sum(1) * differ_BN.any(1)
    R = int(count_B.max())
    # A stable sort brings the positives to the front and leaves them in ascending order.
    positive_BR = torch.argsort((~same_BN).to(torch.uint8), dim=1, stable=True)[:, :R]
    valid_BR = torch.arange(R, device=labels_B.device) < count_B[:, None]
    return Pairs(same_BN, differ_BN, positive_BR, valid_BR)


def semihard_negatives(squared_BN: Tensor, pairs: Pairs) -> Tensor:
    """The nearest negative strictly farther than the positive; without one, the nearest negative.

    squared_BN: squared distances (their order is that of the distances, free of the root's
    rounding). Returns int64 (B, R).  Schroff et al. 2015, with a fall-back so that every pair has a
    triplet.
    """
    negative_BN = squared_BN.masked_fill(~pairs.differ_BN, math.inf)
    hardest_B = negative_BN.argmin(1)
    chosen_BR = torch.empty_like(pairs.positive_BR)
    for r in range(chosen_BR.shape[1]):
        reach_B1 = squared_BN.gather(1, pairs.positive_BR[:, r, None])
        farther_BN = negative_BN.masked_fill(negative_BN <= reach_B1, math.inf)
        nearest_B = farther_BN.argmin(1)
        found_B = farther_BN.gather(1, nearest_B[:, None]).squeeze(1).isfinite()
        chosen_BR[:, r] = torch.where(found_B, nearest_B, hardest_B)
    return chosen_BR


def log_weights(z_BD: Tensor, pairs: Pairs, z_ND: Tensor | None = None) -> Tensor:
    """Logarithm of the unnormalised chance of each negative, (B, N); -inf where it is never drawn.

    1/q(d) with q the density of the distance d between two random points of the unit sphere in D
    dimensions (Wu et al. 2017, eq. 3):

        log q = (D - 2) log d + (D - 3)/2 · log(1 - d²/4)

    d between the L2-normalised rows, clamped below at NEAREST; beyond FARTHEST the chance is 0.  An
    anchor all of whose negatives lie beyond it draws from them uniformly.  z_ND: the candidates
    (None: z_BD).
    """
    D = z_BD.shape[1]
    unit_BD, unit_ND = (unit_rows(rows.detach()) for rows in (z_BD, z_BD if z_ND is None else z_ND))
    distance_BN = pairwise_distance(unit_BD, unit_ND)
    eligible_BN = pairs.differ_BN & (distance_BN <= FARTHEST)
    d_BN = distance_BN.clamp(NEAREST, FARTHEST)
    log_q_BN = (D - 2) * torch.log(d_BN) + (D - 3) / 2 * torch.log1p(-d_BN.square() / 4)
    weighted_BN = (-log_q_BN).masked_fill(~eligible_BN, -math.inf)
    uniform_BN = torch.zeros_like(log_q_BN).masked_fill(~pairs.differ_BN, -math.inf)
    return torch.where(eligible_BN.any(1, keepdim=True), weighted_BN, uniform_BN)


def distance_weighted_negatives(
    z_BD: Tensor, pairs: Pairs, z_ND: Tensor | None = None, *, seed: int
) -> Tensor:
    """One negative for each (anchor, positive) pair, drawn with the chances of `log_weights`; int64
    (B, R).

    The largest of log weight + Gumbel noise is such a draw, and needs neither a sum of weights nor
    an order of summation.  The noise depends on (seed, anchor, positive, negative) alone: see
    random.py.
    """
    log_weight_BN = log_weights(z_BD, pairs, z_ND)
    row_N = torch.arange(log_weight_BN.shape[1], device=z_BD.device)
    chosen_BR = torch.empty_like(pairs.positive_BR)
    for r in range(chosen_BR.shape[1]):
        positive_B1 = pairs.positive_BR[:, r, None]
        noise_BN = gumbel(
            seed, row_N[: z_BD.shape[0], None], positive_B1, row_N, dtype=log_weight_BN.dtype
        )
        chosen_BR[:, r] = (log_weight_BN + noise_BN).argmax(1)
    return chosen_BR
