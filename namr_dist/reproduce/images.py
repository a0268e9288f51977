"""Losses × ranking weights × seeds of a recipe on images, on this machine, one run at a time.

With and without multi-cluster ranking a loss is trained for as many steps, on the same batches and
from the same weights: all three depend on the recipe and the seed alone. Optimizer settings are the
recipe's, for every loss, but for the rivals that are made of others.

Each run is a process of `namr train --resume`, then one of `namr evaluate`. Nothing is known of
them but what stands in their folders, so the same command goes on after whatever ended it. A run
that was evaluated is a finished cell (cells.py), also where its checkpoint is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rich.progress import Progress

from namr_dist.atomic import write_atomic
from namr_dist.config import Config
from namr_dist.data.remote.address import shown
from namr_dist.errors import InputError
from namr_dist.losses import registry
from namr_dist.reproduce.cells import CELL, check_results, copy_cell, is_complete
from namr_dist.reproduce.features import EARLY_STOP, LOWER_RATE
from namr_dist.results.redact import shareable
from namr_dist.run.folder import RunFolder
from namr_dist.run.state import RunReader
from namr_dist.terminal import say_above, transient_bar
from namr_dist.text import duration, say
from namr_dist.train.checkpoints.resume import check_same
from namr_dist.train.dry_run import launch_commands
from namr_dist.train.signals import EXIT_CODE

HOMEWARE_STEPS = 450
"""Steps of the recipe homeware here. Its own 120 are a demo's: multi-cluster ranking regularises,
and pays once the metric loss begins to over-fit. Prototypes on the same products, measured on test
classes, had no gain at 110 steps and one with all four losses at 450. The number was taken from
them, and not searched for with this recipe."""
CONSTANT = ("--set.loss.ranking.rise_passes", "0")
"""λ does not rise in a grid, on either track: its protocol was fixed so. A recipe's may, for fewer
steps."""
SHORT = ("--set.optim.steps", "20", "--set.optim.warmup_steps", "2")
"""What makes a recipe's runs short: they show that all of it works, and no gain."""


def _lower_rate(base: Config) -> dict[str, Any]:
    return {
        "loss.ranking.weight": 0.0,
        "optim.backbone_lr": float(f"{LOWER_RATE * base.optim.backbone_lr:.6g}"),
        "optim.head_lr": float(f"{LOWER_RATE * base.optim.head_lr:.6g}"),
    }


def _early_stop(base: Config) -> dict[str, Any]:
    steps = round(EARLY_STOP * base.optim.steps)
    warmup = min(base.optim.warmup_steps, steps)
    return {"loss.ranking.weight": 0.0, "optim.steps": steps, "optim.warmup_steps": warmup}


def _one_centre(base: Config) -> dict[str, Any]:
    # With φ = 1 all centres lie at the mean distance.
    return {"loss.ranking.floor": 1.0, "model.delta": _NO_WEIGHTS}


RIVALS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "lower_rate": _lower_rate,
    "early_stop": _early_stop,
    "one_centre": _one_centre,
}
"""Settings of the simplest things that could do what multi-cluster ranking does: LOWER_RATE times
the learning rates of backbone and heads; a run of its own of EARLY_STOP times the steps; the
ranking loss with a single centre at the mean distance and s = 1."""
_NO_WEIGHTS = 1e-6
"""δ by which s = 1"""

_NAMR = [sys.executable, "-m", "namr_dist.cli"]
_LOOK_EVERY_S = 0.2
_SHOWN_FIGURES = ("R@1", "MAP@R")
_LAST_BYTES = 8192
"""of a log, in which its last line is looked for"""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl  # loaded here: a child that is just forked must not load anything


class _StoppedError(Exception):
    """A signal asked for an end."""


class _FailedError(Exception):
    """A run's command ended with a code that is not 0; told in one line."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of the grid."""

    folder: Path
    config: Config
    words: tuple[str, ...]
    """of `namr train`"""
    rival: str | None = None
    """its name in RIVALS"""
    kept: Path | None = None
    """Where its finished cell is copied to; it may be there already."""

    @property
    def files(self) -> RunFolder:
        """The files in its folder, whether they are there or not."""
        return RunFolder(self.folder)

    @property
    def cell(self) -> Path | None:
        """The folder that holds it as a finished cell; None if something is left to do."""
        return next((path for path in (self.folder, self.kept) if path and is_complete(path)), None)

    def keep(self) -> None:
        """Copy the finished cell to where it is kept, unless it is there."""
        if self.kept and not is_complete(self.kept):
            copy_cell(self.folder, self.kept.parent)


