"""Proxy-anchor loss on a GPU: the log-sums of every proxy, and the gradients of rows and proxies.

Shapes: b local rows, C classes with a proxy each, D width. S_xp = x·p; δ is `margin`.

    e_xp    = −α (S_xp − δ) for rows of the proxy's own class, α (S_xp + δ) for the others
    own_p   = log Σ exp e_xp over the rows of class p,   other_p over all other rows
    weight  = dloss/dS_xp
            = −α own_weight_p exp(e_xp − own_log_p),   α other_weight exp(e_xp − other_log_p)
    grad x  = Σ_p weight_xp p,   grad p = Σ_x weight_xp x
where own_log, other_log are log(1 + Σ exp e) over the whole batch. Row x has the class labels[x],
proxy p the class p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .gradient_sums import owner_sums
from .launch import aligned, architecture, launch, operands, splits
from .tiles import (
    WEIGHT_SCALE,
    inner_products,
    local_rows,
    pull,
    split_tiles,
    store_number,
    store_sums,
    store_weights,
    tile_columns,
)


@triton.jit
def _exponents(similarity, own, alpha, margin):
    """e_xp."""
    return alpha * tl.where(own, margin - similarity, margin + similarity)


@triton.jit
def _shift(largest):
    """What to take off exponents: the largest so far, 0 as long as there is none (−inf less −inf is
    NaN)."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _proxy_sums(
    proxies, x, labels, log_sums, b, B, width, alpha, margin, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """own_p and other_p over one split of the rows; here b proxies go down and B rows across."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    own_largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    other_largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    own_total = tl.zeros((BLOCK_M,), tl.float32)
    other_total = tl.zeros((BLOCK_M,), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        similarity = inner_products(
            proxies, rows, rows_exist, x, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        label = tl.load(labels + columns, mask=columns_exist, other=-1)
        own = rows[:, None] == label[None, :]
        exponent = tl.where(
            columns_exist[None, :], _exponents(similarity, own, alpha, margin), float("-inf")
        )
        own_before, other_before = own_largest, other_largest
        own_largest = tl.maximum(own_largest, tl.max(tl.where(own, exponent, float("-inf")), 1))
        other_largest = tl.maximum(other_largest, tl.max(tl.where(own, float("-inf"), exponent), 1))
        own_shift, other_shift = _shift(own_largest), _shift(other_largest)
        term = tl.exp(exponent - tl.where(own, own_shift[:, None], other_shift[:, None]))
        own_total = own_total * tl.exp(own_before - own_shift) + tl.sum(tl.where(own, term, 0.0), 1)
        other_total = other_total * tl.exp(other_before - other_shift) + tl.sum(
            tl.where(own, 0.0, term), 1
        )
    # Nothing added up: −inf and the logarithm of 0.
    store_number(log_sums, 0, own_largest + tl.log(own_total), rows, rows_exist, b)
    store_number(log_sums, 1, other_largest + tl.log(other_total), rows, rows_exist, b)


def proxy_sums(
    x_bD: Tensor, labels_b: Tensor, proxies_CD: Tensor, *, alpha: float, margin: float
) -> tuple[Tensor, Tensor]:
    """own_p and other_p over the local rows, float32 (C,) each; −inf where there is no such row.

    Without the 1 of log(1 + Σ), so that a logsumexp over ranks gives the sums of the whole batch.
    """
    x_bD, proxies_CD = _alike(x_bD, proxies_CD)
    b, (C, D) = x_bD.shape[0], proxies_CD.shape
    size = config("scan", architecture(x_bD.device), D, x_bD.dtype)
    parts, tiles_per_split = splits(C, b, size)
    log_sums = torch.empty(2, parts, C, dtype=torch.float32, device=x_bD.device)
    launch(_proxy_sums, (triton.cdiv(C, size.block_m), parts), size, proxies=proxies_CD, x=x_bD,
           labels=labels_b.contiguous(), log_sums=log_sums, b=C, B=b, width=D, alpha=float(alpha), margin=float(margin),
           tiles_per_split=tiles_per_split, **operands(x_bD))  # fmt: skip
    own_C, other_C = torch.logsumexp(log_sums, 1)
    return own_C, other_C


@triton.jit
def _weights(similarity, own, exist, own_weight, own_log, other_weight, other_log, alpha, margin):
    """weight_xp · WEIGHT_SCALE / α; what belongs to a proxy comes shaped to broadcast over the
    tile."""
    share = tl.exp(_exponents(similarity, own, alpha, margin) - tl.where(own, own_log, other_log))
    weight = tl.where(own, -own_weight, other_weight) * share * WEIGHT_SCALE
    return tl.where(exist, weight, 0.0)


@triton.jit
def _rows(
    x, labels, proxies, own_weight, own_log, other_weight, other_log, classes, weights, sums, totals, b, B, width,
    alpha, margin, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Rows own: b rows down, B proxies across."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    label = tl.load(labels + rows, mask=rows_exist, other=-1)
    other_share = tl.load(other_weight)
    pulled = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        similarity = inner_products(
            x, rows, rows_exist, proxies, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        column_class = tl.load(classes + columns, mask=columns_exist, other=-1)
        weight = _weights(
            similarity, label[:, None] == column_class[None, :], rows_exist[:, None] & columns_exist[None, :],
            tl.load(own_weight + columns, mask=columns_exist, other=0.0)[None, :],
            tl.load(own_log + columns, mask=columns_exist, other=0.0)[None, :], other_share,
            tl.load(other_log + columns, mask=columns_exist, other=0.0)[None, :], alpha, margin,
        )  # fmt: skip
        if CHUNKED:
            store_weights(weights, weight, rows, rows_exist, columns, columns_exist, b, B)
        else:
            pulled, _ = pull(
                weight, proxies, columns, columns_exist, width, pulled,
                BLOCK_D=BLOCK_D, OPERAND=OPERAND, PRECISION=PRECISION,
            )  # fmt: skip
    if not CHUNKED:
        store_sums(sums, 0, pulled, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)


@triton.jit
def _proxies(
    proxies, own_weight, own_log, other_log, classes, x, labels, other_weight, weights, sums, totals, b, B, width,
    alpha, margin, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """Proxies own: b proxies down, B rows across."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    weight_own = tl.load(own_weight + rows, mask=rows_exist, other=0.0)[:, None]
    log_own = tl.load(own_log + rows, mask=rows_exist, other=0.0)[:, None]
    log_other = tl.load(other_log + rows, mask=rows_exist, other=0.0)[:, None]
    own_class = tl.load(classes + rows, mask=rows_exist, other=-1)
    weight_other = tl.load(other_weight)
    pulled = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        similarity = inner_products(
            proxies, rows, rows_exist, x, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        label = tl.load(labels + columns, mask=columns_exist, other=-1)
        weight = _weights(
            similarity, own_class[:, None] == label[None, :], rows_exist[:, None] & columns_exist[None, :],
            weight_own, log_own, weight_other, log_other, alpha, margin,
        )  # fmt: skip
        if CHUNKED:
            store_weights(weights, weight, rows, rows_exist, columns, columns_exist, b, B)
        else:
            pulled, _ = pull(
                weight, x, columns, columns_exist, width, pulled,
                BLOCK_D=BLOCK_D, OPERAND=OPERAND, PRECISION=PRECISION,
            )  # fmt: skip
    if not CHUNKED:
        store_sums(sums, 0, pulled, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)


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
    """Gradients of Σ_p own_weight_p log(1 + Σ own) + other_weight Σ_p log(1 + Σ other), float32.

    own_log, other_log: those logarithms over the whole batch. other_weight: one number in a 0-dim
    tensor. Returns the local rows' gradient (b, D) and their share of the proxies' gradient (C, D).
    """
    D = x_bD.shape[1]
    grad_x_bD, grad_proxies_CD = (
        torch.empty_like(rows, dtype=torch.float32) for rows in (x_bD, proxies_CD)
    )
    x_bD, proxies_CD = _alike(x_bD, proxies_CD)
    labels_b = labels_b.contiguous()
    # In units of the largest, so that the weights of pairs lie within ±1 whatever the loss is
    # scaled by.
    unit = torch.maximum(own_weight_C.abs().amax(), other_weight.abs()).float()
    per_unit = torch.where(unit == 0, 0.0, 1 / unit)
    # A chunk of proxies or of rows does not begin at class 0: each proxy says whose it is.
    of_proxies = {"proxies": proxies_CD, "own_weight": own_weight_C * per_unit, "own_log": own_log_C.contiguous(),
                  "other_log": other_log_C.contiguous(),
                  "classes": torch.arange(proxies_CD.shape[0], device=labels_b.device)}  # fmt: skip
    of_rows = {"x": x_bD, "labels": labels_b}
    fixed = {
        "other_weight": other_weight * per_unit,
        "alpha": float(alpha),
        "margin": float(margin),
    }
    back = unit * (alpha / WEIGHT_SCALE.value)
    for some, (pulled_RD,), _ in owner_sums(
        _rows, rows=of_rows, columns=of_proxies, fixed=fixed, values=lambda window: [proxies_CD[window]],
        accumulators=1, numbers=0, offset=None):  # fmt: skip
        torch.mul(pulled_RD[:, :D], back, out=grad_x_bD[some])
    for some, (pulled_RD,), _ in owner_sums(
        _proxies, rows=of_proxies, columns=of_rows, fixed=fixed, values=lambda window: [x_bD[window]],
        accumulators=1, numbers=0, offset=None):  # fmt: skip
        torch.mul(pulled_RD[:, :D], back, out=grad_proxies_CD[some])
    return grad_x_bD, grad_proxies_CD


def _alike(x_bD: Tensor, proxies_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Both aligned and of one type, the wider one: embeddings may be half, learnt proxies are
    float32."""
    dtype = torch.promote_types(x_bD.dtype, proxies_CD.dtype)
    return aligned(x_bD.to(dtype)), aligned(proxies_CD.to(dtype))
