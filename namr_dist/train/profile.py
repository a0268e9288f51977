"""A few steps of training under torch.profiler, as a Chrome trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from namr_dist.atomic import check_target
from namr_dist.config import Config
from namr_dist.errors import InputError

STEPS = 3
"""Recorded."""


def check_profile(config: Config) -> None:
    """Raise InputError if a trace is asked for that could not be written, or of steps that the run
    has not."""
    train, last = config.train, config.optim.steps - STEPS
    if train.profile is None:
        return
    check_target("train.profile", train.profile)
    if not 0 <= train.profile_after <= last:
        raise InputError(
            f"train.profile_after is {train.profile_after}, and the {STEPS} steps behind those are "
            f"recorded of optim.steps ({config.optim.steps}); "
            + (f"set it between 0 and {last}" if last >= 0 else "leave train.profile out")
        )


@contextmanager
def profiled(target: Path, *, after: int) -> Iterator[Callable[[], None]]:
    """Gives what is to be called as each step begins, and writes a Chrome trace (JSON, packed if
    its name ends in .gz) of steps after + 1 to after + STEPS; of fewer, or none, if no more are
    made. The one before them is recorded and thrown away, for the first is slow.

    Steps are called ProfilerStep#1, 2 … in the trace, from the first that is made within.
    """
    activities = [
        ProfilerActivity.CPU,
        *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
    ]
    with profile(
        activities=activities,
        schedule=schedule(wait=after, warmup=1, active=STEPS, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(target)),
    ) as profiler:
        yield profiler.step
