"""Which pairs and triplets the metric losses use, found on a GPU in walks over the batch.

Shapes: b local rows (rows offset..offset+b of the batch), B rows of the batch, D width, R the most
positives any anchor has, S slots (numbers asked of each anchor at once), P parts of the batch.
Every search is for the least of some key of a pair, ties to the lowest row number: the farthest
positive is the one of least −d².  There NaN comes before everything, so that a row with NaN is
found and its NaN reaches the loss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.mining import FARTHEST, NEAREST
from .configs import config
from .distances import centred, squared_norms
from .launch import aligned, architecture, launch, operands, splits
from .random import absorb, exponential, seed_words, seeded, uniform
from .tiles import (
    CLOSE,
    in_order,
    inner_products,
    load_column,
    local_rows,
    same_class,
    split_tiles,
    squared_distances,
    tile_columns,
)

SLOTS = 16
"""Slots that one program serves in its walk over the batch; more of them walk in further
programs."""
NOBODY = tl.constexpr(2**31 - 1)
"""Row number where nothing was found."""
INF = tl.constexpr(float("inf"))
NEAREST_SQUARE = tl.constexpr(NEAREST**2)
FARTHEST_SQUARE = tl.constexpr(FARTHEST**2)
FAR = tl.constexpr(2.0**40)
"""A negative beyond FARTHEST has the key FAR·v: above the keys of all within (log q < 1, log E < 3,
while v ≥ 2^-32), and in the order of the noise alone, to which the power of two does nothing."""


def _inverse_lengths(rows: Tensor) -> Tensor:
    """1/‖row‖ in float32, 0 for a row of zeros."""
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return torch.where(norm == 0, 0.0, 1 / norm)


def _least_of_parts(key_PX: Tensor, chosen_PX: Tensor) -> Tensor:
    """Row number with the least key over the parts, int64, NOBODY turned into -1; the first part
    wins ties."""
    part_X = key_PX.argmin(0, keepdim=True)
    chosen_X = chosen_PX.gather(0, part_X).squeeze(0).to(torch.int64)
    return chosen_X.masked_fill(chosen_X == NOBODY.value, -1)


@triton.jit
def _keyed(value, wanted):
    """The wanted pairs' values as keys, NaN below and unwanted pairs above everything."""
    return tl.where(wanted, tl.where(value != value, -INF, value), INF)


@triton.jit
def _least(key, wanted, columns):
    """Least key of each row of a tile and the lowest row number that has it, of the wanted
    pairs."""
    least = tl.min(key, 1)
    return least, tl.min(tl.where(wanted & (key == least[:, None]), columns[None, :], NOBODY), 1)


@triton.jit
def _least_of_columns(key, wanted, rows):
    """Least key of each column of a tile and the lowest row number that has it, of the wanted
    pairs."""
    least = tl.min(key, 0)
    return least, tl.min(tl.where(wanted & (key == least[None, :]), rows[:, None], NOBODY), 0)


@triton.jit
def _offer(best, anchors, key, chosen):
    """best[anchors] = the lesser of itself and (key, chosen) in 64 bits, key first; nothing where
    NOBODY was chosen.

    The one thing programs do to each other's results: a minimum, which is the same in whatever
    order it is taken.
    """
    offered = (in_order(key).to(tl.int64) << 32) | chosen.to(tl.int64)
    tl.atomic_min(best + anchors, offered, mask=chosen != NOBODY, sem="relaxed")


