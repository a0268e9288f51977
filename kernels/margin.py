"""Margin loss with distance-weighted negatives and a learnt boundary.  Definition:
reference/losses.py.

Shapes: b local rows, B rows of the batch, N candidates, D width, R slots for the positives of an
anchor.
"""

import torch
from torch import Tensor

from .checks import check_labels, check_rows, check_single
from .dispatch import implementation
from .ops import Gather, alone, exactly, loss_op, needs_grad, seed_64
from .positives import most_positives as count_most_positives
from .positives import positives


def margin_loss(
    x_BD: Tensor,
    labels_B: Tensor,
    *,
    beta: Tensor,
    alpha: float = 0.2,
    seed: int = 0,
    most_positives: int | None = None,
) -> Tensor:
    """Margin loss (Wu et al. 2017): positives within beta - alpha, negatives beyond beta + alpha; a
    scalar.

        Σ [max(0, d_ap - β + α) + max(0, β - d_an + α)] / max(1, number of non-zero summands)

    over every (anchor, positive) pair and its one distance-weighted negative, drawn as in
    `triplet_loss`.
    x_BD: rows of unit length (float32, float64, bfloat16, float16).  labels_B: integers.
    beta: one floating number in a tensor.  Differentiable once in x and beta.  most_positives: as
    in `triplet_loss`. Memory: O(B·(D + R)) and a block.
    Raises ValueError for a wrong shape, dtype, B < 2, a beta of more than one element, more
    positives than most_positives.
    """
    check_rows("x", x_BD)
    check_labels(labels_B, x_BD)
    check_single("beta", beta)
    loss, _, _ = _margin_loss(
        x_BD, beta, labels_B, alpha, seed_64(seed), most_positives, needs_grad(x_BD, beta)
    )
    return loss


@exactly
def margin_of_rows(
    x_bD: Tensor,
    labels_b: Tensor,
    x_ND: Tensor,
    labels_N: Tensor,
    beta: Tensor,
    *,
    offset: int,
    gather: Gather,
    alpha: float,
    seed: int,
    most_positives: int | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same from rows offset..offset+b alone: the batch's loss, its gradient for those rows, and
    these rows' share of the gradient for beta: shares add up over ranks.

    x_ND: the batch's rows, then any memory rows: constants, which positives and negatives are
    chosen from too. Ranks exchange two numbers a row for the loss, and the mined pairs with their
    weights, 4·R numbers a row.
    """
    primitives = implementation(x_ND)
    slots = (
        count_most_positives(labels_b, labels_N, gather=gather)
        if most_positives is None
        else most_positives
    )
    positive_bR = positives(labels_b, labels_N, offset=offset, slots=slots)
    negative_bR = primitives.sampled_negatives(
        x_bD, x_ND, labels_b, labels_N, positive_bR, offset=offset, seed=seed
    )
    valid_bR = positive_bR >= 0
    to_positive_bR = primitives.pair_distance(x_bD, x_ND, positive_bR)
    boundary = beta.reshape(()).to(to_positive_bR.dtype)
    too_far_bR = torch.relu(to_positive_bR - boundary + alpha).where(valid_bR, 0.0)
    too_near_bR = torch.relu(
        boundary - primitives.pair_distance(x_bD, x_ND, negative_bR) + alpha
    ).where(valid_bR, 0.0)
    far_bR, near_bR = ((hinge_bR > 0).to(boundary.dtype) for hinge_bR in (too_far_bR, too_near_bR))
    # Counted per row and summed as integers: float32 counts no further than 2^24.
    active = gather((far_bR + near_bR).sum(1).long()).sum().clamp_min(1)
    loss = gather((too_far_bR + too_near_bR).sum(1)).sum() / active
    if not with_grad:
        return loss, None, None
    index_BS = gather(torch.cat([positive_bR, negative_bR], 1).int()).long()
    weight_BS = gather(torch.cat([far_bR, -near_bR], 1) / active)
    grad_x_bD = primitives.pair_gradient(
        x_ND, index_BS, weight_BS, first=offset, rows=x_bD.shape[0]
    )
    return loss, grad_x_bD, ((near_bR.sum() - far_bR.sum()) / active).reshape(beta.shape)


@loss_op("margin_loss", differentiable=2)
def _margin_loss(
    x_BD: Tensor,
    beta: Tensor,
    labels_B: Tensor,
    alpha: float,
    seed: int,
    most_positives: int | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return margin_of_rows(  # type: ignore[return-value]
        x_BD, labels_B, x_BD, labels_B, beta, offset=0, gather=alone, alpha=alpha, seed=seed,
        most_positives=most_positives, with_grad=with_grad)  # fmt: skip
