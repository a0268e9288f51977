"""Multi-similarity loss on a GPU: its mining and log-sums, and its gradient.

Shapes: b local rows, B rows of the batch, D width. S_ij = x_i·x_j; λ is `base`, ε is `epsilon`;
alpha, beta > 0.

    mined by anchor i, with n its negatives and p its positives:
           positives j with S_ij − ε < nearest_i,   nearest_i  = max_n S_in
           negatives j with S_ij + ε > farthest_i,  farthest_i = min_p S_ip
    e_ij = −α (S_ij − λ) of a positive pair, β (S_ij − λ) of a negative one
    L_i  = attract_i / α + repel_i / β,
           attract_i, repel_i = log(1 + Σ exp e_ij) over the mined of each kind
    dL_i/dS_ij = ∓ exp(e_ij − attract_i or repel_i),   − for a positive pair
S is symmetric and the mining is not: W_ij = dL_i/dS_ij + dL_j/dS_ij, and the gradient of row i is
Σ_j W_ij x_j.
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
    same_class,
    split_tiles,
    store_number,
    store_sums,
    store_weights,
    tile_columns,
)


@triton.jit
def _mined(similarity, positive, negative, farthest, nearest, epsilon):
    """Which pairs count for the anchors with these extremes. Written so that NaN counts: it must
    reach the loss."""
    return (positive & ~(similarity - epsilon >= nearest)) | (
        negative & ~(similarity + epsilon <= farthest)
    )


@triton.jit
def _exponents(similarity, positive, alpha, beta, base):
    """e_ij, that of a negative pair wherever a pair is not positive."""
    return tl.where(positive, -alpha, beta) * (similarity - base)


@triton.jit
def _extremes(
    x, labels, all_x, all_labels, extremes, b, B, width, offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """farthest_i and nearest_i over one split of the batch; +inf and −inf where there is no such
    pair."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    farthest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    nearest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        similarity = inner_products(
            x, rows, rows_exist, all_x, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        positive, negative = same_class(
            labels, rows, rows_exist, all_labels, columns, columns_exist, offset
        )
        farthest = tl.minimum(farthest, tl.min(tl.where(positive, similarity, float("inf")), 1))
        nearest = tl.maximum(nearest, tl.max(tl.where(negative, similarity, float("-inf")), 1))
    store_number(extremes, 0, farthest, rows, rows_exist, b)
    store_number(extremes, 1, nearest, rows, rows_exist, b)


