"""Multi-cluster ranking on a GPU: adaptive distances, their loss, and its gradients for z and s.

Shapes: b local rows, B rows of the batch, N candidates, D width, M clusters. Formulas:
docs/algorithm.md.

    D²_ij = Σ_k s_ik z_ik² − 2 (s_i∘z_i)·z_j + s_i·(z_j∘z_j)        one product of inner width 2D
    W_ij  = (dloss/dD) / D_ij
    as anchor     grad z_i = s_i∘(z_i Σ_j W_ij − Σ_j W_ij z_j),   grad s_i = ½ Σ_j W_ij (z_i − z_j)²
    as candidate  grad z_j = z_j∘Σ_i W_ij s_i − Σ_i W_ij s_i∘z_i
The two sides are two kernels, because another row owns the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .distances import centred, nearest_counted, root_mean_square
from .gradient_sums import is_chunked, owner_sums, product
from .launch import aligned, architecture, both, launch, operands, splits
from .tiles import (
    CLOSE,
    load_rows,
    local_rows,
    mend,
    split_tiles,
    store_number,
    store_sums,
    store_weights,
    tile_columns,
)


@triton.jit
def _adaptive_products(
    z, s, anchors, anchors_exist, y, others, others_exist, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """−2 (s_i∘z_i)·y_j + s_i·(y_j∘y_j), anchors down (BLOCK_M), candidates across (BLOCK_N)."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        z_tile = load_rows(z, anchors, anchors_exist, k, width).to(tl.float32)
        s_tile = load_rows(s, anchors, anchors_exist, k, width).to(tl.float32)
        y_tile = load_rows(y, others, others_exist, k, width).to(tl.float32)
        product = tl.dot((-2 * s_tile * z_tile).to(OPERAND), tl.trans(y_tile).to(OPERAND), product,
                         input_precision=PRECISION)  # fmt: skip
        product = tl.dot(s_tile.to(OPERAND), tl.trans(y_tile * y_tile).to(OPERAND), product,
                         input_precision=PRECISION)  # fmt: skip
    return product


