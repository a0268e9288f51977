"""The sums that a gradient is made of, each row's by the one program that owns it: no atomics, one
fixed order.

A kernel recomputes its tile of pairs, turns it into pair weights W, and the owner of row i needs
Σ_j W_ij y_j for one or two matrices y, and Σ_j W_ij. Two ways, chosen by the embedding's width:
  fused    the sums stay in registers while the program walks the batch; y is loaded (or made) tile
           by tile
  chunked  an accumulator as wide as the embedding no longer fits: the kernel writes a chunk of W,
           some rows by some columns, and the library multiplies it by y; where the columns' own
           sums are wanted, the same chunk serves
Shapes: b local rows, N columns (the rows they are paired with), D width, A accumulators (1 or 2),
R×C a chunk, P parts of a weight: 1, or 2 for float32, which is kept as a rounded part and the rest
of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import Config, config, widest_gather
from .launch import architecture, launch, operands, splits

CHUNK_BYTES = 32 * 2**20
"""Memory of a chunk of pair weights, as square as the batch allows: 4096 × 4096 pairs in half
types. Small enough to be read out of the cache, large enough to give every multiprocessor a share
of its products."""
CHUNK_SIDE = 16384
"""Most rows, or columns, of a chunk that is not square: their sums, or y, are kept beside it."""

Transposed = Callable[[slice, slice, Tensor], None]
"""What is told of each chunk: its rows, its columns, its weights (P, R, C)."""


def is_chunked(rows_bD: Tensor, accumulators: int) -> bool:
    """Whether the sums of such rows, their width aligned, are made chunk by chunk."""
    return rows_bD.shape[1] > widest_gather(accumulators, rows_bD.dtype)


def owner_sums(
    kernel: Any,
    *,
    rows: dict[str, Tensor],
    columns: dict[str, Tensor],
    fixed: dict[str, Any],
    values: Callable[[slice], list[Tensor]],
    accumulators: int,
    numbers: int,
    offset: int | None,
    transposed: Transposed | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows at a time: which, Σ_j W_ij y_j for each y, (accumulators, R, D), and `numbers`
    sums, (numbers, R).

    kernel: takes `rows` (tensors with a line a local row, the first of them (b, D)), `columns`
        (with a line a column), `fixed`, b and B lines of each, width, tiles_per_split and, unless
        that is None, offset (row i is column i + offset). It writes `totals` (numbers, splits, b)
        and `sums` (accumulators, splits, b, D), or, when CHUNKED, `weights` (P, b, B) in place of
        the sums.
    values: the y of some columns, (C, D) each, for the chunked way; a fused kernel makes its own.
    transposed: called with every chunk before its rows are told, in the chunked way alone.
    All results are float32.
    """
    first = next(iter(rows.values()))
    (b, D), N = first.shape, next(iter(columns.values())).shape[0]
    fixed = fixed | operands(first) | {"width": D}
    many = "" if accumulators == 1 else str(accumulators)
    if not is_chunked(first, accumulators):
        size = config("gather" + many, architecture(first.device), D, first.dtype)
        parts, _ = splits(b, N, size)
        sums = torch.empty(accumulators, parts, b, D, dtype=torch.float32, device=first.device)
        if offset is not None:
            fixed |= {"offset": offset}
        totals = _start(kernel, size, rows | columns | fixed, b, N, numbers, first.device, weights=None, sums=sums,
                        BLOCK_D=max(16, triton.next_power_of_2(D)), CHUNKED=False)  # fmt: skip
        yield slice(0, b), sums[:, 0] if parts == 1 else sums.sum(1), totals
        return

    size = config("weights" + many, architecture(first.device), D, first.dtype)
    kept = 2 if first.dtype == torch.float32 else 1
    height, width = _chunk(b, N, CHUNK_BYTES // (kept * first.dtype.itemsize), size)
    for some in _pieces(b, height):
        R = some.stop - some.start
        sums = torch.zeros(accumulators, R, D, dtype=torch.float32, device=first.device)
        totals = torch.zeros(numbers, R, dtype=torch.float32, device=first.device)
        for window in _pieces(N, width):
            C = window.stop - window.start
            weights = torch.empty(kept, R, C, dtype=first.dtype, device=first.device)
            lines: dict[str, Any] = {name: tensor[some] for name, tensor in rows.items()}
            lines |= {name: tensor[window] for name, tensor in columns.items()}
            if offset is not None:
                lines["offset"] = offset + some.start - window.start
            totals += _start(kernel, size, lines | fixed, R, C, numbers, first.device, weights=weights, sums=None,
                             BLOCK_D=16, CHUNKED=True)  # fmt: skip
            y = values(window)
            sums += (
                product(weights, y[0] if len(y) == 1 else torch.cat(y, 1))
                .view(R, accumulators, D)
                .movedim(1, 0)
            )
            if transposed is not None:
                transposed(some, window, weights)
            del weights  # before there are those of the next
        yield some, sums, totals


def _chunk(b: int, N: int, pairs: int, size: Config) -> tuple[int, int]:
    """Rows and columns of a chunk of so many pairs: square, or longer where the batch is narrow."""

    def whole_tiles(rows: int) -> int:
        return max(1, rows // size.block_m) * size.block_m

    height = whole_tiles(min(b + size.block_m - 1, math.isqrt(pairs)))
    width = max(1, min(N, whole_tiles(min(pairs // height, CHUNK_SIDE))))
    return whole_tiles(min(pairs // width, CHUNK_SIDE)), width


def _pieces(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _start(
    kernel: Any, size: Config, arguments: dict[str, Any], b: int, B: int, numbers: int, device: torch.device,
    **results: Any,
) -> Tensor:  # fmt: skip
    """Start the kernel for b rows and B columns; its totals, (numbers, b)."""
    parts, tiles_per_split = splits(b, B, size)
    totals = torch.empty(numbers, parts, b, dtype=torch.float32, device=device)
    launch(kernel, (triton.cdiv(b, size.block_m), parts), size, **arguments, b=b, B=B, tiles_per_split=tiles_per_split,
           totals=totals, **results)  # fmt: skip
    return totals.sum(1)


def product(weights_PRC: Tensor, value_CX: Tensor) -> Tensor:
    """Σ_p weights_p @ value, (R, X), added up and returned in float32 whatever the operands are.

    float32 takes three TF32 products of rounded parts, as the kernels do: as exact as float32 in
    practice, and on the matrix units.
    """
    if not value_CX.is_cuda:
        return weights_PRC.sum(0, dtype=torch.float32) @ value_CX.float()
    if value_CX.dtype != torch.float32:
        return torch.mm(weights_PRC[0], value_CX, out_dtype=torch.float32)
    rounded_RC, rest_RC = weights_PRC
    # To TF32's 10 bits of mantissa, half away from zero; what is left fits into another such number
    # almost.
    rounded_CX = ((value_CX.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        return (
            (rounded_RC @ (value_CX - rounded_CX))
            .addmm_(rest_RC, rounded_CX)
            .addmm_(rounded_RC, rounded_CX)
        )
    finally:
        matmul.fp32_precision = before