@triton.jit
def _exponential_sums(
    x, labels, all_x, all_labels, extremes, largest, sums, b, B, width, offset, alpha, beta, base, epsilon,
    tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ exp(e_ij − largest_i) over one split's mined positives and over its mined negatives."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    farthest = tl.load(extremes + rows, mask=rows_exist, other=0.0)[:, None]
    nearest = tl.load(extremes + b + rows, mask=rows_exist, other=0.0)[:, None]
    largest_attract = tl.load(largest + rows, mask=rows_exist, other=0.0)[:, None]
    largest_repel = tl.load(largest + b + rows, mask=rows_exist, other=0.0)[:, None]
    attract = tl.zeros((BLOCK_M,), tl.float32)
    repel = tl.zeros((BLOCK_M,), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        similarity = inner_products(
            x, rows, rows_exist, all_x, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        positive, negative = same_class(
            labels, rows, rows_exist, all_labels, columns, columns_exist, offset
        )
        exponent = _exponents(similarity, positive, alpha, beta, base)
        term = tl.exp(exponent - tl.where(positive, largest_attract, largest_repel))
        term = tl.where(
            _mined(similarity, positive, negative, farthest, nearest, epsilon), term, 0.0
        )
        attract += tl.sum(tl.where(positive, term, 0.0), 1)
        repel += tl.sum(tl.where(positive, 0.0, term), 1)
    store_number(sums, 0, attract, rows, rows_exist, b)
    store_number(sums, 1, repel, rows, rows_exist, b)


def similarity_statistics(
    x_bD: Tensor,
    x_BD: Tensor,
    labels_b: Tensor,
    labels_B: Tensor,
    *,
    offset: int,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
) -> Tensor:
    """farthest, nearest, attract and repel of each local anchor, float32 (b, 4).

    farthest is +inf without a positive, nearest −inf without a negative; attract and repel are then
    0.
    """
    x_bD, x_BD = aligned(x_bD), aligned(x_BD)
    (b, D), B = x_bD.shape, x_BD.shape[0]
    size = config("scan", architecture(x_BD.device), D, x_BD.dtype)
    parts, tiles_per_split = splits(b, B, size)
    grid = (triton.cdiv(b, size.block_m), parts)
    pairs = {"x": x_bD, "labels": labels_b.contiguous(), "all_x": x_BD,
             "all_labels": labels_B.contiguous(), "b": b, "B": B, "width": D, "offset": offset,
             "tiles_per_split": tiles_per_split, **operands(x_BD)}  # fmt: skip
    extremes = torch.empty(2, parts, b, dtype=torch.float32, device=x_BD.device)
    launch(_extremes, grid, size, **pairs, extremes=extremes)
    farthest_b, nearest_b = extremes[0].amin(0), extremes[1].amax(0)
    # If any pair is mined, the farthest positive and the nearest negative are: theirs are the
    # largest exponents. The 1 of log(1 + Σ) is an exponent 0. Should S differ in its last bit in
    # the second kernel, an exponent passes the largest by next to nothing.
    largest_2b = torch.stack([-alpha * (farthest_b - base), beta * (nearest_b - base)]).clamp_min(0)
    sums = torch.empty_like(extremes)
    launch(_exponential_sums, grid, size, **pairs, extremes=torch.stack([farthest_b, nearest_b]), largest=largest_2b,
           sums=sums, alpha=float(alpha), beta=float(beta), base=float(base), epsilon=float(epsilon))  # fmt: skip
    sums_2b = sums.sum(1)
    # Nothing mined is told by the sum, whatever the largest exponent would have been.
    logs_2b = torch.where(
        sums_2b == 0, 0.0, largest_2b + torch.log1p(torch.expm1(-largest_2b) + sums_2b)
    )
    return torch.stack([farthest_b, nearest_b, *logs_2b], 1)


@triton.jit
def _load_statistics(statistics, rows, rows_exist):
    """farthest, nearest, attract, repel of these rows.

    A log of 0 means that nothing was mined. A pair exactly at its threshold may be mined here all
    the same, where S is rounded differently; +inf gives it the weight 0. Beside other mined pairs
    its exponent is the smallest, so that no weight passes 1.
    """
    at = statistics + rows.to(tl.int64) * 4
    farthest = tl.load(at, mask=rows_exist, other=0.0)
    nearest = tl.load(at + 1, mask=rows_exist, other=0.0)
    attract = tl.load(at + 2, mask=rows_exist, other=0.0)
    repel = tl.load(at + 3, mask=rows_exist, other=0.0)
    return (
        farthest,
        nearest,
        tl.where(attract == 0, float("inf"), attract),
        tl.where(repel == 0, float("inf"), repel),
    )


@triton.jit
def _pair_weights(
    x, labels, statistics, all_x, all_labels, all_statistics, b, B, width, offset, alpha, beta, base, epsilon,
    weights, sums, totals, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CHUNKED: tl.constexpr,
):  # fmt: skip
    """W_ij · WEIGHT_SCALE: the pair in the loss of its row i and in that of its column j."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    farthest, nearest, attract, repel = _load_statistics(statistics, rows, rows_exist)
    pulled = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        similarity = inner_products(
            x, rows, rows_exist, all_x, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        positive, negative = same_class(
            labels, rows, rows_exist, all_labels, columns, columns_exist, offset
        )
        exponent = _exponents(similarity, positive, alpha, beta, base)
        by_row = _mined(
            similarity, positive, negative, farthest[:, None], nearest[:, None], epsilon
        )
        weight = tl.where(
            by_row, tl.exp(exponent - tl.where(positive, attract[:, None], repel[:, None])), 0.0
        )
        far, near, pos, neg = _load_statistics(all_statistics, columns, columns_exist)
        by_column = _mined(similarity, positive, negative, far[None, :], near[None, :], epsilon)
        weight += tl.where(
            by_column, tl.exp(exponent - tl.where(positive, pos[None, :], neg[None, :])), 0.0
        )
        weight = tl.where(positive, -weight, weight) * WEIGHT_SCALE
        if CHUNKED:
            store_weights(weights, weight, rows, rows_exist, columns, columns_exist, b, B)
        else:
            pulled, _ = pull(
                weight, all_x, columns, columns_exist, width, pulled,
                BLOCK_D=BLOCK_D, OPERAND=OPERAND, PRECISION=PRECISION,
            )  # fmt: skip
    if not CHUNKED:
        store_sums(sums, 0, pulled, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)


def similarity_gradient(
    x_bD: Tensor,
    x_BD: Tensor,
    labels_b: Tensor,
    labels_B: Tensor,
    statistics_b4: Tensor,
    statistics_B4: Tensor,
    *,
    offset: int,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
) -> Tensor:
    """Gradient of the batch's Σ_i L_i with respect to the local rows, float32 (b, D), given
    everybody's statistics."""
    grad_bD = torch.empty_like(x_bD, dtype=torch.float32)
    D = x_BD.shape[1]
    x_bD, x_BD = aligned(x_bD), aligned(x_BD)
    for some, (pulled_RD,), _ in owner_sums(
        _pair_weights,
        rows={"x": x_bD, "labels": labels_b.contiguous(), "statistics": statistics_b4.contiguous()},
        columns={"all_x": x_BD, "all_labels": labels_B.contiguous(), "all_statistics": statistics_B4.contiguous()},
        fixed={"alpha": float(alpha), "beta": float(beta), "base": float(base), "epsilon": float(epsilon)},
        values=lambda window: [x_BD[window]], accumulators=1, numbers=0, offset=offset):  # fmt: skip
        torch.div(pulled_RD[:, :D], WEIGHT_SCALE.value, out=grad_bD[some])
    return grad_bD
