"""Every op once, forward and backward, at small odd sizes: a program for NVIDIA's compute-sanitizer
to watch.

    compute-sanitizer --report-api-errors no --tool memcheck python tests/kernels/sanitise.py
    compute-sanitizer --report-api-errors no --tool racecheck python tests/kernels/sanitise.py

One size keeps a gradient's sums in registers, the other is too wide for that. Without a GPU,
Triton's interpreter runs the kernels at the first. Prints a line an op; exit code 1 if a loss or a
gradient is not finite.
"""

from __future__ import annotations

import os
import sys

# Memory from a pool would hide what reads beyond a tensor. Read when the first tensor is made.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from op_cases import COMPILED, KERNEL_DEVICE, OPS, batch

from namr_dist import kernels
from namr_dist.kernels import dispatch

CASES = [(37, 24, torch.float32), (35, 300, torch.bfloat16)]


def main() -> int:
    """Run all cases; the exit code."""
    dispatch.TRITON_DEVICES = (KERNEL_DEVICE.type,)
    finite = True
    for B, D, dtype in CASES if COMPILED else CASES[:1]:
        for name, op in OPS.items():
            loss, gradients = op.value_and_gradients(
                kernels, batch(B, D).leaves(dtype, KERNEL_DEVICE)
            )
            good = all(bool(value.isfinite().all()) for value in (loss, *gradients))
            print(
                f"{name}, {B} × {D}, {dtype}: loss {float(loss):.4f}{'' if good else ', not finite'}",
                flush=True,
            )
            finite = finite and good
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
