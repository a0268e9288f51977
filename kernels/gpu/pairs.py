"""Distances of listed pairs and their gradient on a GPU, from the differences of rows and so exact.

Shapes: b local rows, B rows of the batch, D width, S pairs each row has as anchor, r rows whose
gradient is asked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, config
from .launch import aligned, architecture, launch
from .tiles import load_rows

SEGMENT = Config(block_m=1, block_n=16, block_k=128, warps=4, stages=1)
"""A program of the gradient: one row, 16 of its pairs and 128 of its dimensions at a time."""


@triton.jit
def _pair_distances(
    z, all_z, index, distances, pairs, slots, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """‖z_i − z_j‖ of the pairs (i, j = index[i, s]), i being pair // slots; 0 where the index is
    -1."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    listed = pair < pairs
    other = tl.load(index + pair, mask=listed, other=-1)
    exist = other >= 0
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mine = load_rows(z, pair // slots, exist, k, width).to(tl.float32)
        theirs = load_rows(all_z, other, exist, k, width).to(tl.float32)
        total += tl.sum((mine - theirs) * (mine - theirs), 1)
    tl.store(distances + pair, tl.sqrt(total), mask=listed)


def pair_distance(z_bD: Tensor, z_BD: Tensor, index_bS: Tensor) -> Tensor:
    """‖z_i − z_j‖ with j = index_bS[i, s], float32 (b, S); 0 where the index is -1."""
    distance_bS = torch.empty(index_bS.shape, dtype=torch.float32, device=z_BD.device)
    pairs = index_bS.numel()
    if pairs:
        z_bD, z_BD = aligned(z_bD), aligned(z_BD)
        size = config("scan", architecture(z_BD.device), z_BD.shape[1], z_BD.dtype)
        launch(_pair_distances, (triton.cdiv(pairs, size.block_m),), size, z=z_bD,
               all_z=z_BD, index=index_bS.contiguous(), distances=distance_bS, pairs=pairs,
               slots=index_bS.shape[1], width=z_BD.shape[1])  # fmt: skip
    return distance_bS


@triton.jit
def pull_listed(z, mine, other, exist, coefficients, pair, k, width, total):
    """total + coefficient·(z_i − z_other) of a few pairs of row i: a line of `total` each."""
    coefficient = tl.load(coefficients + pair, mask=exist, other=0.0)
    difference = mine[None, :] - load_rows(z, other, exist, k, width).to(tl.float32)
    return total + tl.where(exist[:, None], coefficient[:, None] * difference, 0.0)


@triton.jit
def _pair_sums(
    z,
    index,
    coefficients,
    order,
    bounds,
    sums,
    slots,
    first,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ coefficient·(z_i − z_other) over all pairs of a row i: those it is the anchor of, then
    those it is chosen in.

    order: numbers of all pairs, sorted by the chosen row; bounds: where the pairs of a row begin
        and end in it.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_N)
    mine = tl.load(z + (first + row) * width + k, mask=k < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for s in range(0, slots, BLOCK_N):
        pair = (first + row) * slots + s + lane
        other = tl.load(index + pair, mask=s + lane < slots, other=-1)
        total = pull_listed(z, mine, other, other >= 0, coefficients, pair, k, width, total)
    begin = tl.load(bounds + row)
    end = tl.load(bounds + row + 1)
    for position in range(begin, end, BLOCK_N):
        exist = position + lane < end
        pair = tl.load(order + position + lane, mask=exist, other=0)
        total = pull_listed(z, mine, pair // slots, exist, coefficients, pair, k, width, total)
    tl.store(sums + row * width + k, tl.sum(total, 0), mask=k < width)


def pair_gradient(
    z_BD: Tensor, index_BS: Tensor, weight_BS: Tensor, *, first: int, rows: int
) -> Tensor:
    """Rows first..first+rows of the gradient of Σ_is weight_is ‖z_i − z_index_is‖, float32 (rows,
    D).

    weight_BS: d loss / d distance.  Pairs at distance 0 and those with index -1 give nothing.  One
    program owns a row and adds up its pairs in a fixed order; a row chosen by everybody takes that
    program B·S / 16 steps.
    """
    given, S = z_BD.shape[1], index_BS.shape[1]
    z_BD, index_BS = aligned(z_BD), index_BS.contiguous()
    D = z_BD.shape[1]
    grad_rD = torch.zeros(rows, D, dtype=torch.float32, device=z_BD.device)
    if S == 0 or rows == 0:
        return grad_rD[:, :given]
    distance_BS = pair_distance(z_BD, z_BD, index_BS)
    # Where the distance is NaN the coefficient is; an index of -1 has distance 0.
    coefficient_BS = torch.where(distance_BS == 0, 0.0, weight_BS / distance_BS)
    chosen_P, order_P = torch.sort(index_BS.flatten(), stable=True)
    bounds = torch.searchsorted(chosen_P, torch.arange(first, first + rows + 1, device=z_BD.device))
    launch(_pair_sums, (rows, triton.cdiv(D, SEGMENT.block_k)), SEGMENT, z=z_BD, index=index_BS,
           coefficients=coefficient_BS, order=order_P, bounds=bounds, sums=grad_rD, slots=S, first=first,
           width=D)  # fmt: skip
    return grad_rD[:, :given]
