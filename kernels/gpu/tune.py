"""Measures tile sizes on the GPU at hand and prints better rows for configs.py: `python -m
namr_dist.kernels.gpu.tune`.

For each kind, type and width of the table its cases of kernels/aot.py are run with the table's
tiles and with each candidate. Candidates are compiled beforehand, in processes of their own,
through Triton's run time, so that this process finds them in Triton's cache on disk; compiling
would otherwise take an hour. A candidate counts if it gives the table's results. All are timed a
few times; the fastest FINALISTS and the table's row then in `--rounds` rounds, interleaved, so that
clocks drift alike for all. The printed row is the fastest that aot.py finds within the chip's
limits, spills included. Every candidate with its times, or why it has none, goes to `--csv`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .. import aot
from ..bench.measure import Stopwatch, told
from . import configs
from .configs import ANY, Config, Row, config
from .launch import architecture

KINDS = {
    kind: tuple(name for name, case in aot.CASES.items() if kind in case.tunes)
    for kind in dict.fromkeys(row.kind for row in configs.TABLE)
}
"""Names of the cases that a kind is tuned on."""
TOLERANCE = 1e-3
FIRST_ROUNDS, FINALISTS = 3, 6


class MetaInputs(aot.Inputs):
    """The inputs of kernels/aot.py with enough rows that a kernel takes longer than the host needs
    to launch it."""

    @property
    def B(self) -> int:
        """Rows of the only rank; fewer where they are wide."""
        return 32768 if self.D <= 128 else 16384

    @property
    def b(self) -> int:
        """All rows are local."""
        return self.B

    @property
    def offset(self) -> int:
        """0, for no other rank's rows stand before them."""
        return 0


@dataclass(frozen=True)
class RealInputs(MetaInputs):
    """The same with numbers in them, on the GPU: rows of length 1 in classes of four; each tensor
    is made once."""

    made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:  # type: ignore[override]
        """The tensor of this shape and type; made on the first call."""
        if (shape, dtype) not in self.made:
            self.made[shape, dtype] = _numbers(shape, dtype)
        return self.made[shape, dtype]


def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.int64:
        labels_B = torch.arange(shape[0], device="cuda") // 4
        return (
            labels_B
            if len(shape) == 1
            else labels_B[:, None] * 4 + torch.arange(shape[1], device="cuda")
        )
    values = torch.randn(
        shape, generator=torch.Generator("cuda").manual_seed(len(shape)), device="cuda"
    )
    return (
        torch.nn.functional.normalize(values, dim=-1).to(dtype)
        if len(shape) == 2
        else values.abs().to(dtype)
    )


@dataclass(frozen=True)
class Task:
    """What one row of the table is for."""

    kind: str
    arch: int
    dtype: str
    width: int

    @property
    def table(self) -> Row:
        """The table's row for it."""
        bits = 8 * aot.DTYPES[self.dtype].itemsize
        return Row(self.kind, self.arch, bits, self.width, config(self.kind, self.arch, self.width,
                                                                  aot.DTYPES[self.dtype]))  # fmt: skip

    @property
    def rows(self) -> list[Row]:
        """The table's row, then the candidates."""
        table = self.table
        return [
            table._replace(config=size)
            for size in dict.fromkeys([table.config, *candidates(table.bits)])
        ]


