"""Distances on a GPU: their row statistics, and the gradient of their sum.

Shapes: b local rows, B rows of the batch, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..centre import centre_of
from .configs import config
from .gradient_sums import owner_sums
from .launch import aligned, architecture, both, launch, operands, splits
from .tiles import (
    load_rows,
    local_rows,
    pull,
    split_tiles,
    squared_distances,
    store_number,
    store_sums,
    store_weights,
    tile_columns,
)


def nearest_counted(dtype: torch.dtype) -> float:
    """Where a gradient divides by a distance, those below this share of the unit
    (`root_mean_square`) count as that.

    Otherwise 1/d would blow up the rounding of z_i Σ W − Σ W z_j. float16 has a coarser limit, for
    its range.
    """
    return 2.0**-14 if dtype == torch.float16 else 2.0**-18


def centred(z_bD: Tensor, z_BD: Tensor, *, half_too: bool = False) -> tuple[Tensor, Tensor]:
    """Local rows and batch, aligned; float32 rows less a point in their middle, so that less
    cancels in products.

    Half types stay as they are: their products are exact in float32, and a subtraction would round.
    half_too: for those who round their squares anyway, which far from the origin leaves nothing of
    their differences.
    """
    if z_BD.dtype != torch.float32 and not half_too:
        return both(aligned, z_bD, z_BD)
    centre_D = centre_of(z_BD)
    return both(lambda rows: aligned(rows - centre_D), z_bD, z_BD)


def squared_norms(rows: Tensor) -> Tensor:
    """‖row‖² in float32, without a root in between, so that rows of small integers stay exact."""
    return spreads(rows, torch.zeros(rows.shape[1], dtype=torch.float32, device=rows.device))


@triton.jit
def _spreads(z, mean, out, b, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ_k (z_ik − mean_k)²."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        middle = tl.load(mean + k, mask=k < width, other=0.0)
        apart = tl.where(
            (k < width)[None, :],
            load_rows(z, rows, rows_exist, k, width).to(tl.float32) - middle,
            0.0,
        )
        total += tl.sum(apart * apart, 1)
    tl.store(out + rows, total, mask=rows_exist)


def spreads(z: Tensor, mean_D: Tensor) -> Tensor:
    """‖z_i − mean‖² of each row, float32; from the differences, so that nothing cancels or
    overflows in half types."""
    b, D = z.shape
    size = config("scan", architecture(z.device), D, z.dtype)
    out = torch.empty(b, dtype=torch.float32, device=z.device)
    launch(_spreads, (triton.cdiv(b, size.block_m),), size, z=z, mean=mean_D, out=out, b=b, width=D)
    return out


def root_mean_square(z_BD: Tensor) -> Tensor:
    """Root mean square distance of the batch, the unit that pair weights are kept in; one
    number."""
    return (2 * spreads(z_BD, z_BD.mean(0, dtype=torch.float32)).mean()).sqrt()


@triton.jit
def _row_moments(
    z, norms, pivots, all_z, all_norms, moments, b, B, width, offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_j (d_ij − pivot_i) and Σ_j (d_ij − pivot_i)²."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    pivot = tl.load(pivots + rows, mask=rows_exist, other=0.0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    total_square = tl.zeros((BLOCK_M,), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        squared = squared_distances(
            z, norms, rows, rows_exist, offset, all_z, all_norms, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        excess = tl.where(columns_exist[None, :], tl.sqrt(squared) - pivot[:, None], 0.0)
        total += tl.sum(excess, 1)
        total_square += tl.sum(excess * excess, 1)
    store_number(moments, 0, total, rows, rows_exist, b)
    store_number(moments, 1, total_square, rows, rows_exist, b)


def row_moments(z_bD: Tensor, z_BD: Tensor, *, offset: int) -> tuple[Tensor, Tensor]:
    """mean_j d_ij of d_ij = ‖z_i − z_j‖ over all B, own zero included, and Σ_j (d_ij − mean_i)²;
    float32 (b,) each.

    Sums are of d less the row's root mean square distance, a pivot known beforehand, so that little
    cancels.
    """
    z_bD, z_BD = centred(z_bD, z_BD)
    (b, D), B = z_bD.shape, z_BD.shape[0]
    norms_b, norms_B = squared_norms(z_bD), squared_norms(z_BD)
    mean_D = z_BD.mean(0, dtype=torch.float32)
    pivot_b = (spreads(z_bD, mean_D) + spreads(z_BD, mean_D).mean()).sqrt()
    size = config("scan", architecture(z_BD.device), D, z_BD.dtype)
    parts, tiles_per_split = splits(b, B, size)
    moments = pivot_b.new_empty(2, parts, b)
    launch(
        _row_moments,
        (triton.cdiv(b, size.block_m), parts),
        size,
        z=z_bD,
        norms=norms_b,
        pivots=pivot_b,
        all_z=z_BD,
        all_norms=norms_B,
        moments=moments,
        b=b,
        B=B,
        width=D,
        offset=offset,
        tiles_per_split=tiles_per_split,
        **operands(z_BD),
    )
    sum_b, square_b = moments.sum(1)
    return pivot_b + sum_b / B, (square_b - sum_b.square() / B).clamp_min(0)


@triton.jit
def _inverse_distances(
    z, norms, all_z, all_norms, unit, weights, sums, totals, b, B, width, offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CHUNKED: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """W_ij = unit / d_ij, 0 where d_ij is."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    one = tl.load(unit)
    pulled = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        squared = squared_distances(
            z, norms, rows, rows_exist, offset, all_z, all_norms, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        weight = one / tl.maximum(tl.sqrt(squared), NEAREST * one)
        weight = tl.where((squared == 0) | ~columns_exist[None, :], 0.0, weight)
        if CHUNKED:
            total += store_weights(weights, weight, rows, rows_exist, columns, columns_exist, b, B)
        else:
            pulled, tile_total = pull(
                weight, all_z, columns, columns_exist, width, pulled,
                BLOCK_D=BLOCK_D, OPERAND=OPERAND, PRECISION=PRECISION,
            )  # fmt: skip
            total += tile_total
    store_number(totals, 0, total, rows, rows_exist, b)
    if not CHUNKED:
        store_sums(sums, 0, pulled, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)


def distance_sum_gradient(z_bD: Tensor, z_BD: Tensor, *, offset: int) -> Tensor:
    """Gradient of Σ_{i≠j} ‖z_i − z_j‖ over the batch with respect to the local rows, 2 Σ_j (z_i −
    z_j) / d_ij."""
    grad_bD = torch.empty_like(z_bD, dtype=torch.float32)
    D = z_BD.shape[1]
    z_bD, z_BD = centred(z_bD, z_BD)
    unit = root_mean_square(z_BD)
    scale = torch.where(unit > 0, 2 / unit, 0.0)
    for some, (pulled_RD,), (total_R,) in owner_sums(
        _inverse_distances, rows={"z": z_bD, "norms": squared_norms(z_bD)},
        columns={"all_z": z_BD, "all_norms": squared_norms(z_BD)},
        fixed={"unit": unit, "NEAREST": nearest_counted(z_BD.dtype)},
        values=lambda window: [z_BD[window]], accumulators=1, numbers=1, offset=offset):  # fmt: skip
        grad_bD[some] = (scale * (z_bD[some] * total_R[:, None] - pulled_RD))[:, :D]
    return grad_bD
