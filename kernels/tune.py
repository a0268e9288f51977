"""Measures tile sizes on the GPU at hand and prints better rows for gpu/configs.py: `python -m namr_dist.kernels.tune`.

Every case of kernels/aot.py is run with the table's tiles and with each candidate; a candidate counts if it compiles
within the chip's limits and gives the table's results. Rounds are interleaved, so that clocks drift alike for all.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import aot
from .gpu import configs
from .gpu.configs import ANY, Config, Row, config
from .gpu.launch import architecture

KINDS = {
    "scan": ("row_moments", "similarity_statistics", "proxy_sums"),
    "rank": ("ranking", "hardest_pairs", "sampled_negatives"),
    "mine": ("semihard_negatives",),
    "gather": ("distance_sum_gradient", "similarity_gradient", "proxy_gradient"),
    "gather2": ("ranking, gradients",),
    "weights": ("distance_sum_gradient", "similarity_gradient", "proxy_gradient"),
    "weights2": ("ranking, gradients",),
}
"""Cases of aot.CASES that a kind is tuned on."""
TOLERANCE = 1e-3


class RealInputs(aot.Inputs):
    """The inputs of kernels/aot.py with numbers in them, on the GPU: B = 4096 rows in classes of four."""

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:  # type: ignore[override]
        generator = torch.Generator("cuda").manual_seed(len(shape))
        if dtype == torch.int64:
            if len(shape) == 1:
                return torch.arange(shape[0], device="cuda") // 4
            return torch.arange(shape[0], device="cuda")[:, None] // 4 * 4 + torch.arange(shape[1], device="cuda")
        values = torch.randn(shape, generator=generator, device="cuda")
        return torch.nn.functional.normalize(values, dim=-1).to(dtype) if len(shape) == 2 else values.abs().to(dtype)


def candidates(bits: int) -> Iterator[Config]:
    """The grid of tiles that is tried."""
    steps = (16, 32) if bits == 32 else (32, 64)
    for m, n, k, warps, stages in itertools.product((64, 128), (32, 64, 128), steps, (4, 8), (2, 3, 4)):
        if m * n <= 64 * 32 * warps:
            yield Config(m, n, k, warps, stages)


def row_text(row: Row) -> str:
    """A row in the syntax of the table."""
    c = row.config
    name = f'"{row.kind}",'
    width = "ANY" if row.width == ANY else row.width
    return (f"    Row({name:12}{row.arch:3},  {row.bits}, {width:>4}, "
            f"Config({c.block_m:3}, {c.block_n:3}, {c.block_k:2}, {c.warps}, {c.stages})),")  # fmt: skip


@contextmanager
def trial(row: Row) -> Iterator[None]:
    """Within, `row` stands in the table for its kind, architecture, bits and width, before all others."""
    kept = configs.TABLE
    same = [other for other in kept if other[:3] == row[:3] and other.width <= row.width]
    configs.TABLE = (row, *(other for other in kept if other not in same))
    try:
        yield
    finally:
        configs.TABLE = kept


def fits(row: Row, case: str, dtype: str) -> bool:
    """Whether what `case` launches with this row is within the chip's limits."""
    with trial(row), aot.recording(row.arch) as seen:
        aot.CASES[case](aot.Inputs(row.width, aot.DTYPES[dtype]))
    used = [launch for launch in seen.launches if launch.config == row.config]
    return bool(used) and not any(
        aot.check(aot.Variant(row.arch, dtype, launch, [row.width])).faults for launch in used)  # fmt: skip


def run(case: str, inputs: aot.Inputs) -> tuple[float, list[Tensor]]:
    """Milliseconds of one call, and its results."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result: Any = aot.CASES[case](inputs)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), [part for part in (result if isinstance(result, tuple) else (result,))
                                     if part is not None]  # fmt: skip


def agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether results are the table's: floats to a share of their norm, row numbers but for one in a hundred."""
    for one, other in zip(found, wanted, strict=True):
        if not one.is_floating_point():
            if (one != other).double().mean() > 0.01:
                return False
        elif not (one - other).double().norm() <= TOLERANCE * other.double().norm():
            return False
    return True


def best(kind: str, arch: int, width: int, dtype: str, rounds: int) -> Row:
    """The fastest row by the sum of the medians of the kind's cases; the table's own takes part."""
    bits = 8 * aot.DTYPES[dtype].itemsize
    table = config(kind, arch, width, aot.DTYPES[dtype])
    rows = [Row(kind, arch, bits, width, size) for size in dict.fromkeys([table, *candidates(bits)])]
    rows = [row for row in rows if row.config == table or all(fits(row, case, dtype) for case in KINDS[kind])]
    inputs = RealInputs(width, aot.DTYPES[dtype])
    total = dict.fromkeys(rows, 0.0)
    for case in KINDS[kind]:
        times: dict[Row, list[float]] = {row: [] for row in rows}
        _, wanted = run(case, inputs)
        for turn in range(rounds + 1):
            for row in list(rows):
                with trial(row):
                    elapsed, found = run(case, inputs)
                if turn:
                    times[row].append(elapsed)
                elif not agree(found, wanted):  # the first turn compiles, warms and checks
                    rows.remove(row)
        for row in rows:
            total[row] += statistics.median(times[row])
    return min(rows, key=lambda row: total[row])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m namr_dist.kernels.tune", description="Measure tile sizes.")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", nargs="+", choices=aot.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, nargs="+", default=[128, 512], metavar="D", help="embedding widths")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each candidate")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: error: needs an NVIDIA GPU; without one the table stays as it is", file=sys.stderr)
        return 2
    arch = architecture(torch.device("cuda"))
    for kind, dtype, width in itertools.product(options.kind, options.dtype, options.width):
        accumulators = 2 if kind.endswith("2") else 1
        fused = width <= configs.widest_gather(accumulators, aot.DTYPES[dtype])
        if kind.startswith(("gather", "weights")) and kind.startswith("gather") != fused:
            continue  # no such kernel at this width
        print(row_text(best(kind, arch, width, dtype, options.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