@triton.jit
def _adaptive_distances(
    z, s, constants, anchors, anchors_exist, first_anchor, y, others, others_exist, first_other, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D_ij, anchors down and candidates across, and which pairs count: both rows exist and differ.

    first_anchor, first_other: row number in the batch of the first row of each side.
    """
    constant = tl.load(constants + anchors, mask=anchors_exist, other=0.0)[:, None]
    product = _adaptive_products(
        z, s, anchors, anchors_exist, y, others, others_exist, width,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
    )  # fmt: skip
    # Where D² is small beside the anchor's own term, the candidate's term is as large: the scale is
    # twice it.
    limit = tl.where(constant > 0, constant * (2 * CLOSE), float("-inf"))
    squared = mend(
        constant + product, limit, z, s, anchors, anchors_exist, y, others, width, BLOCK_K=16
    )  # fmt: skip
    itself = (anchors + first_anchor)[:, None] == (others + first_other)[None, :]
    counts = anchors_exist[:, None] & others_exist[None, :] & ~itself
    return tl.sqrt(squared), counts


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _rank(distance, far, step, sharpness, CLUSTERS: tl.constexpr):
    """Σ_m p_m r_m and its derivative by the distance; r_m = |D − η_m|, p = softmax(−κ r), κ =
    sharpness.

    η_m = far − m·step. A centre exactly at the distance has derivative 0.
    """
    if CLUSTERS == 2:  # one exponential a pair
        from_far, from_near = distance - far, distance - far + step
        gap = tl.abs(from_near) - tl.abs(from_far)
        p_near = 1 / (1 + tl.exp(sharpness * gap))
        loss = tl.abs(from_far) + p_near * gap
        share = 1 - p_near + sharpness * p_near * (1 - p_near) * gap
        return loss, share * _sign(from_far) + (1 - share) * _sign(from_near)
    nearest = tl.abs(distance - far)
    for m in tl.static_range(1, CLUSTERS):
        nearest = tl.minimum(nearest, tl.abs(distance - (far - m * step)))
    mass = tl.zeros_like(distance)
    weighted = tl.zeros_like(distance)
    signed = tl.zeros_like(distance)
    signed_weighted = tl.zeros_like(distance)
    for m in tl.static_range(CLUSTERS):
        residual = distance - (far - m * step)
        r = tl.abs(residual)
        side = _sign(residual)
        e = tl.exp(sharpness * (nearest - r))
        mass += e
        weighted += e * r
        signed += e * side
        signed_weighted += e * side * r
    loss = weighted / mass
    return loss, (signed - sharpness * (signed_weighted - loss * signed)) / mass


@triton.jit
def _weighted_norms(z, s, out, b, width, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ_k s_ik z_ik²."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        z_tile = load_rows(z, rows, rows_exist, k, width).to(tl.float32)
        total += tl.sum(
            load_rows(s, rows, rows_exist, k, width).to(tl.float32) * z_tile * z_tile, 1
        )
    tl.store(out + rows, total, mask=rows_exist)


@triton.jit
def _losses(
    z, s, constants, far, step, all_z, losses, b, B, width, offset, sharpness, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Each anchor's loss alone, for evaluation without gradients."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    row_far = tl.load(far + rows, mask=rows_exist, other=0.0)[:, None]
    row_step = tl.load(step + rows, mask=rows_exist, other=0.0)[:, None]
    total = tl.zeros((BLOCK_M,), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        distance, counts = _adaptive_distances(
            z, s, constants, rows, rows_exist, offset, all_z, columns, columns_exist, 0, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        loss, _ = _rank(distance, row_far, row_step, sharpness, CLUSTERS=CLUSTERS)
        total += tl.sum(tl.where(counts, loss, 0.0), 1)
    store_number(losses, 0, total, rows, rows_exist, b)


@triton.jit
def _anchors(
    z, s, constants, far, step, all_z, unit, weights, sums, totals, b, B, width, offset, sharpness,
    tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CLUSTERS: tl.constexpr, NEAREST: tl.constexpr,
    CHUNKED: tl.constexpr,
):  # fmt: skip
    """Local rows as anchors: Σ_j W_ij and their losses (totals), Σ_j W_ij z_j and Σ_j W_ij z_j²
    (sums)."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    row_far = tl.load(far + rows, mask=rows_exist, other=0.0)[:, None]
    row_step = tl.load(step + rows, mask=rows_exist, other=0.0)[:, None]
    one = tl.load(unit)
    loss_sum = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    pulled = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pulled_square = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        columns, columns_exist = tile_columns(tile, B, BLOCK_N)
        distance, counts = _adaptive_distances(
            z, s, constants, rows, rows_exist, offset, all_z, columns, columns_exist, 0, width,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        loss, slope = _rank(distance, row_far, row_step, sharpness, CLUSTERS=CLUSTERS)
        loss_sum += tl.sum(tl.where(counts, loss, 0.0), 1)
        weight = tl.where(
            counts & (distance != 0), slope * one / tl.maximum(distance, NEAREST * one), 0.0
        )
        if CHUNKED:
            total += store_weights(weights, weight, rows, rows_exist, columns, columns_exist, b, B)
        else:
            # The total is taken of the rounded weights, which are what the products see.
            weight = weight.to(OPERAND)
            total += tl.sum(weight.to(tl.float32), 1)
            y = load_rows(all_z, columns, columns_exist, tl.arange(0, BLOCK_D), width).to(
                tl.float32
            )
            pulled = tl.dot(weight, y.to(OPERAND), pulled, input_precision=PRECISION)
            pulled_square = tl.dot(
                weight, (y * y).to(OPERAND), pulled_square, input_precision=PRECISION
            )
    store_number(totals, 0, total, rows, rows_exist, b)
    store_number(totals, 1, loss_sum, rows, rows_exist, b)
    if not CHUNKED:
        store_sums(sums, 0, pulled, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)
        store_sums(sums, 1, pulled_square, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)


@triton.jit
def _candidates(
    z, all_z, all_s, all_constants, all_far, all_step, unit, weights, sums, totals, b, B, width, offset, sharpness,
    tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, CLUSTERS: tl.constexpr, NEAREST: tl.constexpr,
    CHUNKED: tl.constexpr,
):  # fmt: skip
    """Local rows as candidates of every anchor of the batch: Σ_i W_ij s_i and Σ_i W_ij s_i∘z_i."""
    rows, rows_exist = local_rows(b, BLOCK_M)
    one = tl.load(unit)
    pulled = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pulled_z = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, last = split_tiles(B, BLOCK_N, tiles_per_split)
    for tile in range(first, last):
        anchors, anchors_exist = tile_columns(tile, B, BLOCK_N)
        distance, counts = _adaptive_distances(
            all_z, all_s, all_constants, anchors, anchors_exist, 0, z, rows, rows_exist, offset, width,
            BLOCK_M=BLOCK_N, BLOCK_N=BLOCK_M, BLOCK_K=BLOCK_K, OPERAND=OPERAND, PRECISION=PRECISION,
        )  # fmt: skip
        far = tl.load(all_far + anchors, mask=anchors_exist, other=0.0)[:, None]
        step = tl.load(all_step + anchors, mask=anchors_exist, other=0.0)[:, None]
        _, slope = _rank(distance, far, step, sharpness, CLUSTERS=CLUSTERS)
        weight = tl.where(
            counts & (distance != 0), slope * one / tl.maximum(distance, NEAREST * one), 0.0
        )
        weight = tl.trans(weight)
        if CHUNKED:
            store_weights(weights, weight, rows, rows_exist, anchors, anchors_exist, b, B)
        else:
            weight = weight.to(OPERAND)
            k = tl.arange(0, BLOCK_D)
            z_tile = load_rows(all_z, anchors, anchors_exist, k, width).to(tl.float32)
            s_tile = load_rows(all_s, anchors, anchors_exist, k, width).to(tl.float32)
            pulled = tl.dot(weight, s_tile.to(OPERAND), pulled, input_precision=PRECISION)
            pulled_z = tl.dot(
                weight, (s_tile * z_tile).to(OPERAND), pulled_z, input_precision=PRECISION
            )
    if not CHUNKED:
        store_sums(sums, 0, pulled, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)
        store_sums(sums, 1, pulled_z, rows, rows_exist, b, width, BLOCK_D=BLOCK_D)


def _constants(z: Tensor, s: Tensor) -> Tensor:
    """Σ_k s_ik z_ik² of each row, float32; by a kernel, so that no (B, D) product is stored."""
    b, D = z.shape
    size = config("scan", architecture(z.device), D, z.dtype)
    out = torch.empty(b, dtype=torch.float32, device=z.device)
    launch(_weighted_norms, (triton.cdiv(b, size.block_m),), size, z=z, s=s, out=out, b=b, width=D)
    return out


def ranking(
    z_bD: Tensor,
    s_bD: Tensor,
    z_ND: Tensor,
    s_BD: Tensor,
    far_B: Tensor,
    step_B: Tensor,
    *,
    offset: int,
    clusters: int,
    sharpness: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each local anchor's Σ_{j≠i} Σ_m p r, float32 (b,), and the batch's gradients for the local z
    and s, (b, D).

    Centres of anchor i: η_m = far_i − m·step_i, m = 0..clusters − 1.
    z_ND: the B anchors first; what follows is constant.
    """
    given = z_ND.shape[1]
    if z_ND.dtype == torch.float16:  # s∘z and z∘z leave its range, at both ends
        z_bD, z_ND = both(Tensor.float, z_bD, z_ND)
    z_bD, z_ND = centred(z_bD, z_ND, half_too=True)
    s_bD, s_BD = both(lambda rows: aligned(rows.to(z_ND.dtype)), s_bD, s_BD)
    (b, D), B, N = z_bD.shape, s_BD.shape[0], z_ND.shape[0]
    z_BD = z_ND[:B]
    here = slice(offset, offset + b)
    anchors = {
        "z": z_bD,
        "s": s_bD,
        "constants": _constants(z_bD, s_bD),
        "far": far_B[here],
        "step": step_B[here],
    }
    fixed: dict[str, Any] = {"sharpness": float(sharpness * (clusters - 1)), "CLUSTERS": clusters}
    if not with_grad:
        size = config("rank", architecture(z_BD.device), D, z_BD.dtype)
        parts, tiles_per_split = splits(b, N, size)
        losses = torch.empty(1, parts, b, dtype=torch.float32, device=z_BD.device)
        launch(_losses, (triton.cdiv(b, size.block_m), parts), size, **anchors, **fixed, all_z=z_ND, losses=losses, b=b,
               B=N, width=D, offset=offset, tiles_per_split=tiles_per_split, **operands(z_BD))  # fmt: skip
        return losses.sum((0, 1)), None, None

    unit = root_mean_square(z_ND)
    fixed |= {"unit": unit, "NEAREST": nearest_counted(z_BD.dtype)}
    per_unit = torch.where(unit > 0, 1 / unit, 0.0)
    loss_b = torch.empty(b, dtype=torch.float32, device=z_BD.device)
    grad_z_bD = torch.zeros(b, given, dtype=torch.float32, device=z_BD.device)
    grad_s_bD = torch.empty_like(grad_z_bD)

    def pulled_by(some: slice) -> list[Tensor]:
        return [s_BD[some], s_BD[some] * z_BD[some]]

    def add_as_candidates(some: slice, weight_RD: Tensor, weight_z_RD: Tensor) -> None:
        grad_z_bD[some] += (per_unit * (z_bD[some] * weight_RD - weight_z_RD))[:, :given]

    def columns_as_candidates(some: slice, window: slice, weights: Tensor) -> None:
        candidates = min(window.stop, B) - window.start  # memory rows, beyond B, are constants
        if candidates > 0:
            sums_CX = product(weights[..., :candidates].mT, torch.cat(pulled_by(some), 1))
            add_as_candidates(slice(window.start, window.start + candidates), *sums_CX.chunk(2, 1))

    # Where local rows are all there are, a chunk's weights serve its columns too, and no second
    # walk is needed.
    once = b == B and is_chunked(z_bD, 2)
    for some, (pulled_RD, pulled_square_RD), (total_R, loss_R) in owner_sums(
        _anchors, rows=anchors, columns={"all_z": z_ND}, fixed=fixed,
        values=lambda window: [z_ND[window], z_ND[window].square()], accumulators=2, numbers=2, offset=offset,
        transposed=columns_as_candidates if once else None):  # fmt: skip
        loss_b[some] = loss_R
        z_RD, total_R1 = z_bD[some].float(), total_R[:, None]
        grad_z_bD[some] += (per_unit * (s_bD[some] * (z_RD * total_R1 - pulled_RD)))[:, :given]
        grad_s_bD[some] = (
            per_unit / 2 * (z_RD * (z_RD * total_R1 - 2 * pulled_RD) + pulled_square_RD)
        )[:, :given]
    if not once:
        for some, (weight_RD, weight_z_RD), _ in owner_sums(
            _candidates, rows={"z": z_bD},
            columns={"all_z": z_BD, "all_s": s_BD, "all_constants": _constants(z_BD, s_BD), "all_far": far_B,
                     "all_step": step_B},
            fixed=fixed, values=pulled_by, accumulators=2, numbers=0, offset=offset):  # fmt: skip
            add_as_candidates(some, weight_RD, weight_z_RD)
    return loss_b, grad_z_bD, grad_s_bD
