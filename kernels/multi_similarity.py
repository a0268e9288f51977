"""Multi-similarity loss with its pair mining.  Definition: reference/losses.py.

Shapes: b local rows, B rows of the batch, N candidates, D width.
"""

import math

import torch
from torch import Tensor

from .checks import check_labels, check_rows
from .dispatch import implementation
from .ops import Gather, alone, exactly, loss_op, needs_grad


def multi_similarity_loss(
    x_BD: Tensor,
    labels_B: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
) -> Tensor:
    """Multi-similarity loss (Wang et al. 2019), a mean over all B anchors: a scalar, differentiable
    once in x.

        mined positives P_i:  S_ip - ε < max over negatives of S_in
        mined negatives N_i:  S_in + ε > min over positives of S_ip
        L_i = 1/α · log(1 + Σ_{P_i} exp(-α (S_ip - base))) + 1/β · log(1 + Σ_{N_i} exp(β (S_in -
        base)))

    x_BD: rows of unit length (float32, float64, bfloat16, float16), S_ij = x_i · x_j.  labels_B:
    integers. `base` is the λ of docs/algorithm.md.  An anchor without a positive or without a
    negative counts 0 in the mean. Memory: O(B·D) and a block.  Raises ValueError for a wrong shape,
    dtype, B < 2.
    """
    check_rows("x", x_BD)
    check_labels(labels_B, x_BD)
    loss, _ = _multi_similarity_loss(x_BD, labels_B, alpha, beta, base, epsilon, needs_grad(x_BD))
    return loss


@exactly
def multi_similarity_of_rows(
    x_bD: Tensor,
    labels_b: Tensor,
    x_ND: Tensor,
    labels_N: Tensor,
    *,
    offset: int,
    gather: Gather,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same from rows offset..offset+b alone: the batch's loss, and its gradient for those rows,
    (b, D).

    x_ND: the batch's rows, then any memory rows: constants, which are positives and negatives and
    never anchors. Ranks exchange four numbers a row.
    """
    primitives = implementation(x_ND)
    statistics_b4 = primitives.similarity_statistics(
        x_bD,
        x_ND,
        labels_b,
        labels_N,
        offset=offset,
        alpha=alpha,
        beta=beta,
        base=base,
        epsilon=epsilon,
    )
    statistics_B4 = gather(statistics_b4)
    _, _, attract_B, repel_B = statistics_B4.unbind(1)
    loss = (attract_B / alpha + repel_B / beta).mean()
    if not with_grad:
        return loss, None
    B, N = statistics_B4.shape[0], x_ND.shape[0]
    statistics_N4 = statistics_B4 if B == N else _and_unmined(statistics_B4, N - B)
    grad_bD = primitives.similarity_gradient(
        x_bD, x_ND, labels_b, labels_N, statistics_b4, statistics_N4, offset=offset, alpha=alpha, beta=beta, base=base,
        epsilon=epsilon)  # fmt: skip
    return loss, grad_bD.div_(B)


def _and_unmined(statistics_B4: Tensor, rows: int) -> Tensor:
    """Statistics of so many rows more, as of anchors without any pair: they mine none."""
    added_Q4 = statistics_B4.new_zeros(rows, 4)
    added_Q4[:, 0], added_Q4[:, 1] = math.inf, -math.inf
    return torch.cat([statistics_B4, added_Q4])


@loss_op("multi_similarity_loss", differentiable=1)
def _multi_similarity_loss(
    x_BD: Tensor,
    labels_B: Tensor,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return multi_similarity_of_rows(  # type: ignore[return-value]
        x_BD, labels_B, x_BD, labels_B, offset=0, gather=alone, alpha=alpha, beta=beta, base=base, epsilon=epsilon,
        with_grad=with_grad)  # fmt: skip
