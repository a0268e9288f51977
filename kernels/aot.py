"""Compiles every Triton kernel ahead of time, for chips that need not be there: `python -m
namr_dist.kernels.aot`.

CASES calls the primitives on meta tensors while launches are recorded; what was recorded is
compiled with the specialisations that Triton would choose at run time, and held against LIMITS:
registers that spill into memory, shared memory beyond the chip's, a matrix product without the
chip's matrix instruction. One line a kernel variant; embedding widths that need the same one share
its line. Exit code 1 if a kernel is beyond a limit, each named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from . import gpu
from .gpu import (
    distances,
    mining,
    multi_cluster,
    multi_similarity,
    nearest,
    pairs,
    proxy_anchor,
)
from .gpu.configs import Config
from .gpu.launch import Launch, recording


@dataclass(frozen=True)
class Limits:
    """What a chip allows: shared memory of a program in bytes, spilled bytes; the name of its
    matrix instruction."""

    shared: int
    matrix: str
    spill: int


LIMITS = {
    80: Limits(166_912, "mma.sync", spill=0),
    90: Limits(232_448, "wgmma", spill=0),
    100: Limits(
        232_448, "tcgen05", spill=96
    ),  # half types at odd sizes: a few scans, at most 72 bytes
    120: Limits(101_376, "mma.sync", spill=32),  # half types, D = 64: one fused gradient, 20 bytes
}
SPILL_WIDTH = 512
"""Spills are refused up to this embedding width; beyond they are only reported."""
TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor, on chips with tcgen05."""
MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTHS = (64, 100, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Case:
    """A call of a primitive, which its name begins with, and the kinds of tile sizes that
    gpu/tune.py times it for."""

    call: Callable[[Inputs], Any]
    tunes: tuple[str, ...] = ()

    def __call__(self, inputs: Inputs) -> Any:
        """The primitive's result for arguments of one width and type."""
        return self.call(inputs)


CASES = {
    "row_moments": Case(lambda x: distances.row_moments(x.z_bD, x.z_BD, offset=x.offset), tunes=("scan",)),
    "distance_sum_gradient": Case(
        lambda x: distances.distance_sum_gradient(x.z_bD, x.z_BD, offset=x.offset), tunes=("gather", "weights")),
    "ranking": Case(lambda x: multi_cluster.ranking(
        x.z_bD, x.z_bD, x.z_BD, x.z_BD, x.float_B, x.float_B, offset=x.offset, clusters=2, sharpness=10.0,
        with_grad=False), tunes=("rank",)),
    "ranking, gradients": Case(lambda x: multi_cluster.ranking(
        x.z_bD, x.z_bD, x.z_BD, x.z_BD, x.float_B, x.float_B, offset=x.offset, clusters=2, sharpness=10.0,
        with_grad=True), tunes=("gather2", "weights2")),
    "hardest_pairs": Case(lambda x: mining.hardest_pairs(x.z_bD, x.z_BD, x.labels_b, x.labels_B, offset=x.offset)),
    "hardest_pairs, one set": Case(lambda x: mining.hardest_pairs(
        x.z_BD, x.z_BD, x.labels_B, x.labels_B, offset=0), tunes=("hardest",)),
    "semihard_negatives": Case(lambda x: mining.semihard_negatives(
        x.z_bD, x.z_BD, x.labels_b, x.labels_B, x.rows_BR[: x.b]), tunes=("mine",)),
    "sampled_negatives": Case(lambda x: mining.sampled_negatives(
        x.z_bD, x.z_BD, x.labels_b, x.labels_B, x.rows_BR[: x.b], offset=x.offset, seed=2**40 + 7), tunes=("mine",)),
    "k_nearest": Case(lambda x: nearest.k_nearest(x.z_bD, x.z_BD, k=5), tunes=("mine",)),
    "k_nearest, one": Case(lambda x: nearest.k_nearest(x.z_bD, x.z_BD, k=1)),
    "k_nearest, many": Case(lambda x: nearest.k_nearest(x.z_bD, x.z_BD, k=nearest.MOST)),
    "k_nearest_gradient": Case(lambda x: nearest.k_nearest_gradient(
        x.z_bD, x.z_BD, x.rows_BR[: x.b], x.empty(x.b, 3), for_z=True, for_centres=True)),
    "pair_distance": Case(lambda x: pairs.pair_distance(x.z_bD, x.z_BD, x.rows_BR[: x.b])),
    "pair_gradient": Case(lambda x: pairs.pair_gradient(x.z_BD, x.rows_BR, x.empty(x.B, 3), first=x.offset, rows=x.b)),
    "similarity_statistics": Case(lambda x: multi_similarity.similarity_statistics(
        x.z_bD, x.z_BD, x.labels_b, x.labels_B, offset=x.offset, alpha=2.0, beta=40.0, base=0.5, epsilon=0.1),
        tunes=("scan",)),
    "similarity_gradient": Case(lambda x: multi_similarity.similarity_gradient(
        x.z_bD, x.z_BD, x.labels_b, x.labels_B, x.empty(x.b, 4), x.empty(x.B, 4), offset=x.offset, alpha=2.0,
        beta=40.0, base=0.5, epsilon=0.1), tunes=("gather", "weights")),
    "proxy_sums": Case(lambda x: proxy_anchor.proxy_sums(
        x.z_bD, x.labels_b, x.z_BD, alpha=32.0, margin=0.1), tunes=("scan",)),
    "proxy_gradient": Case(lambda x: proxy_anchor.proxy_gradient(
        x.z_bD, x.labels_b, x.z_BD, x.float_B, x.float_B, x.empty(), x.float_B, alpha=32.0, margin=0.1),
        tunes=("gather", "weights")),
}  # fmt: skip
"""Every primitive of gpu/, once for each set of kernels that it can launch. A new primitive adds
its cases here."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of the primitives, on the meta device: b local rows of B, D width.

    A width that is no multiple of 16 comes with row counts and an offset that are none either.
    """

    D: int
    dtype: torch.dtype

    @property
    def b(self) -> int:
        """Local rows."""
        return 1024 if self.D % 16 == 0 else 1001

    @property
    def B(self) -> int:
        """Rows of all ranks."""
        return 4096 if self.D % 16 == 0 else 4003

    @property
    def offset(self) -> int:
        """Where the local rows begin among all: another rank's stand before them."""
        return self.b

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor without numbers, on the meta device."""
        return torch.empty(shape, dtype=dtype, device="meta")

    @property
    def z_BD(self) -> Tensor:
        """Embeddings of all ranks, (B, D), of `dtype`."""
        return self.empty(self.B, self.D, dtype=self.dtype)

    @property
    def z_bD(self) -> Tensor:
        """The local rows of z_BD, as a view of it."""
        return self.z_BD[self.offset : self.offset + self.b]

    @property
    def float_B(self) -> Tensor:
        """A float32 number for each row of z_BD."""
        return self.empty(self.B)

    @property
    def labels_B(self) -> Tensor:
        """int64 (B,)."""
        return self.empty(self.B, dtype=torch.int64)

    @property
    def labels_b(self) -> Tensor:
        """Those of the local rows, as a view of labels_B."""
        return self.labels_B[self.offset : self.offset + self.b]

    @property
    def rows_BR(self) -> Tensor:
        """int64 (B, 3): row numbers, as mining picks them."""
        return self.empty(self.B, 3, dtype=torch.int64)


@dataclass
class Variant:
    """One kernel to compile, and for which embedding widths it serves."""

    arch: int
    dtype: str
    launch: Launch
    widths: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As `kernel_name` gives it."""
        return kernel_name(self.launch.kernel)


@dataclass
class Outcome:
    """What became of a variant; `faults` are the limits that it breaks."""

    arch: int
    dtype: str
    widths: list[int]
    kernel: str
    chunked: bool
    tile: str
    registers: int = 0
    spill: int = 0
    shared: int = 0
    matrix: str = "-"
    wanted: str = "-"
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        """A line of the printed table; faults stand at its end."""
        widths = ",".join(map(str, self.widths))
        return (
            f"sm_{self.arch:<4}{self.dtype:9}{widths:22}{self.kernel + ' chunked' * self.chunked:42}{self.tile:18}"
            f"registers {self.registers:3}  spill {self.spill:4}  shared {self.shared:6}  "
            f"{self.matrix} (wanted {self.wanted})"
            + "".join(f"  FAULT: {fault}" for fault in self.faults)
        )


def kernel_name(kernel: Any) -> str:
    """Module and name of a Triton kernel, with a dot between them and without the packages."""
    return f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"


def package_kernels() -> set[str]:
    """All functions of gpu/ that are started from the host: Triton's, less those that another of
    them calls."""
    # Not tune.py, which has none and imports this file.
    modules = [
        import_module(f"{gpu.__name__}.{module.name}")
        for module in pkgutil.iter_modules(gpu.__path__)
        if module.name != "tune"
    ]
    functions = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    called = {
        function.fn.__globals__.get(name)
        for function in functions
        for name in function.fn.__code__.co_names
    }
    return {kernel_name(function) for function in functions if function not in called}


def specialised(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and attributes of a kernel's arguments, as Triton's run time derives
    them."""
    types, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        divisible = False
        if isinstance(value, Tensor):
            types[parameter.name] = "*" + _POINTEES[value.dtype]
            divisible = value.storage_offset() * value.dtype.itemsize % 16 == 0
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            types[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible and not (
            parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        ):
            attributes[position,] = [["tt.divisibility", 16]]
    return types, constants, attributes


_POINTEES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
             torch.int64: "i64", torch.bool: "i1"}  # fmt: skip


def variants(archs: Sequence[int], dtypes: Sequence[str], widths: Sequence[int]) -> list[Variant]:
    """What all CASES launch, each kernel once a specialisation and tile."""
    variant_of: dict[str, Variant] = {}
    for arch in archs:
        for dtype in dtypes:
            for width in widths:
                with recording(arch) as seen:
                    for case in CASES.values():
                        case(Inputs(width, DTYPES[dtype]))
                for launch in seen.launches:
                    key = repr(
                        (
                            arch,
                            dtype,
                            kernel_name(launch.kernel),
                            specialised(launch),
                            launch.config,
                        )
                    )
                    variant = variant_of.setdefault(key, Variant(arch, dtype, launch))
                    if width not in variant.widths:
                        variant.widths.append(width)
    return list(variant_of.values())


def tile_text(config: Config) -> str:
    """Tile sizes, warps and stages, such as 128x64x32 w4 s3."""
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.warps} s{config.stages}"


def check(variant: Variant) -> Outcome:
    """Compile one kernel and measure it."""
    limits, launch = LIMITS[variant.arch], variant.launch
    outcome = Outcome(variant.arch, variant.dtype, variant.widths, variant.name,
                      bool(launch.arguments.get("CHUNKED")), tile_text(launch.config))  # fmt: skip
    try:
        kernel, log = _compiled(variant)
    except Exception as error:  # whatever the compiler throws is this kernel's fault
        lines = str(error).strip().splitlines()
        outcome.faults.append(
            f"does not compile: {type(error).__name__}: {lines[0] if lines else ''}"
        )
        return outcome
    ptx = kernel.asm["ptx"]
    outcome.registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    outcome.spill = sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))
    outcome.shared = kernel.metadata.shared
    outcome.wanted = limits.matrix if "tt.dot " in kernel.asm["ttir"] else "-"
    outcome.matrix = (
        "+".join(name for name, text in MATRIX_INSTRUCTIONS.items() if text in ptx) or "-"
    )
    strict = any(width <= SPILL_WIDTH for width in variant.widths)
    if strict and outcome.spill > limits.spill:
        outcome.faults.append(f"spills {outcome.spill} bytes of registers, limit {limits.spill}")
    if outcome.shared > limits.shared:
        outcome.faults.append(
            f"takes {outcome.shared} bytes of shared memory, limit {limits.shared}"
        )
    if (kernel.metadata.tmem_size or 0) > TENSOR_MEMORY:
        outcome.faults.append(
            f"takes {kernel.metadata.tmem_size} columns of tensor memory, limit {TENSOR_MEMORY}"
        )
    if outcome.matrix != outcome.wanted:
        outcome.faults.append(f"matrix instruction {outcome.matrix}, wanted {outcome.wanted}")
    if "wgmma.mma_async instructions are serialized" in log:
        outcome.faults.append("wgmma products wait for one another (serialised by ptxas)")
    return outcome


def _compiled(variant: Variant) -> tuple[Any, str]:
    """The compiled kernel, from Triton's cache where it can be, and what `ptxas -v` said of it,
    kept beside it."""
    launch = variant.launch
    source = ASTSource(launch.kernel, *specialised(launch))

    def compiled(again: bool) -> tuple[Any, str]:
        with (
            knobs.compilation.scope(),
            knobs.nvidia.scope(),
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = True, again
            kernel = triton.compile(
                source,
                target=GPUTarget("cuda", variant.arch, 32),
                options={"num_warps": launch.config.warps, "num_stages": launch.config.stages},
            )
        return kernel, said.getvalue()

    kernel, log = compiled(again=False)
    cache = get_cache_manager(kernel.hash)
    kept = cache.get_file("ptxas.log")
    if not log and kept is not None:
        with open(kept, encoding="utf-8") as file:
            return kernel, file.read()
    if not log:  # compiled by someone else, who did not keep it
        kernel, log = compiled(again=True)
    cache.put(log, "ptxas.log", binary=False)
    return kernel, log


def checked(work: Sequence[Variant], jobs: int) -> Iterator[Outcome]:
    """Outcomes in the order of `work`, from several processes, with a progress line on a
    terminal."""
    # Fork: recorded launches hold kernels and tensors that need not travel.
    _work[:] = work
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for done, outcome in enumerate(pool.map(_check_numbered, range(len(work))), 1):
            if sys.stderr.isatty():
                print(
                    f"\r{done} of {len(work)} kernels",
                    end="" if done < len(work) else "\n",
                    file=sys.stderr,
                )
            yield outcome


_work: list[Variant] = []


def _check_numbered(number: int) -> Outcome:
    return check(_work[number])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 1 for a kernel beyond its limits, 2 for what
    cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m namr_dist.kernels.aot", description="Compile every kernel."
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=LIMITS,
        default=list(LIMITS),
        help="chips, 90 for 9.0",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="types of embeddings"
    )
    parser.add_argument(
        "--width", type=int, nargs="+", default=list(WIDTHS), metavar="D", help="embedding widths"
    )
    parser.add_argument(
        "--kernel", metavar="NAME", help="only kernels whose name, module.function, contains this"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (all cores)"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print(
            "aot: error: TRITON_INTERPRET is set: nothing would be compiled; unset it",
            file=sys.stderr,
        )
        return 2

    everything = variants(options.arch, options.dtype, options.width)
    missing = sorted(package_kernels() - {variant.name for variant in everything})
    work = [
        variant
        for variant in everything
        if options.kernel is None or options.kernel in variant.name
    ]
    if not work:
        print(f"aot: error: no kernel is called {options.kernel}", file=sys.stderr)
        return 2
    failed = 0
    for outcome in checked(work, options.jobs):
        failed += bool(outcome.faults)
        print(json.dumps(asdict(outcome)) if options.json else outcome.line(), flush=True)
    for name in missing:
        print(
            f"aot: {name} is launched by no case: add one to CASES, or narrow widths hid it",
            file=sys.stderr,
        )
    print(
        f"aot: {len(work)} kernels compiled by Triton {triton.__version__}, {failed} beyond their limits",
        file=sys.stderr,
    )
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
