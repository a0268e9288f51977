"""Where a step's time goes: seconds in each phase, an inner phase's apart from the one around it; and on which rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from namr_dist.parallel.gather import RowGather
from namr_dist.parallel.ranks import Rank

IDLE = "other"
"""What is outside every phase."""
STEP_PHASES = ("data", "forward", "heads", "gather", "loss", "backward", "step")
"""Of a training step: waiting for images, backbone, heads with their batch norm over all ranks, embeddings of all
ranks, the loss and its gradient, backward with the reduction over ranks, optimizer."""


class Phases:
    """A stop watch of named phases. On a GPU the time of the kernels issued in a phase, without waiting for them.

    `with phases("forward"): …`, nested at will; `take()` reads and clears.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stack = [IDLE]
        self._seconds: dict[str, float] = defaultdict(float)
        # Events, each with the phase that ended there.
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self.since_s = time.monotonic()
        self._mark = time.perf_counter()

    @property
    def now(self) -> str:
        """The phase that runs."""
        return self._stack[-1]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """Seconds in each phase since the last call. A GPU is waited for."""
        self._switch()
        if self._marks:
            torch.cuda.synchronize()
            for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
                self._seconds[name] += begin.elapsed_time(end) / 1e3
            self._marks = self._marks[-1:]
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    def _switch(self) -> None:
        """Close the account of the phase that ran until now."""
        self.since_s = time.monotonic()
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((self.now, event))
        else:
            mark = time.perf_counter()
            self._seconds[self.now] += mark - self._mark
            self._mark = mark


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Where the time of the latest steps went."""

    mean_s: dict[str, float]
    """Seconds a step in each of STEP_PHASES, mean over ranks."""
    slowest_rank: int
    """The rank with the most work of its own: images and backbone. In all later phases ranks wait for each other."""
    slowest_s: float
    """Its seconds a step in these two."""

    @classmethod
    def of_all_ranks(cls, seconds: dict[str, float], *, steps: int, rank: Rank) -> StepTimes:
        """From what each rank's `Phases.take` gave for so many steps. Every rank must call it."""
        mine = torch.tensor([[seconds.get(name, 0.0) / steps for name in STEP_PHASES]], device=rank.device)
        times_WP = RowGather((1,) * rank.world_size)(mine).cpu()
        own_W = times_WP[:, [STEP_PHASES.index("data"), STEP_PHASES.index("forward")]].sum(1)
        return cls(mean_s=dict(zip(STEP_PHASES, times_WP.mean(0).tolist(), strict=True)),
                   slowest_rank=int(own_W.argmax()), slowest_s=float(own_W.max()))
