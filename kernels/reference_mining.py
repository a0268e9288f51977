"""Which triplets the sampled losses use: for every (anchor, positive) pair, one negative.

Shapes: B rows of the global batch, D width, R the most positives any anchor has.
Nothing here is differentiated.  A Python loop runs over the r-th positive of each anchor, so memory is O(B²)
whatever the class sizes.  Ties go to the lowest row number (argmin and argmax promise that).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .random import gumbel
from .reference_pairs import off_diagonal, pairwise_distance, unit_rows

NEAREST = 0.5
"""Distance-weighted sampling clamps distances below at this value, to bound the weights (Wu et al. 2017)."""
FARTHEST = 1.4
"""Negatives farther than this are never drawn: from √2 on the loss has no gradient (Wu et al. 2017)."""


class Pairs(NamedTuple):
    """Who is like whom. The first count_B[i] entries of row i of positive_BR are i's positives, ascending;
    what follows is padding. An anchor without any negative counts 0."""

    same_BB: Tensor  # bool, the diagonal excluded
    differ_BB: Tensor  # bool
    positive_BR: Tensor  # int64 row numbers
    valid_BR: Tensor  # bool, false on the padding


def pairs_of(labels_B: Tensor) -> Pairs:
    """Positive and negative pairs of a batch.  Memory O(B²)."""
    equal_BB = labels_B[:, None] == labels_B[None, :]
    same_BB = equal_BB & off_diagonal(labels_B.shape[0], labels_B.device)
    differ_BB = ~equal_BB
    count_B = same_BB.sum(1) * differ_BB.any(1)
    R = int(count_B.max())
    # A stable sort brings the positives to the front and leaves them in ascending order.
    positive_BR = torch.argsort((~same_BB).to(torch.uint8), dim=1, stable=True)[:, :R]
    valid_BR = torch.arange(R, device=labels_B.device) < count_B[:, None]
    return Pairs(same_BB, differ_BB, positive_BR, valid_BR)


def semihard_negatives(squared_BB: Tensor, pairs: Pairs) -> Tensor:
    """The nearest negative strictly farther than the positive; without one, the nearest negative.

    squared_BB: squared distances (their order is that of the distances, free of the root's rounding).
    Returns int64 (B, R).  Schroff et al. 2015, with a fall-back so that every pair has a triplet.
    """
    negative_BB = squared_BB.masked_fill(~pairs.differ_BB, math.inf)
    hardest_B = negative_BB.argmin(1)
    chosen_BR = torch.empty_like(pairs.positive_BR)
    for r in range(chosen_BR.shape[1]):
        reach_B1 = squared_BB.gather(1, pairs.positive_BR[:, r, None])
        farther_BB = negative_BB.masked_fill(negative_BB <= reach_B1, math.inf)
        nearest_B = farther_BB.argmin(1)
        found_B = farther_BB.gather(1, nearest_B[:, None]).squeeze(1).isfinite()
        chosen_BR[:, r] = torch.where(found_B, nearest_B, hardest_B)
    return chosen_BR


def log_weights(z_BD: Tensor, pairs: Pairs) -> Tensor:
    """Logarithm of the unnormalised chance of each negative, (B, B); -inf where it is never drawn.

    1/q(d) with q the density of the distance d between two random points of the unit sphere in D dimensions,
        log q = (D - 2) log d + (D - 3)/2 · log(1 - d²/4)                        (Wu et al. 2017, eq. 3)
    d between the L2-normalised rows, clamped below at NEAREST; beyond FARTHEST the chance is 0.  An anchor
    all of whose negatives lie beyond it draws from them uniformly.
    """
    D = z_BD.shape[1]
    unit_BD = unit_rows(z_BD.detach())
    distance_BB = pairwise_distance(unit_BD, unit_BD)
    eligible_BB = pairs.differ_BB & (distance_BB <= FARTHEST)
    d_BB = distance_BB.clamp(NEAREST, FARTHEST)
    log_q_BB = (D - 2) * torch.log(d_BB) + (D - 3) / 2 * torch.log1p(-d_BB.square() / 4)
    weighted_BB = (-log_q_BB).masked_fill(~eligible_BB, -math.inf)
    uniform_BB = torch.zeros_like(log_q_BB).masked_fill(~pairs.differ_BB, -math.inf)
    return torch.where(eligible_BB.any(1, keepdim=True), weighted_BB, uniform_BB)


def distance_weighted_negatives(z_BD: Tensor, pairs: Pairs, *, seed: int) -> Tensor:
    """One negative for each (anchor, positive) pair, drawn with the chances of `log_weights`; int64 (B, R).

    The largest of log weight + Gumbel noise is such a draw, and needs neither a sum of weights nor an order
    of summation.  The noise depends on (seed, anchor, positive, negative) alone: see random.py.
    """
    log_weight_BB = log_weights(z_BD, pairs)
    row_B = torch.arange(z_BD.shape[0], device=z_BD.device)
    chosen_BR = torch.empty_like(pairs.positive_BR)
    for r in range(chosen_BR.shape[1]):
        positive_B1 = pairs.positive_BR[:, r, None]
        noise_BB = gumbel(seed, row_B[:, None], positive_B1, row_B[None, :], dtype=log_weight_BB.dtype)
        chosen_BR[:, r] = (log_weight_BB + noise_BB).argmax(1)
    return chosen_BR