def plan(
    recipe: str,
    base: Config,
    overrides: Sequence[str],
    folder: Path,
    *,
    losses: Sequence[str],
    weights: Sequence[float],
    seeds: Sequence[int],
    rivals: Sequence[str] = (),
    results: Path | None = None,
) -> list[PlannedRun]:
    """The runs of the grid, seed by seed, so that each seed adds to every row of the table.

    base: the recipe with its overrides. folder: holds a folder LOSS-WEIGHT-SEED per run, as those
    of slurm/sweep.sh, and LOSS-RIVAL-SEED. rivals: names in RIVALS. results: finished cells are
    copied there, into folders of the same names; those that are there already count as done. Raises
    InputError if two runs are the same, or if something else is in one of the folders.
    """
    runs: list[PlannedRun] = []
    variants: list[tuple[str, str | None, dict[str, Any]]] = [
        (f"{weight:g}", None, {"loss.ranking.weight": weight}) for weight in weights
    ]
    variants += [(rival, rival, RIVALS[rival](base)) for rival in rivals]
    for seed, (variant, rival, settings), loss in itertools.product(seeds, variants, losses):
        # A colon would be a host's to scp and rsync.
        run = folder / f"{loss.replace(':', '.')}-{variant}-{seed}"
        own = {"loss.metric": loss, **settings, "train.seed": seed}
        config = base
        for name, value in own.items():
            config = _changed(config, name, value)
        words = (
            recipe,
            "--run-dir",
            str(run),
            "--resume",
            *overrides,
            *(word for name, value in own.items() for word in (f"--set.{name}", str(value))),
        )
        registry.find(loss)
        if run in (other.folder for other in runs):
            raise InputError(f"{run.name} is asked for twice; give each loss, weight and seed once")
        kept = results / run.name if results else None
        runs.append(PlannedRun(folder=run, config=config, words=words, rival=rival, kept=kept))
    if RunFolder(folder).config.exists():
        raise InputError(f"{folder} is the folder of one run; give another with --run-dir")
    check_results(folder, results)
    for there in runs:
        if there.files.config.exists():
            check_same(there.files.config, Config.load(there.files.config), there.config)
        if there.kept and (copied := RunFolder(there.kept).config).exists():
            # The copy was made without this machine's folders.
            given = shareable(json.loads(there.config.to_json()))
            here = Config.from_object(given, "the planned run")
            check_same(copied, Config.load(copied), here, option="--results")
    return runs


_Settings = TypeVar("_Settings")


def _changed(settings: _Settings, name: str, value: object) -> _Settings:
    """Settings with the field of a dotted name replaced."""
    section, _, rest = name.partition(".")
    new = _changed(getattr(settings, section), rest, value) if rest else value
    return replace(settings, **{section: new})  # type: ignore[type-var]


def describe(runs: Sequence[PlannedRun], folder: Path, *, ranks: int) -> list[str]:
    """What `reproduce` would do, a line a run with the command that trains it."""
    lines = [f"dry run   {_summary(runs, folder, ranks=ranks)}; nothing written or started"]
    for run in runs:
        what, command = _what_is_left(run), shlex.join(map(shown, _train_command(run, ranks)))
        lines.append(f"{run.folder.name:<22} {what:<22} {command}")
    return lines


def _what_is_left(run: PlannedRun) -> str:
    if run.cell:
        return "is kept"
    if run.files.final.exists():
        return "lacks its figures"
    saved = run.files.checkpoints()
    return f"goes on from step {saved[-1][0]:,}" if saved else "begins"


