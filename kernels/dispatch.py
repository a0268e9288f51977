"""Which implementation of the primitives serves a tensor: Triton kernels, or blocked PyTorch."""

from types import ModuleType

import torch
from torch import Tensor

from . import cpu

TRITON_DEVICES = ("cuda",)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def implementation(rows: Tensor) -> ModuleType:
    """`gpu` for float32 and half types on CUDA; `cpu`, which is plain PyTorch, for everything else.

    float64 is for checks and has no matrix units worth a kernel.
    """
    if rows.device.type in TRITON_DEVICES and rows.dtype in TRITON_DTYPES:
        from . import gpu  # not at the top: Triton exists on Linux only

        return gpu
    return cpu


def describe(device: torch.device) -> str:
    """What serves float32 rows on this device, for a start banner, and why it is not Triton where it is not."""
    if device.type in TRITON_DEVICES:
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton kernels for sm_{major}{minor}"
    return "blocked PyTorch (Triton's kernels need an NVIDIA GPU)"
