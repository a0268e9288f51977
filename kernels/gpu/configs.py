"""Tile sizes by kind of kernel, architecture, embedding width and dtype: a table, so that nothing
is tuned at run time.

Kinds:
  scan      a row reduction: one product tile, a few numbers a row
  rank      the same with much arithmetic a pair, which lives in registers
  mine      the same with several running winners a row
  hardest   a reduction both ways, of rows and of columns
  gather    a gradient: the product tile and one accumulator as wide as the embedding
  gather2   the same with two accumulators
  weights   writes its tile of pair weights, for embeddings too wide for an accumulator in registers
  weights2  the same where a gradient has two accumulators: multi-cluster ranking's arithmetic
Rows were chosen so that every kernel compiles without spills within each chip's shared memory
(kernels/aot.py checks it); `python -m namr_dist.kernels.gpu.tune` measures candidates on a GPU and
prints better rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Config:
    """Tile of block_m × block_n pairs, block_k of the width at a time; warps and pipeline stages of
    a program."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class Row(NamedTuple):
    """A line of the table: for `arch` and later ones until another row names them, and for widths
    up to `width`."""

    kind: str
    arch: int
    bits: int
    width: int
    config: Config


ANY = 2**31
"""No limit to the width."""

TABLE: tuple[Row, ...] = (
    #   kind        arch bits width          M    N   K  warps stages
    Row("scan",      80,  32,  ANY, Config( 64,  64, 32, 8, 3)),
    Row("scan",      90,  32,  ANY, Config(128,  64, 32, 8, 3)),
    Row("scan",     120,  32,  ANY, Config( 64,  64, 32, 8, 3)),
    Row("scan",      80,  16,  ANY, Config(128,  64, 64, 8, 3)),
    Row("scan",      90,  16,  ANY, Config(128, 128, 64, 8, 3)),
    Row("scan",     120,  16,  ANY, Config(128,  64, 64, 8, 3)),
    Row("rank",      80,  32,  ANY, Config( 64,  64, 16, 8, 3)),
    Row("rank",      90,  32,  ANY, Config(128,  64, 16, 8, 3)),
    Row("rank",     120,  32,  ANY, Config( 64,  64, 16, 8, 3)),
    Row("rank",      80,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("rank",      90,  16,  ANY, Config(128,  64, 64, 8, 3)),
    Row("rank",     120,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("mine",      80,  32,  ANY, Config( 64,  32, 32, 8, 2)),
    Row("mine",      90,  32,  ANY, Config( 64,  64, 32, 8, 2)),
    Row("mine",     120,  32,  ANY, Config( 64,  32, 32, 8, 2)),
    Row("mine",      80,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("mine",      90,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("mine",     120,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("hardest",   80,  32,  ANY, Config( 64,  32, 32, 8, 2)),
    Row("hardest",   90,  32,  ANY, Config( 64,  64, 32, 8, 2)),
    Row("hardest",  120,  32,  ANY, Config( 64,  32, 32, 8, 2)),
    Row("hardest",   80,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("hardest",   90,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("hardest",  120,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("gather",    80,  32,  ANY, Config( 64,  32, 32, 8, 2)),
    Row("gather",    90,  32,  ANY, Config( 64,  32, 32, 8, 2)),
    Row("gather",   120,  32,  ANY, Config( 64,  32, 32, 8, 2)),
    Row("gather",    80,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("gather",    90,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("gather",   120,  16,  ANY, Config( 64,  64, 64, 8, 3)),
    Row("gather2",   80,  16,  ANY, Config( 64,  32, 64, 8, 3)),
    Row("gather2",   90,  16,  ANY, Config( 64,  64, 32, 8, 3)),
    Row("gather2",  120,  16,  ANY, Config( 64,  32, 64, 8, 3)),
    Row("weights",   80,  32,  ANY, Config( 64,  64, 16, 8, 3)),
    Row("weights",   90,  32,  ANY, Config(128,  64, 32, 8, 3)),
    Row("weights",  120,  32,  ANY, Config( 64,  64, 16, 8, 3)),
    Row("weights",   80,  16,  ANY, Config(128,  64, 64, 8, 3)),
    Row("weights",   90,  16,  ANY, Config(128,  64, 64, 8, 3)),
    Row("weights",  120,  16,  ANY, Config(128,  64, 64, 8, 3)),
    Row("weights2",  80,  32,  ANY, Config( 64,  32, 16, 8, 3)),
    Row("weights2",  90,  32,  ANY, Config( 64,  64, 16, 8, 3)),
    Row("weights2", 120,  32,  ANY, Config( 64,  32, 16, 8, 3)),
    Row("weights2",  80,  16,  ANY, Config( 64,  64, 32, 8, 3)),
    Row("weights2",  90,  16,  ANY, Config(128,  64, 32, 8, 2)),
    Row("weights2", 120,  16,  ANY, Config( 64,  64, 32, 8, 3)),
)  # fmt: skip


def widest_gather(accumulators: int, dtype: torch.dtype) -> int:
    """Widest embedding whose gradient is accumulated in registers; beyond, weights go through
    memory in chunks.

    float32 products are three of rounded parts, whose registers leave no room for a second
    accumulator.
    """
    if dtype == torch.float32:
        return 128 if accumulators == 1 else 0
    return 256 if accumulators == 1 else 128


def config(kind: str, arch: int, width: int, dtype: torch.dtype) -> Config:
    """The row for a kernel; an unknown architecture takes the nearest earlier one's, or the
    earliest.

    Raises KeyError for an unknown kind.
    """
    if arch == 0:  # the interpreter: any size will do, small ones reach more tiles
        return Config(32, 64, 64, 4, 1)
    fitting = [
        row
        for row in TABLE
        if row.kind == kind and row.bits == 8 * dtype.itemsize and width <= row.width
    ]
    if not fitting:
        raise KeyError(f"no tile sizes for kind {kind}, {dtype}, width {width}")
    known = [row.arch for row in fitting if row.arch <= arch] or [min(row.arch for row in fitting)]
    return min((row for row in fitting if row.arch == max(known)), key=lambda row: row.width).config
