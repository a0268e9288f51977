"""Which implementation of the primitives serves a tensor: Triton kernels, or blocked PyTorch."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .op_table import OPS

TRITON_DEVICES = ("cuda",)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Primitives:
    """Primitives by name, each from the first of some packages that has it.

    Raises AttributeError, naming the primitive, for one that none of them has.
    """

    def __init__(self, *packages: ModuleType) -> None:
        self._packages = packages

    def __getattr__(self, name: str) -> Callable[..., Any]:
        for package in self._packages:
            if hasattr(package, name):
                return getattr(package, name)
        looked = " or ".join(package.__name__ for package in self._packages)
        raise AttributeError(
            f"there is no primitive {name!r} in {looked}; write it in kernels/cpu, which serves every "
            "device"
        )


def implementation(rows: Tensor) -> Primitives:
    """The primitives for float32 and half types on CUDA: those of `gpu`, and of `cpu` what has no
    kernel there.

    For everything else those of `cpu` alone, which are plain PyTorch and run on any device. float64
    is for checks and has no matrix units worth a kernel.
    """
    if rows.device.type in TRITON_DEVICES and rows.dtype in TRITON_DTYPES:
        from . import gpu  # not at the top: Triton exists on Linux only

        return Primitives(gpu, cpu)
    return Primitives(cpu)


def describe(device: torch.device, *ops: str) -> str:
    """What serves float32 rows on this device, for a start banner, and why it is not Triton where
    it is not.

    Of these ops (none named: of all) it tells the primitives that have no kernel.  Raises KeyError
    for an unknown op.
    """
    if device.type not in TRITON_DEVICES:
        return "blocked PyTorch (Triton's kernels need an NVIDIA GPU)"
    from . import gpu
    from .gpu.launch import architecture

    arch = architecture(device)
    told = [f"Triton kernels for sm_{arch}" if arch else "Triton kernels by its interpreter"]
    for op in ops or OPS:
        missing = [name for name in OPS[op].primitives if not hasattr(gpu, name)]
        if missing:
            told.append(f"{op}: {', '.join(missing)} in blocked PyTorch (no kernel)")
    return "; ".join(told)
