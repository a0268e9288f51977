"""Time: all providers in one process, turn by turn, on one device.

A round measures every pass of every provider once and the witness once; the order moves on by one each round, so
that whatever else the machine does, and whatever a predecessor leaves in the caches, meets all of them alike.
    forward            the loss without gradients (no_grad)
    backward           loss.backward() alone, after a forward pass that is not timed
    forward+backward   both
CUDA: events around the pass, behind a synchronise and a write over the L2 cache, which also gives the host a head
start on the launches.  CPU: perf_counter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .cases import PASSES, Batch, Form

_L2_BYTES = 256 * 2**20
"""More than any GPU's L2 cache."""


@dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile, in milliseconds."""

    median: float
    p20: float
    p80: float


def spread(samples_ms: Sequence[float]) -> Spread:
    """The quantiles of some samples."""
    low, middle, high = torch.tensor(samples_ms, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Spread(middle, low, high)


class Stopwatch:
    """Times one call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._l2 = torch.empty(_L2_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            began = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - began)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self._l2.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)


def run_pass(form: Form, batch: Batch) -> None:
    """One forward and backward pass; the gradients stay in the leaves."""
    form(batch.labels_B, *batch.leaves).backward()


def clear_gradients(batch: Batch) -> None:
    """Back to the state before a pass."""
    for leaf in batch.leaves:
        leaf.grad = None


def sample(part: str, form: Form, batch: Batch, watch: Stopwatch) -> float:
    """Milliseconds of one pass of a form."""
    clear_gradients(batch)
    if part == "forward":
        with torch.no_grad():
            return watch(lambda: form(batch.labels_B, *batch.leaves))
    if part == "backward":
        loss = form(batch.labels_B, *batch.leaves)
        return watch(loss.backward)
    return watch(lambda: run_pass(form, batch))


def interleave(forms: Mapping[str, Form], witness: Form, batch: Batch, watch: Stopwatch, *,
               rounds: int) -> tuple[dict[tuple[str, str], list[float]], list[float]]:
    """Samples of every (provider, pass), and of the witness's forward pass, `rounds` each."""
    samples: dict[tuple[str, str], list[float]] = {(name, part): [] for name in forms for part in PASSES}
    witnessed: list[float] = []
    names = [*forms, None]
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name is None:
                witnessed.append(sample("forward", witness, batch, watch))
                continue
            for part in PASSES:
                samples[name, part].append(sample(part, forms[name], batch, watch))
    clear_gradients(batch)
    return samples, witnessed


def cold_start(form: Form, batch: Batch, device: torch.device) -> float:
    """Seconds of the first call of each pass: what compiling and loading cost in this process."""
    began = time.perf_counter()
    with torch.no_grad():
        form(batch.labels_B, *batch.leaves)
    run_pass(form, batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clear_gradients(batch)
    return time.perf_counter() - began
