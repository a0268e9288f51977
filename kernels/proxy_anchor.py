"""Proxy-anchor loss: every class has a learnt proxy, and the proxy is the anchor.  Definition:
reference/losses.py.

Shapes: b local rows, B rows of the batch, C classes, D width, W ranks.
"""

import torch
from torch import Tensor

from .checks import check_labels, check_proxies, check_proxy_labels, check_rows
from .dispatch import implementation
from .ops import Gather, alone, exactly, loss_op, needs_grad
from .reference.pairs import compute_dtype


def proxy_anchor_loss(
    x_BD: Tensor, labels_B: Tensor, proxies_CD: Tensor, *, alpha: float = 32.0, margin: float = 0.1
) -> Tensor:
    """Proxy-anchor loss (Kim et al. 2020): a scalar, differentiable once in x and the proxies.

        1/|P⁺| Σ_{p in P⁺} log(1 + Σ_{x of class p} exp(-α (S_xp - δ)))
        + 1/C  Σ_p         log(1 + Σ_{x of other classes} exp(α (S_xp + δ)))

    x_BD and proxies_CD: unit rows (float32, float64, bfloat16, float16), S_xp = x · p.  δ: margin.
    P⁺: proxies whose class is in the batch.  labels_B: integers in 0..C-1, a row of proxies_CD
    each. Memory: O((B + C)·D) and a block.
    Raises ValueError for a wrong shape, dtype, B < 2, or a label without a proxy; on a GPU that
    last one is an asynchronous device assertion, since looking would stop the device.
    """
    check_rows("x", x_BD)
    check_labels(labels_B, x_BD)
    check_proxies(proxies_CD, x_BD)
    loss, _, _ = _proxy_anchor_loss(
        x_BD, proxies_CD, labels_B, alpha, margin, needs_grad(x_BD, proxies_CD)
    )
    return loss


@exactly
def proxy_anchor_of_rows(
    x_bD: Tensor,
    labels_b: Tensor,
    proxies_CD: Tensor,
    *,
    gather: Gather,
    alpha: float,
    margin: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same from one rank's rows alone: the batch's loss, its gradient for those rows, and these
    rows' share of the gradient for the proxies (C, D): shares add up over ranks.

    Ranks exchange two numbers a proxy; embeddings need not be gathered at all.
    """
    check_proxy_labels(labels_b, proxies_CD.shape[0])
    if x_bD.dtype != proxies_CD.dtype:
        dtype = compute_dtype(x_bD, proxies_CD)
        x_bD, proxies_CD = x_bD.to(dtype), proxies_CD.to(dtype)
    primitives = implementation(x_bD)
    C = proxies_CD.shape[0]
    own_C, other_C = primitives.proxy_sums(x_bD, labels_b, proxies_CD, alpha=alpha, margin=margin)
    own_C, other_C = (torch.logsumexp(gather(part_C[None]), 0) for part_C in (own_C, other_C))
    present_C = (~torch.isneginf(own_C)).to(own_C.dtype)
    own_weight_C = present_C / present_C.sum()
    other_weight = own_C.new_ones(()) / C
    # log(1 + Σ exp): the 1 enters as one more exponent 0.
    own_log_C, other_log_C = (
        torch.logaddexp(sum_C, torch.zeros_like(sum_C)) for sum_C in (own_C, other_C)
    )
    loss = (own_weight_C * own_log_C).sum() + other_weight * other_log_C.sum()
    if not with_grad:
        return loss, None, None
    grad_x_bD, grad_proxies_CD = primitives.proxy_gradient(
        x_bD, labels_b, proxies_CD, own_weight_C, own_log_C, other_weight, other_log_C, alpha=alpha,
        margin=margin)  # fmt: skip
    return loss, grad_x_bD, grad_proxies_CD


@loss_op("proxy_anchor_loss", differentiable=2)
def _proxy_anchor_loss(
    x_BD: Tensor, proxies_CD: Tensor, labels_B: Tensor, alpha: float, margin: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return proxy_anchor_of_rows(  # type: ignore[return-value]
        x_BD, labels_B, proxies_CD, gather=alone, alpha=alpha, margin=margin, with_grad=with_grad
    )
