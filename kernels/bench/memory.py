"""Peak extra memory of one forward and backward pass: the most held at any moment, less what was
held before.

The gradients of the leaves are part of it, the inputs are not.
CUDA: the allocator's own count, in this process.
CPU: the resident set, in a fresh process for every provider and case, so that no earlier pass hides
in memory that the allocator kept.  A pass over a few rows first loads libraries; only torch.compile
meets its full size before.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from .cases import PER_CLASS, Batch, Case, Form, make_batch
from .measure import clear_gradients, run_pass
from .providers import find_form

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_extra_mib(case: Case, provider: str, form: Form, batch: Batch) -> float:
    """MiB of one forward and backward pass.  Raises RuntimeError when the pass did not survive."""
    device = torch.device(case.device)
    if device.type == "cuda":
        clear_gradients(batch)
        return cuda_peak_mib(lambda: run_pass(form, batch), device)
    with ProcessPoolExecutor(1, mp_context=_fresh()) as pool:
        return pool.submit(_in_fresh_process, case, provider, torch.get_num_threads()).result()


def _fresh() -> BaseContext:
    # The server imports once and has never run an op: a process forked from it is as good as a new
    # one.
    context = get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, "pytorch_metric_learning.losses", "pytorch_metric_learning.miners"]
    )
    return context


def cuda_peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Most memory of the GPU that tensors took during a call beyond what they took before, in
    MiB."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _in_fresh_process(case: Case, provider: str, threads: int) -> float:
    torch.set_num_threads(threads)
    batch, form = make_batch(case), find_form(provider, case.loss)
    warm = batch if provider == "compile" else batch.head(min(case.rows, 8 * PER_CLASS)).leaf_copy()
    run_pass(form, warm)
    clear_gradients(warm)
    return resident_peak_mib(lambda: run_pass(form, batch))


def resident_peak_mib(call: Callable[[], object]) -> float:
    """Greatest growth of this process's resident set during a call, in MiB.

    Where the kernel cannot forget an earlier peak (not Linux), growth beyond that peak only.
    """
    gc.collect()
    if sys.platform == "linux":
        # Freed memory that the allocator kept would hide as much growth.
        ctypes.CDLL(None).malloc_trim(0)
    before = _forget_peak()
    call()
    return (_peak() - before) / MIB


def _forget_peak() -> int:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return _peak()
    return _resident("VmRSS")


def _peak() -> int:
    if _STATUS.is_file():
        return _resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])