@triton.jit
def _hardest(
    z, norms, labels, all_z, all_norms, all_labels, best, b, B, width, offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Each anchor's farthest row of its class (the first b of best) and nearest of another (the
    other b).

    SYMMETRIC: the local rows are the batch. Then only tiles on the diagonal and to the right of it
    are made, and their columns are anchors too.
    """
    rows, rows_exist = local_rows(b, BLOCK_M)
    positive_key = tl.full((BLOCK_M,), INF, tl.float32)
    negative_key = tl.full((BLOCK_M,), INF, tl.float32)
    positive = tl.full((BLOCK_M,), NOBODY, tl.int32)
    negative = tl.full((BLOCK_M,), NOBODY, tl.int32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    if SYMMETRIC:
        first = tl.maximum(first, tl.program_id(0) * BLOCK_M // BLOCK_N)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        squared = squared_distances(
            z, norms, rows, rows_exist, offset, all_z, all_norms, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        same, differ = same_class(
            labels, rows, rows_exist, all_labels, columns, columns_exist, offset
        )
        keys = _keyed(-squared, same)
        key, at = _least(keys, same, columns)
        # Rows are walked upwards: an equal key later on has a higher number. One that is found
        # beats none.
        better = (key < positive_key) | (positive == NOBODY)
        positive_key, positive = tl.where(better, key, positive_key), tl.where(better, at, positive)
        if SYMMETRIC:
            key, at = _least_of_columns(keys, same, rows)
            _offer(best, columns, key, at)
        keys = _keyed(squared, differ)
        key, at = _least(keys, differ, columns)
        better = (key < negative_key) | (negative == NOBODY)
        negative_key, negative = tl.where(better, key, negative_key), tl.where(better, at, negative)
        if SYMMETRIC:
            key, at = _least_of_columns(keys, differ, rows)
            _offer(best + b, columns, key, at)
    _offer(best, rows, positive_key, positive)
    _offer(best + b, rows, negative_key, negative)


def hardest_pairs(
    z_bD: Tensor, z_BD: Tensor, labels_b: Tensor, labels_B: Tensor, *, offset: int
) -> tuple[Tensor, Tensor]:
    """The farthest row of each anchor's class and the nearest of another, int64 (b,); -1 where
    there is none."""
    z_bD, z_BD = centred(z_bD, z_BD)
    (b, D), B = z_bD.shape, z_BD.shape[0]
    symmetric = b == B
    size = config("hardest" if symmetric else "rank", architecture(z_BD.device), D, z_BD.dtype)
    # Half of a symmetric grid has nothing to do and the rest walks are of all lengths: more and
    # shorter ones even out.
    parts, tiles_per_split = splits(b, B, size, finer=8 if symmetric else 1)
    best = torch.full((2, b), torch.iinfo(torch.int64).max, dtype=torch.int64, device=z_BD.device)
    launch(_hardest, (triton.cdiv(b, size.block_m), parts), size, z=z_bD, norms=squared_norms(z_bD),
           labels=labels_b.contiguous(), all_z=z_BD, all_norms=squared_norms(z_BD), all_labels=labels_B.contiguous(),
           best=best, b=b, B=B, width=D, offset=offset, tiles_per_split=tiles_per_split, SYMMETRIC=symmetric,
           **operands(z_BD))  # fmt: skip
    chosen = best & NOBODY.value
    positive_b, negative_b = chosen.masked_fill_(chosen == NOBODY.value, -1)
    return positive_b, negative_b


@triton.jit
def _reaches(
    z, norms, all_z, all_norms, positives, reaches, b, width, slots,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """d² of one positive of each of SIDE anchors; inf where there is none.

    Taken the way `_semihard` takes d² of negatives, in the same product tile: here the i-th
    anchor's positive is the i-th column, and the diagonal counts. A negative that repeats the
    positive then has the same bits, and is not beyond it. SIDE is the shorter side of the tile.
    """
    rows = tl.program_id(0) * SIDE + tl.arange(0, BLOCK_M)
    rows_exist = (tl.arange(0, BLOCK_M) < SIDE) & (rows < b)
    lane = tl.program_id(0) * SIDE + tl.arange(0, BLOCK_N)
    lane_exist = (tl.arange(0, BLOCK_N) < SIDE) & (lane < b)
    columns = tl.load(
        positives + lane.to(tl.int64) * slots + tl.program_id(1), mask=lane_exist, other=-1
    )
    product = inner_products(
        z, rows, rows_exist, all_z, columns, columns >= 0, width,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
    )  # fmt: skip
    product = tl.sum(tl.where(rows[:, None] == lane[None, :], product, 0.0), 1)
    positive = tl.load(
        positives + rows.to(tl.int64) * slots + tl.program_id(1), mask=rows_exist, other=-1
    )
    exist = positive >= 0
    scale = tl.load(norms + rows, mask=exist, other=0.0) + tl.load(
        all_norms + positive, mask=exist, other=0.0
    )
    squared = scale - 2 * product
    close = exist & (squared < scale * CLOSE)
    if tl.max(close.to(tl.int32)) > 0:
        exact = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(0, width):
            difference = load_column(z, rows, exist, k, width) - load_column(
                all_z, positive, exist, k, width
            )
            exact += difference * difference
        squared = tl.where(close, exact, squared)
    positions = rows.to(tl.int64) * (slots + 1) + tl.program_id(1) + 1
    tl.store(reaches + positions, tl.where(exist, squared, INF), mask=rows_exist)


@triton.jit
def _semihard(
    z, norms, labels, all_z, all_norms, all_labels, reaches, keys, chosen, b, B, width, slots, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Each anchor's nearest negative strictly beyond each of its reaches, `slots` in all, SLOTS in
    this program."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    slot = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)
    positions = rows.to(tl.int64)[:, None] * slots + slot[None, :]
    exist = rows_exist[:, None] & (slot < slots)[None, :]
    # Positives come first and padding last, so a block of anchors with few positives is done after
    # few slots.
    wanted = tl.load(reaches + positions, mask=exist, other=INF) < INF
    last_slot = tl.max(tl.where(wanted, slot[None, :] + 1, 0))
    row_norm = tl.load(norms + rows, mask=rows_exist, other=0.0)
    least = tl.full((BLOCK_M, SLOTS), INF, tl.float32)
    nearest = tl.full((BLOCK_M, SLOTS), NOBODY, tl.int32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, tl.where(last_slot > 0, last, first)):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        product = inner_products(
            z, rows, rows_exist, all_z, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        scale = (
            row_norm[:, None] + tl.load(all_norms + columns, mask=columns_exist, other=0.0)[None, :]
        )
        squared = scale - 2 * product
        _, differ = same_class(labels, rows, rows_exist, all_labels, columns, columns_exist, 0)
        # Not tiles.squared_distances: that would take near-duplicates of the same class again too,
        # often, in vain.
        close = differ & (squared < scale * CLOSE)
        if tl.max(close.to(tl.int32)) > 0:
            exact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, width):
                difference = (
                    load_column(z, rows, rows_exist, k, width)[:, None]
                    - load_column(all_z, columns, columns_exist, k, width)[None, :]
                )
                exact += difference * difference
            squared = tl.where(close, exact, squared)
        key = _keyed(squared, differ)
        for s in range(tl.program_id(2) * SLOTS, last_slot):
            reach = tl.load(reaches + rows.to(tl.int64) * slots + s, mask=rows_exist, other=INF)
            beyond = differ & ((key > reach[:, None]) | (key == -INF))
            slot_key, at = _least(tl.where(beyond, key, INF), beyond, columns)
            better = (slot[None, :] == s) & ((slot_key[:, None] < least) | (nearest == NOBODY))
            least = tl.where(better, slot_key[:, None], least)
            nearest = tl.where(better, at[:, None], nearest)
    part = tl.program_id(1).to(tl.int64) * b * slots
    tl.store(keys + part + positions, least, mask=exist)
    tl.store(chosen + part + positions, nearest, mask=exist)


def semihard_negatives(
    z_bD: Tensor, z_BD: Tensor, labels_b: Tensor, labels_B: Tensor, positive_bR: Tensor
) -> Tensor:
    """For each positive the nearest negative strictly farther than it; without one, the nearest
    negative.

    positive_bR: row numbers, each anchor's padded at the end with -1, where the result int64 (b, R)
        is -1 too.
    """
    R = positive_bR.shape[1]
    if R == 0:
        return positive_bR
    z_bD, z_BD = centred(z_bD, z_BD)
    (b, D), B = z_bD.shape, z_BD.shape[0]
    rows = {
        "z": z_bD,
        "norms": squared_norms(z_bD),
        "all_z": z_BD,
        "all_norms": squared_norms(z_BD),
    }
    size = config("mine", architecture(z_BD.device), D, z_BD.dtype)
    # The first slot's reach lies below every distance: beyond it is the nearest negative of all.
    S = R + 1
    reach_bS = torch.full((b, S), -torch.inf, dtype=torch.float32, device=z_BD.device)
    side = min(size.block_m, size.block_n)
    launch(_reaches, (triton.cdiv(b, side), R), size, **rows, positives=positive_bR.contiguous(), reaches=reach_bS,
           b=b, width=D, slots=R, SIDE=side, **operands(z_BD))  # fmt: skip
    parts, tiles_per_split = splits(b, B, size)
    keys = torch.empty(parts, b, S, dtype=torch.float32, device=z_BD.device)
    chosen = torch.empty_like(keys, dtype=torch.int32)
    launch(_semihard, (triton.cdiv(b, size.block_m), parts, triton.cdiv(S, SLOTS)), size, **rows,
           labels=labels_b.contiguous(), all_labels=labels_B.contiguous(), reaches=reach_bS, keys=keys, chosen=chosen,
           b=b, B=B, width=D, slots=S, tiles_per_split=tiles_per_split, SLOTS=SLOTS, **operands(z_BD))  # fmt: skip
    chosen_bS = _least_of_parts(keys, chosen)
    nearest_b1, beyond_bR = chosen_bS[:, :1], chosen_bS[:, 1:]
    return torch.where(beyond_bR < 0, nearest_b1, beyond_bR).masked_fill(positive_bR < 0, -1)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _sampled(
    z, inverses, labels, all_z, all_inverses, all_labels, positives, keys, chosen, seed_low, seed_high, b, B, width,
    slots, offset, dimensions, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """For each positive the negative of largest log weight + Gumbel noise: log 1/q − log E, so of
    least log q + log E.

    log q = (D − 2) log d + (D − 3)/2 · log(1 − d²/4), d clamped; E: exponential noise of (anchor,
    positive, negative). d is the distance of the unit rows in D = dimensions; inverses: 1/‖row‖, 0
    for a row of zeros, which stays zero.
    """
    rows, rows_exist = local_rows(b, BLOCK_M)
    slot = tl.program_id(2) * SLOTS + tl.arange(0, SLOTS)
    positions = rows.to(tl.int64)[:, None] * slots + slot[None, :]
    exist = rows_exist[:, None] & (slot < slots)[None, :]
    wanted = tl.load(positives + positions, mask=exist, other=-1) >= 0
    last_slot = tl.max(tl.where(wanted, slot[None, :] + 1, 0))
    inverse = tl.load(inverses + rows, mask=rows_exist, other=0.0)
    anchor_state = absorb(seeded(seed_low, seed_high), rows + offset)
    least = tl.full((BLOCK_M, SLOTS), INF, tl.float32)
    drawn = tl.full((BLOCK_M, SLOTS), NOBODY, tl.int32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, tl.where(last_slot > 0, last, first)):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        product = inner_products(
            z, rows, rows_exist, all_z, columns, columns_exist, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        # Unit rows at a distance of at least NEAREST: nothing cancels, nothing need be mended.
        column_inverse = tl.load(all_inverses + columns, mask=columns_exist, other=0.0)
        lengths = (
            tl.where(inverse > 0, 1.0, 0.0)[:, None]
            + tl.where(column_inverse > 0, 1.0, 0.0)[None, :]
        )
        squared = lengths - 2 * product * inverse[:, None] * column_inverse[None, :]
        clamped = tl.minimum(tl.maximum(squared, NEAREST_SQUARE), FARTHEST_SQUARE)
        log_q = tl.log(clamped) * ((dimensions - 2) * 0.5) + tl.log(1.0 - clamped * 0.25) * (
            (dimensions - 3) * 0.5
        )
        _, differ = same_class(labels, rows, rows_exist, all_labels, columns, columns_exist, 0)
        weight = tl.where(differ, tl.where(squared <= FARTHEST_SQUARE, log_q, FAR), INF)
        for s in range(tl.program_id(2) * SLOTS, last_slot):
            positive = tl.load(positives + rows.to(tl.int64) * slots + s, mask=rows_exist, other=-1)
            state = absorb(anchor_state, positive)
            v = uniform(absorb(state[:, None], columns[None, :]))
            key = tl.where(weight < FAR, weight + tl.log(exponential(v)), weight * v)
            slot_key, at = _least(key, weight < INF, columns)
            better = (slot[None, :] == s) & (slot_key[:, None] < least)
            least = tl.where(better, slot_key[:, None], least)
            drawn = tl.where(better, at[:, None], drawn)
    part = tl.program_id(1).to(tl.int64) * b * slots
    tl.store(keys + part + positions, least, mask=exist)
    tl.store(chosen + part + positions, drawn, mask=exist)


def sampled_negatives(
    z_bD: Tensor,
    z_BD: Tensor,
    labels_b: Tensor,
    labels_B: Tensor,
    positive_bR: Tensor,
    *,
    offset: int,
    seed: int,
) -> Tensor:
    """One negative for each positive, drawn as in `reference.mining.distance_weighted_negatives`;
    int64 (b, R).

    z: rows of any length; distances are those of the unit rows.  positive_bR: each anchor's padded
    at the end with -1, where the result is -1 too.  seed: its low 64 bits count.
    """
    dimensions, R = z_BD.shape[1], positive_bR.shape[1]
    if R == 0:
        return positive_bR
    z_bD, z_BD = aligned(z_bD), aligned(z_BD)
    (b, D), B = z_bD.shape, z_BD.shape[0]
    seed_low, seed_high = seed_words(seed)
    size = config("mine", architecture(z_BD.device), D, z_BD.dtype)
    parts, tiles_per_split = splits(b, B, size)
    keys = torch.empty(parts, b, R, dtype=torch.float32, device=z_BD.device)
    chosen = torch.empty_like(keys, dtype=torch.int32)
    launch(_sampled, (triton.cdiv(b, size.block_m), parts, triton.cdiv(R, SLOTS)), size, z=z_bD,
           inverses=_inverse_lengths(z_bD), labels=labels_b.contiguous(), all_z=z_BD,
           all_inverses=_inverse_lengths(z_BD), all_labels=labels_B.contiguous(), positives=positive_bR.contiguous(),
           keys=keys, chosen=chosen, seed_low=seed_low, seed_high=seed_high, b=b, B=B, width=D, slots=R, offset=offset,
           dimensions=float(dimensions), tiles_per_split=tiles_per_split, SLOTS=SLOTS, **operands(z_BD))  # fmt: skip
    return _least_of_parts(keys, chosen).masked_fill(positive_bR < 0, -1)
