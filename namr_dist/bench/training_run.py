"""One run of `namr train` for a benchmark: the command, in a process of its own, and the figures in
its log."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from namr_dist.kernels.bench.measure import Spread, spread
from namr_dist.run.folder import RunFolder
from namr_dist.run.log import Entry, read_log
from namr_dist.train.phases import STEP_PHASES

INTERVALS = 5
"""Lines of speed that count; each is of as many steps."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """How many steps a run makes."""

    interval: int
    """Steps between two lines of speed."""
    warm_up: int
    """Steps that do not count, whole intervals: kernels are compiled, memory is asked for, and the
    batches arrive that the workers made while training had not yet begun."""

    @classmethod
    def of(cls, steps: int, *, in_flight: int) -> Length:
        """steps: that count, a multiple of INTERVALS. in_flight: batches that are made ahead."""
        interval = steps // INTERVALS
        return cls(interval=interval, warm_up=max(1, -(-in_flight // interval)) * interval)

    @property
    def steps(self) -> int:
        """In all."""
        return self.warm_up + INTERVALS * self.interval


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Medians over the intervals that count, with the 20th and 80th percentile."""

    img_per_s: Spread
    step_ms: Spread
    phases_ms: dict[str, Spread]
    """Milliseconds of a step in each of STEP_PHASES."""
    mfu: float | None
    """Share of the device's peak; None where that is not known."""
    idle_share: float
    """Of all time that counts, how much was spent waiting for images. A mean: workers deliver in
    bursts."""
    device_img_per_s: float
    """Images a second, had none been waited for."""
    peak_mib: float
    """The most that training held, as train/phases.py counts; largest of the intervals."""


def command(
    recipe: str, run: Path, words: Sequence[str], *, steps: int, log_every: int
) -> list[str]:
    """Words of `namr train` in the folder `run` that do nothing beside steps.  words: further
    overrides."""
    settings = {
        "optim.steps": steps,
        "optim.warmup_steps": steps,
        "train.log_every": log_every,
        "train.tensorboard": False,
        "train.checkpoint_minutes": 0,
        "train.checkpoint_every": 0,
    }
    return ["train", recipe, "--run-dir", str(run), *overrides(settings), *words]


def overrides(settings: Mapping[str, object]) -> list[str]:
    """As `--set.section.field value …`, of which the last one counts where a field is named
    twice."""
    return [part for name, value in settings.items() for part in (f"--set.{name}", str(value))]


def start(words: Sequence[str]) -> int:
    """Run the `namr` command, with stderr as it comes; its exit code."""
    command = [sys.executable, "-m", "namr_dist.cli", *words]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


def read_figures(run: Path, length: Length, *, batch: int) -> Figures:
    """What the log says of the intervals after the warm-up; `batch` images a step."""
    counted = [
        line
        for line in read_log(RunFolder(run).log).entries
        if "img_per_s" in line and line["step"] > length.warm_up
    ]
    assert len(counted) == INTERVALS, f"{len(counted)} lines of speed after step {length.warm_up}"
    step_s, data_s = np.array([[batch / line["img_per_s"], line["data_s"]] for line in counted]).T
    return Figures(
        img_per_s=_spread(counted, "img_per_s", scale=1),
        step_ms=spread((1e3 * step_s).tolist()),
        phases_ms={name: _spread(counted, f"{name}_s", scale=1e3) for name in STEP_PHASES},
        mfu=float(np.median([line["mfu"] for line in counted])) if "mfu" in counted[0] else None,
        idle_share=float(data_s.sum() / step_s.sum()),
        device_img_per_s=float(batch * len(counted) / (step_s - data_s).sum()),
        peak_mib=max(line["peak_mib"] for line in counted),
    )


def _spread(lines: list[Entry], name: str, *, scale: float) -> Spread:
    return spread([scale * line[name] for line in lines])
