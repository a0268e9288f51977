"""How kernels are started: tile sizes from the table, operand types, splits over the batch; nothing
reads the device.

A launch can also be recorded instead of done (`recording`): kernels/aot.py compiles what it finds
there, for any architecture and without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config

TARGET_PROGRAMS = 264
"""Programs a launch should have at least: two for each of an H200's 132 multiprocessors."""

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would have been started."""

    kernel: Any
    arguments: dict[str, Any]
    config: Config


@dataclass
class Recording:
    """What `recording` has seen."""

    arch: int
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(arch: int) -> Iterator[Recording]:
    """Within, launches are written down for compute capability `arch` (90 = 9.0) and not done; use
    meta tensors."""
    seen = Recording(arch)
    token = _recording.set(seen)
    try:
        yield seen
    finally:
        _recording.reset(token)


def architecture(device: torch.device) -> int:
    """Compute capability as a number, 90 for 9.0; 0 for the interpreter on a CPU."""
    seen = _recording.get()
    if seen is not None:
        return seen.arch
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    return 0


def operands(rows: Tensor) -> dict[str, Any]:
    """OPERAND and PRECISION for matrix products of these rows."""
    # The interpreter computes on bfloat16's raw bits; there products run in float32 whatever the
    # rows are.
    interpreted = architecture(rows.device) == 0
    return {
        "OPERAND": tl.float32 if interpreted else _OPERANDS[rows.dtype],
        "PRECISION": "tf32x3" if rows.dtype == torch.float32 else "tf32",
    }


def aligned(rows: Tensor) -> Tensor:
    """The rows one after another, their width a multiple of 16: zeros behind them change no product
    and no distance.

    Only such rows are loaded in vectors, and the table's tile sizes are for kernels that do.
    """
    missing = -rows.shape[1] % 16
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


def both(change: Callable[[Tensor], Tensor], local: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """What `change` makes of the local rows and of all rows; where they are one tensor, one
    result."""
    changed = change(whole)
    return changed if local is whole else change(local), changed


def splits(b: int, B: int, config: Config, *, finer: int = 1) -> tuple[int, int]:
    """In how many parts to walk the batch, and tiles in each part.

    Enough programs to fill a GPU, `finer` times over, when there are few local rows; each part
    writes partial results of its own and a small sum over parts follows, in a fixed order.
    """
    tiles = max(1, triton.cdiv(B, config.block_n))
    wanted = triton.cdiv(finer * TARGET_PROGRAMS, max(1, triton.cdiv(b, config.block_m)))
    tiles_per_split = triton.cdiv(tiles, min(wanted, tiles))
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """Start `kernel` on `grid`; block sizes that it takes come from `config`."""
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    given = arguments | {name: size for name, size in sizes.items() if name in kernel.arg_names}
    seen = _recording.get()
    if seen is not None:
        seen.launches.append(Launch(kernel, given, config))
        return
    if 0 in grid:  # a rank without rows
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    # Triton starts a kernel on the current device, which need not be the tensors'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**given, num_warps=config.warps, num_stages=config.stages)