def reproduce(runs: Sequence[PlannedRun], folder: Path, *, ranks: int) -> int:
    """Train and evaluate all runs that are not evaluated yet, on `ranks` ranks of this machine
    each.

    Returns 0, 1 if a run failed (each is told, with its reason, and the others go on), or EXIT_CODE
    if SIGINT, SIGTERM or SIGUSR1 asked for an end: the run that trains then writes a checkpoint
    first. Each run's output goes to its log.txt; stderr gets a line a run, and a bar if it is a
    terminal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for results in {run.kept.parent for run in runs if run.kept}:
        results.mkdir(
            parents=True, exist_ok=True
        )  # what cannot be is said now, and not after hours
    with _only_one(folder) as lock, _noted_signals() as noted, transient_bar() as bar:
        say_above(bar, _summary(runs, folder, ranks=ranks))
        grid = _Grid(lock, noted, bar, total=len(runs))
        took_s: list[float] = []
        failed: list[str] = []
        for number, run in enumerate(runs, start=1):
            began, said = time.monotonic(), "kept"
            try:
                if not run.cell:
                    grid.train_and_evaluate(run, ranks, done=number - 1)
                    took_s.append(time.monotonic() - began)
                    said = duration(took_s[-1]) + _figures(run)
                run.keep()
            except _FailedError as error:
                said = f"FAILED: {error}"
                failed.append(run.folder.name)
            except _StoppedError:
                say_above(
                    bar,
                    f"stopped at {run.folder.name}, as a signal asked for; the same command goes on, and `namr "
                    f"report {folder}` shows what is there",
                )
                return EXIT_CODE
            left = sum(not other.cell for other in runs[number:])
            rest = (
                f"; {left} left, about {duration(left * sum(took_s) / len(took_s))}"
                if left and took_s
                else ""
            )
            say_above(bar, f"{number:>3}/{len(runs)}  {run.folder.name:<22} {said}{rest}")
    if failed:
        say_above(bar, f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


class _Grid:
    """Starts one command after the other, passes signals on to it, and shows how far all are."""

    def __init__(self, lock: BinaryIO, noted: list[int], bar: Progress, *, total: int) -> None:
        self._lock, self._noted, self._bar = lock, noted, bar
        self._task = bar.add_task("", total=total)

    def train_and_evaluate(self, run: PlannedRun, ranks: int, *, done: int) -> None:
        """Raises _FailedError if a command failed, _StoppedError once a signal has ended it."""
        self._bar.update(self._task, description=run.folder.name, completed=done)
        run.folder.mkdir(exist_ok=True)
        if run.rival:  # which its configuration does not say
            of = {"loss": run.config.loss.metric, "variant": run.rival}
            write_atomic(
                run.folder / CELL, json.dumps({**of, "seed": run.config.train.seed}) + "\n"
            )
        where = run.config.data.path
        evaluate = [
            *_NAMR,
            "evaluate",
            str(run.folder),
            *(["--shards", where] if where else []),
            *(word for name in run.config.code_names().values() for word in ("--allow-code", name)),
        ]
        for what, command in (("training", _train_command(run, ranks)), ("evaluation", evaluate)):
            log_bytes = _size(run.files.output)
            code = self._end_of(command, run, ranks, done=done)
            if self._noted or code == EXIT_CODE:
                raise _StoppedError
            if code:
                end = f"code {code}" if code > 0 else signal.Signals(-code).name
                said = _last_line(run.files.output, after_bytes=log_bytes)
                raise _FailedError(
                    f"{what} ended with {end}: {said} (all of it: {run.files.output})"
                )

    def _end_of(self, command: Sequence[str], run: PlannedRun, ranks: int, *, done: int) -> int:
        """The exit code of a command."""
        if self._noted:
            raise _StoppedError
        with open(run.files.output, "ab") as log:
            # A session of its own: Ctrl-C on the terminal reaches only this process, which asks for
            # a checkpoint.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(ranks),
                pass_fds=[self._lock.fileno()],
                preexec_fn=_end_with_parent,
            )
        told, reader = False, RunReader(run.folder)
        while child.poll() is None:
            if self._noted and not told:
                child.send_signal(signal.SIGTERM)
                told = True
            if not self._bar.disable and run.files.config.exists():
                state = reader.look()
                self._bar.update(self._task, completed=done + state.step / state.steps)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_LOOK_EVERY_S)
        return child.returncode


def _train_command(run: PlannedRun, ranks: int) -> list[str]:
    if ranks == 1:
        return [*_NAMR, "train", *run.words]
    return [sys.executable, *launch_commands(ranks, run.words)["torchrun"][1:]]


def _environment(ranks: int) -> dict[str, str]:
    """As launchers/single_node.sh shares cores among ranks."""
    environment = dict(os.environ)
    if ranks > 1:
        environment.setdefault(
            "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks))
        )
    return environment


def _end_with_parent() -> None:
    """Runs in a child: when this program is killed, the child is asked for an end, as by a
    signal."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[BinaryIO]:
    """Wait until no other command works in the folder. The lock is for children to inherit: one
    that outlives a killed command, because it still writes its checkpoint, then holds it until it
    has ended."""
    with open(folder / ".lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(
                f"{folder} is in use by another `namr reproduce`; waiting until it has ended",
                file=sys.stderr,
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield lock


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Signals that ask for an end, as they come."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(runs: Sequence[PlannedRun], folder: Path, *, ranks: int) -> str:
    kept = sum(bool(run.cell) for run in runs)
    steps = max(run.config.optim.steps for run in runs)
    return (
        f"{runs[0].words[0]} → {folder}: {len(runs)} runs of {steps:,} steps on {ranks} "
        f"rank(s), {kept} of them there already"
    )


def _figures(run: PlannedRun) -> str:
    """The last validation's figures, and those of the test split, in percent."""
    validation = RunReader(run.folder).look().validation
    test = json.loads(run.files.metrics.read_text(encoding="utf-8"))["test"]["sample"]
    return "".join(
        f"  {name} "
        + " ".join(
            f"{figure} {figures[figure]:.1f}" for figure in _SHOWN_FIGURES if figure in figures
        )
        for name, figures in (
            ("validation", validation.figures if validation else {}),
            ("test", test),
        )
        if figures
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_line(path: Path, *, after_bytes: int) -> str:
    """The last line that was written after so many bytes: what a command that failed says of the
    reason."""
    with open(path, "rb") as file:
        file.seek(max(after_bytes, _size(path) - _LAST_BYTES))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