@dataclass
class Candidate:
    """A row with the milliseconds of each case, or why it is out."""

    row: Row
    fault: str = ""
    times: dict[str, list[float]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Sum of the medians of all cases."""
        return sum(statistics.median(times) for times in self.times.values())


def candidates(bits: int) -> Iterator[Config]:
    """The grid of tiles that is tried."""
    steps, stages = ((16, 32), (2, 3)) if bits == 32 else ((32, 64), (3, 4))
    for m, n, k, warps, stage in itertools.product((64, 128), (32, 64, 128), steps, (4, 8), stages):
        if m * n <= 64 * 32 * warps:
            yield Config(m, n, k, warps, stage)


def row_text(row: Row) -> str:
    """A row in the syntax of the table."""
    c = row.config
    name = f'"{row.kind}",'
    width = "ANY" if row.width == ANY else row.width
    return (f"    Row({name:12}{row.arch:3},  {row.bits}, {width:>4}, "
            f"Config({c.block_m:3}, {c.block_n:3}, {c.block_k:2}, {c.warps}, {c.stages})),")  # fmt: skip


@contextmanager
def trial(row: Row) -> Iterator[None]:
    """Within, `row` stands in the table for its kind, architecture, bits and width, before all
    others."""
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


class _Chip:
    """Stands in for Triton's driver of a GPU that this process leaves alone: kernels are compiled,
    never loaded."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stand_in(arch: int) -> None:
    """Make this process one that compiles for `arch` and needs no GPU."""
    driver.set_active(_Chip(arch))


def compile_ahead(row: Row, dtype: str) -> str:
    """Fill Triton's cache with what the kind's cases launch with this row; why it cannot run, or
    "".

    The process must be one that stands in for a GPU. The signature of a kernel is that of the timed
    run: same sizes.
    """
    for case in KINDS[row.kind]:
        with trial(row), aot.recording(row.arch) as seen:
            aot.CASES[case](MetaInputs(row.width, aot.DTYPES[dtype]))
        for launch in seen.launches:
            if launch.config != row.config:
                continue
            try:
                kernel = launch.kernel.run(
                    grid=(1,),
                    warmup=True,
                    **launch.arguments,
                    num_warps=row.config.warps,
                    num_stages=row.config.stages,
                )
            except Exception as error:  # whatever the compiler throws is this candidate's fault
                return f"does not compile: {told(error)}"
            if kernel.metadata.shared > aot.LIMITS[row.arch].shared:
                return f"takes {kernel.metadata.shared} bytes of shared memory"
    return ""


def run(case: str, inputs: aot.Inputs, watch: Stopwatch) -> tuple[float, list[Tensor]]:
    """Milliseconds of one call, and its results."""
    results: list[Any] = []
    elapsed = watch(lambda: results.append(aot.CASES[case](inputs))).ms
    outputs = results[0] if isinstance(results[0], tuple) else (results[0],)
    return elapsed, [part for part in outputs if part is not None]


def agree(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether results are the table's: floats to a share of their norm, row numbers but for one in
    a hundred."""
    for one, other in zip(results, wanted, strict=True):
        if not one.is_floating_point():
            if (one != other).double().mean() > 0.01:
                return False
        elif not (one - other).double().norm() <= TOLERANCE * other.double().norm():
            return False
    return True


def measure(tried: Sequence[Candidate], task: Task, watch: Stopwatch, rounds: int) -> None:
    """Add the times of so many rounds to every candidate without a fault; one that breaks or errs
    gets its fault."""
    inputs = RealInputs(task.width, aot.DTYPES[task.dtype])
    for case in KINDS[task.kind]:
        _, wanted = run(case, inputs, watch)
        for turn in range(rounds + 1):
            for candidate in tried:
                if candidate.fault:
                    continue
                try:
                    with trial(candidate.row):
                        elapsed, results = run(case, inputs, watch)
                except Exception as error:  # out of some resource of the chip
                    candidate.fault = told(error)
                    continue
                if turn:
                    candidate.times.setdefault(case, []).append(elapsed)
                elif not agree(results, wanted):  # the first turn loads, warms and checks
                    candidate.fault = f"{case}: other results than the table's tiles"


def search(
    task: Task, compiled: Sequence[Future[str]], pool: Executor, rounds: int
) -> tuple[Row, list[Candidate]]:
    """The fastest row that is within the limits, and all that were tried; the table's own takes
    part."""
    watch = Stopwatch(torch.device("cuda"))
    tried = [
        Candidate(row, future.result()) for row, future in zip(task.rows, compiled, strict=True)
    ]
    measure(tried, task, watch, FIRST_ROUNDS)
    sound = sorted((one for one in tried if not one.fault), key=lambda one: one.total)
    finalists = [*sound[:FINALISTS], *(one for one in sound[FINALISTS:] if one.row == task.table)]
    measure(finalists, task, watch, rounds)
    finalists.sort(key=lambda one: one.total)
    within = {
        one.row: [pool.submit(fits, one.row, case, task.dtype) for case in KINDS[task.kind]]
        for one in finalists
    }
    for one in finalists:
        if not all(future.result() for future in within[one.row]):
            one.fault = "beyond a limit of kernels/aot.py"
    return next((one.row for one in finalists if not one.fault), task.table), tried


COLUMNS = (
    "kind",
    "arch",
    "dtype",
    "width",
    "rows",
    "case",
    *Config.__dataclass_fields__,
    "samples",
    "median_ms",
    "chosen",
    "note",
)


def log(path: Path, task: Task, chosen: Row, tried: Sequence[Candidate]) -> None:
    """Append a line for each candidate and case, in a new file behind a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for one, case in itertools.product(tried, KINDS[task.kind]):
            times = one.times.get(case, [])
            writer.writerow(
                asdict(task)
                | asdict(one.row.config)
                | {
                    "rows": MetaInputs(task.width, torch.float32).B,
                    "case": case,
                    "samples": len(times),
                    "median_ms": statistics.median(times) if times else "",
                    "chosen": "yes" if one.row == chosen else "",
                    "note": one.fault,
                }
            )


def tasks(
    kinds: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], arch: int
) -> list[Task]:
    """The rows to find; not those for which there is no kernel of that kind at that width."""
    work = []
    for dtype, width, kind in itertools.product(dtypes, widths, kinds):
        fused = width <= configs.widest_gather(2 if kind.endswith("2") else 1, aot.DTYPES[dtype])
        if not kind.startswith(("gather", "weights")) or kind.startswith("gather") == fused:
            work.append(Task(kind, arch, dtype, width))
    return work


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m namr_dist.kernels.gpu.tune", description="Measure tile sizes."
    )
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", nargs="+", choices=aot.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--width", type=int, nargs="+", default=[128, 512], metavar="D", help="embedding widths"
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="timed runs of each finalist (%(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 1) - 2),
        help="processes that compile (all cores but two, which launch)",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        default=Path("runs/bench/tune.csv"),
        metavar="FILE",
        help="where all candidates are appended (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "tune: error: needs an NVIDIA GPU; without one the table stays as it is",
            file=sys.stderr,
        )
        return 2
    arch = architecture(torch.device("cuda"))
    if arch not in aot.LIMITS:
        print(
            f"tune: error: no limits are known for sm_{arch}; add them to LIMITS in kernels/aot.py",
            file=sys.stderr,
        )
        return 2
    work = tasks(options.kind, options.dtype, options.width, arch)
    if not work:
        print(
            "tune: error: there are no such kernels at these widths; give others", file=sys.stderr
        )
        return 2
    # Spawned: a fork of a process that uses the GPU cannot be relied on.
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), stand_in, (arch,)) as pool:

        def begin(task: Task) -> list[Future[str]]:
            return [pool.submit(compile_ahead, row, task.dtype) for row in task.rows]

        compiled = begin(work[0])
        for number, task in enumerate(work):
            # Compiles while this one is timed.
            following = begin(work[number + 1]) if number + 1 < len(work) else []
            row, tried = search(task, compiled, pool, options.rounds)
            log(options.csv, task, row, tried)
            print(row_text(row), flush=True)
            compiled = following
    return 0


if __name__ == "__main__":
    sys.exit(main())
