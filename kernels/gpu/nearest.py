"""The nearest centres of each row on a GPU: a walk over the centres that keeps a short list a row,
and a second kernel that measures the list exactly.

Shapes: N rows, M centres, D width, K centres chosen for a row, P parts of the centres, L centres
listed for a row: K and at least two more, a power of two.
An entry of a list is 64 bits: the key above, in the order of the floats, and the centre's number
below, so that the least entry is the least key and of equal ones the lowest number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu.nearest import doubt
from ..cpu.nearest import k_nearest as blocked
from .configs import Config, config
from .distances import centred, squared_norms
from .launch import aligned, architecture, launch, operands, splits
from .pairs import SEGMENT, pull_listed
from .tiles import (
    in_order,
    inner_products,
    load_column,
    load_rows,
    local_rows,
    split_tiles,
    tile_columns,
)

MOST = 30
"""Centres that the kernels choose for a row, from a list of 32; a longer one would spill registers,
and more are chosen by blocked PyTorch."""
MEASURED = Config(block_m=32, block_n=32, block_k=64, warps=4, stages=1)
"""A program that measures lists: few rows, for it waits for centres from anywhere in memory."""
INF = tl.constexpr(float("inf"))
NOBODY = tl.constexpr(0x7FFFFFFF << 32)
"""Above every entry; with a slot's number added, what stands in a slot as long as nothing does."""
TAKEN = tl.constexpr(2**63 - 1)
"""Above these too: an entry that was taken, or a centre that does not exist."""


@triton.jit
def _entries(key, columns, exist):
    """Keys of centres as entries; NaN is below everything."""
    order = in_order(tl.where(key != key, -INF, key)).to(tl.int64)
    return tl.where(exist, (order << 32) | columns.to(tl.int64), TAKEN)


