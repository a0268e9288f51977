"""Time: all providers in one process, turn by turn, on one device.

A round measures every pass of every provider once and the witness once; the order moves on by one
each round, so that whatever else the machine does, and whatever a predecessor leaves in the caches,
meets all of them alike.  A slow provider takes part in some rounds only, spread over all of them.
    forward            the loss without gradients (no_grad)
    backward           loss.backward() alone, after a forward pass that is not timed
    forward+backward   both
CUDA: events around the pass, behind a synchronise and a write over the L2 cache, which also gives
the host a head start of some 0.1 ms on the launches: a pass of many small kernels takes as long as
the host needs to launch them, and `host_ms` says how long that was.  CPU: perf_counter.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .cases import PASSES, Batch, Form

_L2_BYTES = 256 * 2**20
"""More than any GPU's L2 cache."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one pass on its device, and until the host had issued it; on a CPU the
    same."""

    ms: float
    host_ms: float


@dataclass(frozen=True)
class Rounds:
    """What came of the rounds: of every (provider, pass), of the witness, and why a provider fell
    out with nothing."""

    timings: dict[tuple[str, str], list[Timing]]
    witnessed: list[Timing] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile, in milliseconds."""

    median: float
    p20: float
    p80: float


def spread(samples_ms: Sequence[float]) -> Spread:
    """The quantiles of some samples."""
    low, middle, high = (
        torch.tensor(samples_ms, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        .tolist()
    )
    return Spread(middle, low, high)


class Stopwatch:
    """Times one call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._l2 = torch.empty(_L2_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> Timing:
        """The time of one call."""
        if not self.cuda:
            host_ms = _host_ms(call)
            return Timing(host_ms, host_ms)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self._l2.zero_()
        start.record()
        host_ms = _host_ms(call)
        end.record()
        torch.cuda.synchronize(self.device)
        return Timing(start.elapsed_time(end), host_ms)


def _host_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def run_pass(form: Form, batch: Batch) -> None:
    """One forward and backward pass; the gradients stay in the leaves."""
    form(batch.labels_B, *batch.leaves).backward()


def clear_gradients(batch: Batch) -> None:
    """Back to the state before a pass."""
    for leaf in batch.leaves:
        leaf.grad = None


def release(batch: Batch) -> None:
    """Back to the state before a pass, also after one that broke: what it held is free again for
    the others."""
    clear_gradients(batch)
    gc.collect()
    if batch.labels_B.is_cuda:
        torch.cuda.empty_cache()


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def affordable(pass_ms: float, *, passes: int, rounds: int, budget_s: float) -> int:
    """In how many of the rounds a provider takes part whose longest pass takes so long: one at
    least."""
    return max(1, min(rounds, int(1000 * budget_s / (passes * pass_ms))))


def sample(part: str, form: Form, batch: Batch, watch: Stopwatch) -> Timing:
    """The time of one pass of a form."""
    clear_gradients(batch)
    if part == "forward":
        with torch.no_grad():
            return watch(lambda: form(batch.labels_B, *batch.leaves))
    if part == "backward":
        loss = form(batch.labels_B, *batch.leaves)
        return watch(loss.backward)
    return watch(lambda: run_pass(form, batch))


def interleave(
    forms: Mapping[str, Form],
    witness: Form,
    batch: Batch,
    watch: Stopwatch,
    *,
    rounds: int,
    shares: Mapping[str, int],
    passes: Sequence[str] = PASSES,
) -> Rounds:
    """Time every pass of every provider in its share of the rounds, and the witness's forward pass
    in each."""
    record = Rounds({(name, part): [] for name in forms for part in passes})
    names = [*forms, None]
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name is None:
                record.witnessed.append(sample("forward", witness, batch, watch))
            elif (
                name not in record.failures
                and (turn + 1) * shares[name] // rounds > turn * shares[name] // rounds
            ):
                try:
                    for part in passes:
                        record.timings[name, part].append(sample(part, forms[name], batch, watch))
                except Exception as error:  # out of memory, most likely
                    record.failures[name] = told(error)
                # Not in the handler, where the error still holds the broken pass.
                if name in record.failures:
                    release(batch)
                    for part in passes:
                        del record.timings[name, part]
    clear_gradients(batch)
    return record


def cold_start(form: Form, batch: Batch, device: torch.device, passes: Sequence[str]) -> float:
    """Seconds of the first call of each pass: what compiling and loading cost here."""
    began = time.perf_counter()
    if "forward" in passes:
        with torch.no_grad():
            form(batch.labels_B, *batch.leaves)
    if set(passes) != {"forward"}:
        run_pass(form, batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clear_gradients(batch)
    return time.perf_counter() - began
