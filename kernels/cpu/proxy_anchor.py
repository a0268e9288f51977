"""Proxy-anchor loss on the CPU, in blocks of proxies against all local rows.

Shapes: b local rows, C proxies (one a class), D width, p proxies of one block.
Definition: reference.proxy_anchor_loss; S_px = proxy · row.  A row has one proxy of its own class:
those b pairs are a list, the others are dense.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import block_rows, computed, row_blocks


def proxy_sums(
    x_bD: Tensor, labels_b: Tensor, proxies_CD: Tensor, *, alpha: float, margin: float
) -> tuple[Tensor, Tensor]:
    """log Σ exp over the local rows of -α (S - δ) in the proxy's class, and of α (S + δ) in others;
    both (C,).

    -inf where there is none.  δ: margin.
    """
    x_bD, proxies_CD = computed(x_bD, proxies_CD)
    b, C = x_bD.shape[0], proxies_CD.shape[0]
    own_C = proxies_CD.new_full((C,), -math.inf)
    other_C = own_C.clone()
    if b == 0:
        return own_C, other_C
    exponent_b = (_own_similarity(x_bD, labels_b, proxies_CD) - margin).mul_(-alpha)
    largest_C = own_C.scatter_reduce(0, labels_b, exponent_b, "amax")
    total_C = torch.zeros_like(own_C).index_add_(
        0, labels_b, exponent_b.sub_(largest_C[labels_b]).exp_()
    )
    # Shifting by the largest exponent leaves absent classes at log 0 - inf.
    own_C = total_C.log_().add_(largest_C)

    for block, S_pb, own_P, column_P in _blocks(x_bD, labels_b, proxies_CD, alpha):
        S_pb[own_P, column_P] = -math.inf
        largest_p1 = S_pb.amax(1, keepdim=True)
        finite_p1 = largest_p1.masked_fill(largest_p1 == -math.inf, 0.0)
        total_p = S_pb.sub_(finite_p1).exp_().sum(1)
        other_C[block] = total_p.log_().add_(finite_p1.squeeze(1)).add_(alpha * margin)
    return own_C, other_C


def proxy_gradient(
    x_bD: Tensor,
    labels_b: Tensor,
    proxies_CD: Tensor,
    own_weight_C: Tensor,
    own_log_C: Tensor,
    other_weight: Tensor,
    other_log_C: Tensor,
    *,
    alpha: float,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """Gradients (b, D) and (C, D), the latter the local rows' share, of

        own_weight · Σ log(1 + Σ own) + other_weight · Σ log(1 + Σ other)

    own_log_C, other_log_C: those logarithms over all ranks' rows.
    """
    x_bD, proxies_CD = computed(x_bD, proxies_CD)
    dtype = x_bD.dtype
    grad_x_bD, grad_proxies_CD = torch.zeros_like(x_bD), torch.zeros_like(proxies_CD)
    level_C1 = (alpha * margin - other_log_C.to(dtype))[:, None]
    for block, S_pb, own_P, column_P in _blocks(x_bD, labels_b, proxies_CD, alpha):
        W_pb = S_pb.add_(level_C1[block]).exp_()
        W_pb[own_P, column_P] = 0.0
        torch.mm(W_pb, x_bD, out=grad_proxies_CD[block])
        grad_x_bD.addmm_(W_pb.T, proxies_CD[block])
    factor = alpha * other_weight.to(dtype)
    grad_x_bD *= factor
    grad_proxies_CD *= factor

    exponent_b = (
        (_own_similarity(x_bD, labels_b, proxies_CD) - margin)
        .mul_(-alpha)
        .sub_(own_log_C.to(dtype)[labels_b])
    )
    weight_b1 = exponent_b.exp_().mul_(own_weight_C.to(dtype)[labels_b]).mul_(-alpha)[:, None]
    grad_x_bD.addcmul_(weight_b1, proxies_CD[labels_b])
    grad_proxies_CD.index_add_(0, labels_b, weight_b1 * x_bD)
    return grad_x_bD, grad_proxies_CD


def _own_similarity(x_bD: Tensor, labels_b: Tensor, proxies_CD: Tensor) -> Tensor:
    """Each row's similarity to its own class's proxy, (b,)."""
    return proxies_CD[labels_b].mul_(x_bD).sum(1)


def _blocks(
    x_bD: Tensor, labels_b: Tensor, proxies_CD: Tensor, alpha: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each block of proxies: its slice, α S (p, b), and the own-class pairs in it (row in
    block, column)."""
    b, C = x_bD.shape[0], proxies_CD.shape[0]
    if b == 0:
        return
    sorted_b, order_b = labels_b.sort(stable=True)
    scaled_bD = alpha * x_bD
    buffer_pb = x_bD.new_empty(block_rows(C, b), b)
    for block in row_blocks(C, b):
        S_pb = torch.mm(proxies_CD[block], scaled_bD.T, out=buffer_pb[: block.stop - block.start])
        ends = torch.searchsorted(
            sorted_b, torch.tensor([block.start, block.stop], device=sorted_b.device)
        )
        column_P = order_b[ends[0] : ends[1]]
        yield block, S_pb, labels_b[column_P] - block.start, column_P
