"""How a run stands, read from its folder while it trains, on any machine that sees the folder.
Nothing is written.

No torch is imported: people look often.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from namr_dist.config import Config
from namr_dist.errors import InputError
from namr_dist.run.folder import CONFIG, RunFolder
from namr_dist.run.log import Entry, GrowingLog, count_of, figures_of, number_of, text_of, time_of

State = Literal["not started", "training", "stopped", "finished", "evaluated"]

_NO_PHASES = ("img_per_s", "time_s", "slowest_s")
"""figures of a line of speed that end in _s as phases do"""
_LEAST_IMG_PER_S = 1e-9
"""below which a speed is none"""
_LEAST_SILENCE_S = 60.0
_START_S = 600.0
"""Before the first step of a start: loading, kernels that are compiled, a first batch."""
_RECENT = 200


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a validation measured, and after how many steps."""

    step: int
    figures: dict[str, float]
    """percent"""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What is known of a run at one moment; None for what is not known, or not yet."""

    run: str
    recipe: str
    state: State
    step: int
    steps: int
    epoch: int | None
    elapsed_s: float
    """of training, over all starts; what a start lost by not reaching a checkpoint is not
    counted"""
    left_s: float | None
    """at the pace of the later half of the steps since the last start, validation and checkpoints
    included"""
    last_line_age_s: float | None
    silent_s: float | None
    """seconds without a line while training, if they are many times what this run usually takes"""
    unreadable_lines: int
    """of the log, which were skipped"""
    loss: float | None
    metric_loss: float | None
    ranking_loss: float | None
    lr: float | None
    img_per_s: float | None
    mfu: float | None
    """share of the devices' peak"""
    gathered_mib: float | None
    """what a rank receives in gathers a step"""
    step_s: float | None
    phases_s: dict[str, float]
    """seconds a step, mean over ranks"""
    slowest_rank: int | None
    slowest_host: str | None
    slowest_s: float | None
    """its seconds a step of work of its own"""
    validation: Validation | None
    best_validation: Validation | None
    """by the first figure, R@1"""
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    resumed_from: tuple[int, ...]
    """the step of each restart"""
    damaged_images: int | None
    replacements: int | None


