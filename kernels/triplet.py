"""Triplet loss with hardest, semi-hard or distance-weighted mining.  Definition:
reference/losses.py.

Shapes: b local rows, B rows of the batch, N candidates, D width, R slots for the positives of an
anchor.
"""

import torch
from torch import Tensor

from .checks import check_labels, check_mining, check_rows
from .dispatch import implementation
from .ops import Gather, alone, exactly, loss_op, needs_grad, seed_64
from .positives import most_positives as count_most_positives
from .positives import positives


def triplet_loss(
    z_BD: Tensor,
    labels_B: Tensor,
    *,
    margin: float = 0.2,
    mining: str = "semihard",
    seed: int = 0,
    most_positives: int | None = None,
) -> Tensor:
    """mean of max(0, ‖z_a - z_p‖ - ‖z_a - z_n‖ + margin) over the mined triplets, zeros included: a
    scalar.

    z_BD: embeddings, taken as they are (training scales them first): float32, float64, bfloat16 or
        float16.
    labels_B: integers.  Differentiable once in z.
    mining, over anchors with at least one positive and one negative:
      "semihard"           for every (a, p) the nearest n strictly farther than p; without one, the
                           nearest n
      "hardest"            one triplet an anchor: its farthest p, its nearest n
      "distance_weighted"  for every (a, p) one n drawn as in Wu et al. 2017; seed picks the draw
    Ties go to the lowest row number among distances that are equal as computed; the loss and its
    gradient are then taken from the differences of the mined rows, exactly.
    seed is read by "distance_weighted" only; equal seeds give equal draws.
    most_positives: the most positives any row has, K - 1 for batches of P classes with K rows each;
    None counts them, which on a GPU waits for the device.  "hardest" does not need it.
    Memory: O(B·(D + R)) and a block.
    Raises ValueError for a wrong shape, dtype, B < 2, unknown mining, more positives than
    most_positives.
    """
    check_rows("z", z_BD)
    check_labels(labels_B, z_BD)
    check_mining(mining)
    loss, _ = _triplet_loss(
        z_BD, labels_B, margin, mining, seed_64(seed), most_positives, needs_grad(z_BD)
    )
    return loss


def mined_triplets(
    z_bD: Tensor,
    labels_b: Tensor,
    z_ND: Tensor,
    labels_N: Tensor,
    *,
    offset: int,
    mining: str,
    seed: int,
    slots: int,
) -> tuple[Tensor, Tensor]:
    """Candidate numbers of the local anchors' positives and negatives, int64 (b, R) each; -1 where
    there is none."""
    primitives = implementation(z_ND)
    if mining == "hardest":
        positive_b, negative_b = primitives.hardest_pairs(
            z_bD, z_ND, labels_b, labels_N, offset=offset
        )
        none_b = (positive_b < 0) | (negative_b < 0)
        return positive_b.masked_fill(none_b, -1)[:, None], negative_b.masked_fill(none_b, -1)[
            :, None
        ]
    positive_bR = positives(labels_b, labels_N, offset=offset, slots=slots)
    if mining == "semihard":
        return positive_bR, primitives.semihard_negatives(
            z_bD, z_ND, labels_b, labels_N, positive_bR
        )
    return positive_bR, primitives.sampled_negatives(
        z_bD, z_ND, labels_b, labels_N, positive_bR, offset=offset, seed=seed
    )


@exactly
def triplet_of_rows(
    z_bD: Tensor,
    labels_b: Tensor,
    z_ND: Tensor,
    labels_N: Tensor,
    *,
    offset: int,
    gather: Gather,
    margin: float,
    mining: str,
    seed: int,
    most_positives: int | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same from rows offset..offset+b alone: the batch's loss, and its gradient for those rows,
    (b, D).

    z_ND: the batch's rows, then any memory rows: constants, which positives and negatives are
    chosen from too. Ranks exchange two numbers a row for the loss, and the mined pairs with their
    weights, 4·R numbers a row, for the gradient: a row's gradient includes the triplets of others
    in which it is positive or negative.
    """
    primitives = implementation(z_ND)
    slots = most_positives or 0
    if most_positives is None and mining != "hardest":
        slots = count_most_positives(labels_b, labels_N, gather=gather)
    positive_bR, negative_bR = mined_triplets(
        z_bD, labels_b, z_ND, labels_N, offset=offset, mining=mining, seed=seed, slots=slots
    )
    valid_bR = positive_bR >= 0
    to_positive_bR = primitives.pair_distance(z_bD, z_ND, positive_bR)
    to_negative_bR = primitives.pair_distance(z_bD, z_ND, negative_bR)
    violation_bR = torch.relu(to_positive_bR - to_negative_bR + margin).where(valid_bR, 0.0)
    triplets = gather(valid_bR.sum(1)).sum().clamp_min(1)
    loss = gather(violation_bR.sum(1)).sum() / triplets
    if not with_grad:
        return loss, None
    pull_bR = (violation_bR > 0).to(loss.dtype) / triplets
    index_BS = gather(torch.cat([positive_bR, negative_bR], 1).int()).long()
    weight_BS = gather(torch.cat([pull_bR, -pull_bR], 1))
    return loss, primitives.pair_gradient(
        z_ND, index_BS, weight_BS, first=offset, rows=z_bD.shape[0]
    )


@loss_op("triplet_loss", differentiable=1)
def _triplet_loss(
    z_BD: Tensor,
    labels_B: Tensor,
    margin: float,
    mining: str,
    seed: int,
    most_positives: int | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return triplet_of_rows(  # type: ignore[return-value]
        z_BD, labels_B, z_BD, labels_B, offset=0, gather=alone, margin=margin, mining=mining, seed=seed,
        most_positives=most_positives, with_grad=with_grad)  # fmt: skip
