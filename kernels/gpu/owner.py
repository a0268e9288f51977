"""The sums that a gradient is made of, each row's by the one program that owns it: no atomics, one fixed order.

A kernel recomputes its tile of pairs, turns it into pair weights W, and the owner of row i needs Σ_j W_ij y_j for one
or two matrices y, and Σ_j W_ij. Two ways, chosen by the embedding's width:
  fused    the sums stay in registers while the program walks the batch; y is loaded (or made) tile by tile
  chunked  an accumulator as wide as the embedding no longer fits: the kernel writes W for a chunk of rows and the
           library multiplies it by y
Shapes: b local rows, B rows of the batch, D width, A accumulators (1 or 2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import config, widest_gather
from .launch import architecture, launch, operands, splits

CHUNK_BYTES = 64 * 2**20
"""Memory of a chunk of pair weights; more only where one tile of rows takes more."""


def owner_sums(
    kernel: Any,
    *,
    rows: dict[str, Tensor],
    fixed: dict[str, Any],
    matrices: Callable[[], list[Tensor]],
    accumulators: int,
    numbers: int,
    offset: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """Σ_j W_ij y_j for each of `accumulators` y, (accumulators, b, D), and `numbers` sums a row, (numbers, b).

    kernel: takes `rows` (tensors with a line a local row, the first of them (b, D)), `fixed`, b, B, width, offset and
        tiles_per_split. It writes `totals` (numbers, splits, b) and `sums` (accumulators, splits, b, D), or, when
        CHUNKED, `weights` (b, B) in place of the sums.
    matrices: makes the y of the chunked way, (columns, D) each; a fused kernel makes its own.
    All results are float32.
    """
    first = next(iter(rows.values()))
    (b, D), device, dtype = first.shape, first.device, first.dtype
    common = fixed | operands(first) | {"B": columns, "width": D}
    sums = torch.empty(accumulators, b, D, dtype=torch.float32, device=device)
    totals = torch.empty(numbers, b, dtype=torch.float32, device=device)
    if widest_gather(accumulators, dtype) >= D:
        size = config("gather" if accumulators == 1 else "gather2", architecture(device), D, dtype)
        parts, tiles_per_split = splits(b, columns, size)
        part_sums = sums[:, None] if parts == 1 else sums.new_empty(accumulators, parts, b, D)
        part_totals = totals.new_empty(numbers, parts, b)
        launch(kernel, (triton.cdiv(b, size.block_m), parts), size, **rows, **common, b=b, offset=offset,
               tiles_per_split=tiles_per_split, weights=None, sums=part_sums, totals=part_totals,
               BLOCK_D=max(16, triton.next_power_of_2(D)), CHUNKED=False)  # fmt: skip
        return (sums if parts == 1 else part_sums.sum(1)), part_totals.sum(1)

    size = config("weights" if accumulators == 1 else "weights2", architecture(device), D, dtype)
    values = matrices()
    chunk = max(size.block_m, CHUNK_BYTES // (dtype.itemsize * max(columns, 1)) // size.block_m * size.block_m)
    for start in range(0, b, chunk):
        some = slice(start, min(start + chunk, b))
        count = some.stop - start
        weights = torch.empty(count, columns, dtype=dtype, device=device)
        parts, tiles_per_split = splits(count, columns, size)
        part_totals = totals.new_empty(numbers, parts, count)
        launch(kernel, (triton.cdiv(count, size.block_m), parts), size,
               **{name: tensor[some] for name, tensor in rows.items()}, **common, b=count, offset=offset + start,
               tiles_per_split=tiles_per_split, weights=weights, sums=None, totals=part_totals, BLOCK_D=16,
               CHUNKED=True)  # fmt: skip
        totals[:, some] = part_totals.sum(1)
        for out_bD, value in zip(sums, values, strict=True):
            out_bD[some] = _product(weights, value)
    return sums, totals


def _product(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ value, added up and returned in float32 whatever the operands are."""
    if weights.dtype == torch.float32 or not weights.is_cuda:
        return weights.float() @ value.float()
    return torch.mm(weights, value, out_dtype=torch.float32)