class _Progress:
    """What a run's log says of it, kept up with the log."""

    def __init__(self, log: Path) -> None:
        self._log = GrowingLog(log)
        self._forget()

    def _forget(self) -> None:
        self.time_s = 0.0
        self.step: Entry = {}
        self.speed: Entry = {}
        self.validations: list[Validation] = []
        self.resumed_from: list[int] = []
        self.marks: list[tuple[int, float]] = [(0, 0.0)]
        """(step, seconds) since the last start, which is the first of them"""

    @property
    def changed(self) -> float | None:
        """When the last line came, seconds since 1970."""
        return self._log.changed

    @property
    def unreadable(self) -> int:
        """Lines that could not be read."""
        return self._log.unreadable

    def read(self) -> None:
        anew, entries = self._log.read()
        if anew:
            self._forget()
        for entry in entries:
            self._add(entry)

    def _add(self, entry: Entry) -> None:
        time_s = time_of(entry)
        if time_s is None:
            time_s = self.time_s
        self.time_s = max(self.time_s, time_s)
        if "resumed" in entry:
            self.resumed_from.append(entry["step"])
            self.marks = [(entry["step"], time_s)]
        elif (figures := figures_of(entry)) is not None:
            self.validations.append(Validation(step=entry["step"], figures=figures))
        elif "img_per_s" in entry:
            self.speed = entry
        elif "loss" in entry:
            self.step = entry
            self.marks.append((entry["step"], time_s))

    def pace_s(self) -> float | None:
        """Seconds a step, pauses included, over the later half of the steps since the last
        start."""
        (first, began_s), (last, ended_s) = self.marks[(len(self.marks) - 1) // 2], self.marks[-1]
        return (ended_s - began_s) / (last - first) if last > first else None

    def usual_s(self, log_every: int) -> float:
        """Seconds between two writes at most, pauses apart: on a GPU, losses are read once in
        `log_every` steps."""
        times_s = [time_s for _, time_s in self.marks[-_RECENT:]]
        gaps_s = [after - before for before, after in zip(times_s, times_s[1:], strict=False)]
        return log_every * statistics.median(gaps_s) if gaps_s else 0.0

    def silence_s(self, log_every: int) -> float:
        """Seconds without a line that are more than this run's steps and pauses explain."""
        if len(self.marks) == 1:
            return _START_S
        longest_s = max(
            after - before
            for (_, before), (_, after) in zip(self.marks, self.marks[1:], strict=False)
        )
        return max(_LEAST_SILENCE_S, 5 * self.usual_s(log_every), 2 * longest_s)


class RunReader:
    """Looks at the run in a folder, again and again."""

    def __init__(self, run: Path) -> None:
        self._run = RunFolder(run)
        self._progress = _Progress(self._run.log)

    def look(self) -> RunState:
        """How the run stands now. Raises InputError if the folder holds none."""
        run, log = self._run, self._progress
        if not run.config.exists():
            raise InputError(
                f"{run.path} holds no run (no {CONFIG}); give the folder that --run-dir named"
            )
        config = Config.load(run.config)
        log.read()
        now = time.time()
        checkpoint_step, checkpoint_time = _newest_checkpoint(run)
        quiet_s = max(0.0, now - max(run.config.stat().st_mtime, log.changed or 0.0))
        state = self._state(config, quiet_s, begun=bool(log.step) or checkpoint_step is not None)
        step, pace_s = log.marks[-1][0], log.pace_s()
        running_s = quiet_s if state == "training" and len(log.marks) > 1 else 0.0
        speed, img_per_s = log.speed, number_of(log.speed, "img_per_s")
        return RunState(
            run=str(run.path),
            recipe=config.recipe,
            state=state,
            step=step,
            steps=config.optim.steps,
            epoch=count_of(log.step, "epoch"),
            elapsed_s=log.time_s + running_s,
            left_s=None
            if pace_s is None
            else max(0.0, (config.optim.steps - step) * pace_s - running_s),
            last_line_age_s=None if log.changed is None else max(0.0, now - log.changed),
            silent_s=quiet_s
            if state == "training" and quiet_s > log.silence_s(config.train.log_every)
            else None,
            unreadable_lines=log.unreadable,
            loss=number_of(log.step, "loss"),
            metric_loss=number_of(log.step, "metric_loss"),
            ranking_loss=number_of(log.step, "ranking_loss"),
            lr=number_of(log.step, "lr"),
            img_per_s=img_per_s,
            mfu=number_of(speed, "mfu"),
            gathered_mib=number_of(speed, "gathered_mib"),
            step_s=config.data.classes_per_batch * config.data.images_per_class / img_per_s
            if img_per_s and img_per_s > _LEAST_IMG_PER_S
            else None,
            phases_s={
                name[:-2]: seconds
                for name in speed
                if name.endswith("_s")
                and name not in _NO_PHASES
                and (seconds := number_of(speed, name)) is not None
            },
            slowest_rank=count_of(speed, "slowest_rank"),
            slowest_host=text_of(speed, "slowest_host"),
            slowest_s=number_of(speed, "slowest_s"),
            validation=log.validations[-1] if log.validations else None,
            best_validation=_best(log.validations),
            checkpoint_step=checkpoint_step,
            checkpoint_age_s=None if checkpoint_time is None else max(0.0, now - checkpoint_time),
            resumed_from=tuple(log.resumed_from),
            damaged_images=count_of(speed, "damaged_images"),
            replacements=count_of(speed, "replacements"),
        )

    def _state(self, config: Config, quiet_s: float, *, begun: bool) -> State:
        run, log = self._run, self._progress
        if run.final.exists():
            return "evaluated" if run.metrics.exists() else "finished"
        locked = run.is_locked()
        if locked is None:
            training = quiet_s < log.silence_s(config.train.log_every)
        else:
            # Some file systems keep a lock to the machine that took it: a fresh line then tells
            # more than its absence.
            training = locked or quiet_s < 2 * log.usual_s(config.train.log_every)
        return "training" if training else "stopped" if begun else "not started"


def _newest_checkpoint(run: RunFolder) -> tuple[int | None, float | None]:
    """(steps done, seconds since 1970) of the newest training state."""
    for step, path in reversed(run.checkpoints()):
        try:
            return step, path.stat().st_mtime
        except FileNotFoundError:
            continue  # replaced by --overwrite since it was listed
    return None, None


def _best(validations: list[Validation]) -> Validation | None:
    def first_figure(validation: Validation) -> float:
        return next(iter(validation.figures.values()), 0.0)

    return max(validations, key=first_figure, default=None)
