"""Where a step's time goes: seconds in each phase, an inner phase's apart from the one around it;
and on which rank. And the most memory that it held: whether a batch fits, and how much larger one
could be.

P phases, W ranks.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from namr_dist.parallel.gather import RowGather
from namr_dist.parallel.ranks import Rank

IDLE = "other"
"""What is outside every phase."""
STEP_PHASES = ("data", "forward", "heads", "gather", "loss", "backward", "step")
"""Of a training step: waiting for images, backbone, heads with their batch norm over all ranks,
embeddings of all ranks, the loss and its gradient, backward with the reduction over ranks,
optimizer."""
_STATUS = Path("/proc/self/status")


class Phases:
    """A stop watch of named phases. On a GPU the time of the kernels issued in a phase, without
    waiting for them.

    `with phases("forward"): …`, nested at will; `take()` reads and clears. What is nested in a
    phase that is not of a training step, such as validation, counts as that. Other threads may read
    step, now, since_s and broken.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        """The step that runs, counted from 1; 0 before the first."""
        self.since_s = time.monotonic()
        """When a phase began or ended last."""
        self.broken: str | None = None
        """The innermost phase that an exception left, until another begins."""
        self._cuda = device.type == "cuda"
        self._stack = [IDLE]
        # Of each phase that runs, the one that its time counts as.
        self._accounts = [IDLE]
        self._seconds: dict[str, float] = defaultdict(float)
        # Events, each with the phase that ended there.
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._mark = time.perf_counter()

    @property
    def now(self) -> str:
        """The phase that runs."""
        return self._stack[-1]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of what runs inside as that of the phase `name`."""
        within = self._accounts[-1]
        account = name if within == IDLE or within in STEP_PHASES else within
        if account != within:
            self._close_account()
        self._stack.append(name)
        self._accounts.append(account)
        self.since_s, self.broken = time.monotonic(), None
        try:
            yield
        except BaseException:
            self.broken = self.broken or name
            raise
        finally:
            if account != within:
                self._close_account()
            self._stack.pop()
            self._accounts.pop()
            self.since_s = time.monotonic()

    def take(self) -> dict[str, float]:
        """Seconds in each phase since the last call. A GPU is waited for."""
        self._close_account()
        if self._marks:
            torch.cuda.synchronize()
            for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
                self._seconds[name] += begin.elapsed_time(end) / 1e3
            self._marks = self._marks[-1:]
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    def _close_account(self) -> None:
        """Book the time until now."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((self._accounts[-1], event))
        else:
            mark = time.perf_counter()
            self._seconds[self._accounts[-1]] += mark - self._mark
            self._mark = mark


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Where the time of the latest steps went."""

    mean_s: dict[str, float]
    """Seconds a step in each of STEP_PHASES, mean over ranks."""
    slowest_rank: int
    """The rank with the most work of its own: images and backbone. In all later phases ranks wait
    for each other."""
    slowest_s: float
    """Its seconds a step in these two."""

    @classmethod
    def of_all_ranks(cls, seconds: dict[str, float], *, steps: int, rank: Rank) -> StepTimes:
        """From what each rank's `Phases.take` gave for so many steps. Every rank must call it."""
        mine = torch.tensor(
            [[seconds.get(name, 0.0) / steps for name in STEP_PHASES]], device=rank.device
        )
        times_WP = RowGather((1,) * rank.world_size)(mine).cpu()
        own_W = times_WP[:, [STEP_PHASES.index("data"), STEP_PHASES.index("forward")]].sum(1)
        return cls(
            mean_s=dict(zip(STEP_PHASES, times_WP.mean(0).tolist(), strict=True)),
            slowest_rank=int(own_W.argmax()),
            slowest_s=float(own_W.max()),
        )


def take_peak_bytes(device: torch.device) -> int:
    """On a GPU, the most bytes that tensors of this process held since the last call. On a CPU, the
    most that its resident set has been since it began, loader workers apart."""
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak_bytes
    peaks = (
        [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        if _STATUS.is_file()
        else []
    )
    # Unlike VmHWM, maxrss is not less than what the program held that started this one.
    return 1024 * int(peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