@triton.jit
def _key(entry):
    """The key of an entry; −inf for what was NaN."""
    order = (entry >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _empty(BLOCK_M: tl.constexpr, LISTED: tl.constexpr):
    """Empty lists."""
    return tl.zeros((BLOCK_M, LISTED), tl.int64) + (tl.arange(0, LISTED).to(tl.int64) + NOBODY)


@triton.jit
def _keep_least(kept, offered):
    """The least entries of both, as many as `kept` has; each turn takes one in every row, of which
    mostly few are left after the first tiles."""
    worst = tl.max(kept, 1)
    least = tl.min(offered, 1)
    while tl.max((least < worst).to(tl.int32), 0) > 0:
        better = (least < worst)[:, None] & (kept == worst[:, None])
        kept = tl.where(better, least[:, None], kept)
        offered = tl.where(offered == least[:, None], TAKEN, offered)
        worst = tl.max(kept, 1)
        least = tl.min(offered, 1)
    return kept


@triton.jit
def _shortlist(
    z, centres, centre_norms, lists, b, B, width, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Each row's centres of least ‖c‖² − 2 z·c, in no order, LISTED of each part of the centres;
    here b rows go down and B centres across."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    kept = _empty(BLOCK_M, LISTED)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        product = inner_products(
            z, rows, rows_exist, centres, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        norm = tl.load(centre_norms + columns, mask=columns_exist, other=0.0)
        entries = _entries(norm[None, :] - 2 * product, columns[None, :], columns_exist[None, :])
        kept = _keep_least(kept, entries)
    line = tl.program_id(1).to(tl.int64) * b + rows
    positions = line[:, None] * LISTED + tl.arange(0, LISTED)[None, :]
    tl.store(lists + positions, kept, mask=rows_exist[:, None])


@triton.jit
def _measured(
    z, norms, centres, longest, lists, squared, index, b, B, width, parts, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHOSEN: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The CHOSEN nearest of each row's lists by Σ_k (z_ik − c_mk)², ascending.

    Where a centre that is not listed may belong among them, all centres are compared so.
    """
    rows, rows_exist = local_rows(b, BLOCK_M)
    slot = tl.arange(0, LISTED)[None, :]
    kept = _empty(BLOCK_M, LISTED)
    for part in range(parts):
        line = tl.cast(part, tl.int64) * b + rows
        of_part = tl.load(
            lists + line[:, None] * LISTED + slot, mask=rows_exist[:, None], other=TAKEN
        )
        kept = _keep_least(kept, tl.where(of_part < NOBODY, of_part, TAKEN))

    # The keys of the last that is chosen and of the last that is listed; no other has a lesser one.
    rest = kept
    for _ in range(CHOSEN - 1):
        rest = tl.where(rest == tl.min(rest, 1)[:, None], TAKEN, rest)
    last = tl.max(kept, 1)
    reach = tl.load(longest)
    length = tl.sqrt(tl.load(norms + rows, mask=rows_exist, other=0.0))
    apart = _key(last) - _key(tl.min(rest, 1)) > (2 * length + reach) * reach * share
    doubtful = rows_exist & (last < NOBODY) & (apart == 0)  # NaN is never apart

    listed = rows_exist[:, None] & (kept < NOBODY)
    number = tl.where(listed, (kept & 0xFFFFFFFF).to(tl.int32), -1)
    exact = tl.zeros((BLOCK_M, LISTED), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        row_tile = load_rows(z, rows, rows_exist, k, width).to(tl.float32)
        for s in range(LISTED):
            centre = tl.max(tl.where(slot == s, number, -1), 1)
            difference = row_tile - load_rows(centres, centre, centre >= 0, k, width).to(tl.float32)
            part_sum = tl.sum(difference * difference, 1)
            exact += tl.where(slot == s, part_sum[:, None], 0.0)
    kept = tl.where(listed, _entries(exact, number, listed), slot.to(tl.int64) + NOBODY)

    if tl.max(doubtful.to(tl.int32), 0) > 0:
        of_all = _empty(BLOCK_M, LISTED)
        for tile in range(0, tl.cdiv(B, BLOCK_N)):
            columns, columns_exist = tile_columns(tile, B, BLOCK_N)
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, width):
                difference = (
                    load_column(z, rows, doubtful, k, width)[:, None]
                    - load_column(centres, columns, columns_exist, k, width)[None, :]
                )
                total += difference * difference
            of_all = _keep_least(of_all, _entries(total, columns[None, :], columns_exist[None, :]))
        kept = tl.where(doubtful[:, None], of_all, kept)

    for s in range(CHOSEN):
        least = tl.min(kept, 1)
        kept = tl.where(kept == least[:, None], TAKEN, kept)
        value = _key(least)
        position = rows.to(tl.int64) * CHOSEN + s
        tl.store(squared + position, tl.where(value == -INF, float("nan"), value), mask=rows_exist)
        tl.store(index + position, least & 0xFFFFFFFF, mask=rows_exist)


def k_nearest(z_ND: Tensor, centres_MD: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k least ‖z_i − c_m‖² of each row, ascending, float32, and their centres, int64: (N, k)
    each.

    More than MOST are chosen by blocked PyTorch, which waits for the device.
    """
    if k > MOST:
        return blocked(z_ND, centres_MD, k=k)
    squared_NK = torch.empty(z_ND.shape[0], k, dtype=torch.float32, device=z_ND.device)
    index_NK = torch.empty_like(squared_NK, dtype=torch.int64)
    # Differences are of the rows as given: centring would round them.
    exact = {"z": aligned(z_ND), "centres": aligned(centres_MD)}
    z_ND, centres_MD = centred(z_ND, centres_MD)
    (N, D), M = z_ND.shape, centres_MD.shape[0]
    norms_M = squared_norms(centres_MD)
    listed = triton.next_power_of_2(k + 2)
    size = config("mine", architecture(z_ND.device), D, z_ND.dtype)
    parts, tiles_per_split = splits(N, M, size)
    lists = torch.empty(parts, N, listed, dtype=torch.int64, device=z_ND.device)
    launch(_shortlist, (triton.cdiv(N, size.block_m), parts), size, z=z_ND, centres=centres_MD, centre_norms=norms_M,
           lists=lists, b=N, B=M, width=D, tiles_per_split=tiles_per_split, LISTED=listed,
           **operands(z_ND))  # fmt: skip
    launch(_measured, (triton.cdiv(N, MEASURED.block_m),), MEASURED, **exact, norms=squared_norms(z_ND),
           longest=norms_M.max().sqrt(), lists=lists, squared=squared_NK, index=index_NK, b=N, B=M, width=D,
           parts=parts, share=doubt(D, torch.float32), CHOSEN=k, LISTED=listed)  # fmt: skip
    return squared_NK, index_NK


@triton.jit
def _row_pulls(
    z, centres, index, weights, sums, b, width, slots, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Σ_s weight_is (z_i − c_index_is)."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_tile = load_rows(z, rows, rows_exist, k, width).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for s in range(slots):
        pair = rows.to(tl.int64) * slots + s
        centre = tl.load(index + pair, mask=rows_exist, other=0)
        weight = tl.load(weights + pair, mask=rows_exist, other=0.0)
        centre_tile = load_rows(centres, centre, rows_exist, k, width).to(tl.float32)
        total += weight[:, None] * (row_tile - centre_tile)
    positions = rows.to(tl.int64)[:, None] * width + k[None, :]
    tl.store(sums + positions, total, mask=rows_exist[:, None] & (k < width)[None, :])


@triton.jit
def _centre_pulls(
    z, centres, weights, order, bounds, sums, width, slots, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Σ weight (c − z_i) over the pairs of a centre; order: numbers of all pairs, sorted by centre,
    those of centre m from bounds[m] to bounds[m + 1]."""
    centre = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mine = tl.load(centres + centre * width + k, mask=k < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    end = tl.load(bounds + centre + 1)
    for position in range(tl.load(bounds + centre), end, BLOCK_N):
        place = position + tl.arange(0, BLOCK_N)
        pair = tl.load(order + place, mask=place < end, other=0)
        total = pull_listed(z, mine, pair // slots, place < end, weights, pair, k, width, total)
    tl.store(sums + centre * width + k, tl.sum(total, 0), mask=k < width)


def k_nearest_gradient(
    z_ND: Tensor,
    centres_MD: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    *,
    for_z: bool,
    for_centres: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (N, D) and (M, D), float32, of Σ_is weight_is ‖z_i − c_index_is‖²; None for one not
    asked for.

    One program owns a centre and adds up its pairs in the order of the rows, N·K / (16·M) steps
    where all centres have as many.
    """
    given, K = z_ND.shape[1], index_NK.shape[1]
    z_ND, centres_MD = aligned(z_ND), aligned(centres_MD)
    (N, D), M = z_ND.shape, centres_MD.shape[0]
    pairs = {
        "z": z_ND,
        "centres": centres_MD,
        "weights": 2 * weight_NK.float(),
        "width": D,
        "slots": K,
    }
    grad_z_ND = grad_centres_MD = None
    if for_z:
        grad_z_ND = torch.empty(N, D, dtype=torch.float32, device=z_ND.device)
        size = config("scan", architecture(z_ND.device), D, z_ND.dtype)
        launch(_row_pulls, (triton.cdiv(N, size.block_m), triton.cdiv(D, size.block_k)), size, **pairs,
               index=index_NK, sums=grad_z_ND, b=N)  # fmt: skip
        grad_z_ND = grad_z_ND[:, :given]
    if for_centres:
        grad_centres_MD = torch.empty(M, D, dtype=torch.float32, device=z_ND.device)
        chosen_P, order_P = torch.sort(index_NK.flatten(), stable=True)
        bounds = torch.searchsorted(chosen_P, torch.arange(M + 1, device=z_ND.device))
        launch(_centre_pulls, (M, triton.cdiv(D, SEGMENT.block_k)), SEGMENT, **pairs, order=order_P, bounds=bounds,
               sums=grad_centres_MD)  # fmt: skip
        grad_centres_MD = grad_centres_MD[:, :given]
    return grad_z_ND, grad_centres_MD
