"""A run's folder: the name of each file in it, its checkpoints, and who may write there.

No torch is imported: people look into these folders often.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import struct
from dataclasses import dataclass
from errno import EACCES, EAGAIN, EEXIST, ENOTDIR, EROFS
from pathlib import Path
from typing import BinaryIO

from namr_dist.atomic import remove_folder, write_atomic
from namr_dist.errors import InputError, TransientError

CONFIG = "config.json"
LOG = "metrics.jsonl"
METRICS = "metrics.json"
EMBEDDINGS = "embeddings.safetensors"
CLASSES = "classes.json"
REPORT = "report.html"
_CHECKPOINTS, _TENSORBOARD = "checkpoints", "tensorboard"
_FINAL = "final.safetensors"
_LOCK, _PROBE, _OUTPUT = ".lock", ".writable", "log.txt"

FINAL = "final"
"""What the trained network is called among a run's checkpoints."""
_STATE = re.compile(r"step-(\d+)")
_STEP = re.compile(r"(?:step-)?([0-9]{1,15})")
_OLDER_STATE = re.compile(r"step-\d+\.safetensors")
_ROOM_FOR_LOGS_BYTES = 32 << 20
"""What a run writes apart from its network (logs, events, embeddings, report), generously."""
_FLOCK = struct.Struct("hhqqi4x")
"""Linux's struct flock on 64 bits: type, whence, start, length, process"""


def step_name(step: int) -> str:
    """What a training state is called in messages, options and names of files."""
    return f"step-{step}"


def step_named(name: str) -> int | None:
    """The step that "step-100", "step-00000100" or "100" names; None for anything else."""
    stated = _STEP.fullmatch(name)
    return int(stated[1]) if stated else None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The files of one evaluation of a run. Nothing has to be there yet."""

    folder: Path
    """The run's, or another."""
    split: str | None = None
    """Another split than the one that the configuration tests on."""
    step: int | None = None
    """Of the checkpoint; None: the trained network."""

    def path(self, name: str) -> Path:
        """Where the file is that METRICS, EMBEDDINGS, CLASSES or REPORT names: for another split or
        checkpoint, metrics-SPLIT.json, metrics-step-100.json or metrics-SPLIT-step-100.json."""
        more = [self.split, None if self.step is None else step_name(self.step)]
        file = Path(name)
        stem = "-".join([file.stem, *filter(None, more)])
        return self.folder / f"{stem}{file.suffix}"


def runs_in(folder: Path) -> list[Path]:
    """The runs one level below a folder, by name."""
    return sorted(config.parent for config in folder.glob(f"*/{CONFIG}"))


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. Nothing has to be there yet."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole configuration. A folder holds a run if this file is there."""
        return self.path / CONFIG

    @property
    def log(self) -> Path:
        """What training says, a line of JSON each (log.py)."""
        return self.path / LOG

    @property
    def metrics(self) -> Path:
        """Figures of the test split."""
        return self.path / METRICS

    @property
    def embeddings(self) -> Path:
        """Of the test images."""
        return self.path / EMBEDDINGS

    @property
    def classes(self) -> Path:
        """Figures of each class of the test split."""
        return self.path / CLASSES

    @property
    def report(self) -> Path:
        """The page that `namr report` makes."""
        return self.path / REPORT

    @property
    def tensorboard(self) -> Path:
        """Folder of event files."""
        return self.path / _TENSORBOARD

    @property
    def output(self) -> Path:
        """What the commands said that `namr reproduce` started for this run."""
        return self.path / _OUTPUT

    @property
    def checkpoint_folder(self) -> Path:
        """Holds the training states and the trained network."""
        return self.path / _CHECKPOINTS

    @property
    def final(self) -> Path:
        """The trained network, once training has ended."""
        return self.checkpoint_folder / _FINAL

    def evaluated_steps(self, split: str | None = None) -> list[int]:
        """Steps of the training states that have figures in the folder, lowest first."""
        name = Evaluation(folder=Path(), split=split).path(METRICS).stem
        steps = (
            step_named(path.stem.removeprefix(f"{name}-"))
            for path in self.path.glob(f"{name}-step-*.json")
        )
        return sorted(step for step in steps if step is not None)

    def checkpoint(self, step: int) -> Path:
        """Folder of the training state after so many steps."""
        return self.checkpoint_folder / f"step-{step:08d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(steps done, folder) of every training state that is there, oldest first. None is
        opened."""
        matches = (
            (_STATE.fullmatch(path.name), path) for path in self.checkpoint_folder.glob("step-*")
        )
        return sorted((int(match[1]), path) for match, path in matches if match)

    def older_checkpoints(self) -> list[Path]:
        """Training states as versions wrote them that had one file for each."""
        return sorted(
            path
            for path in self.checkpoint_folder.glob("step-*.safetensors")
            if _OLDER_STATE.fullmatch(path.name)
        )

    def checkpoint_bytes(self) -> int:
        """What all training states take on disk, but for those that a run removes meanwhile."""
        total = 0
        for _, path in self.checkpoints():
            with contextlib.suppress(FileNotFoundError):
                total += sum(file.stat().st_size for file in path.glob("*"))
        return total

    @property
    def has_parameters(self) -> bool:
        """Whether a run is there whose checkpoint or trained network holds every parameter, so that
        it goes on without the weights that it started from."""
        return self.config.exists() and (self.final.exists() or bool(self.checkpoints()))

    def remove_unfinished(self) -> None:
        """Delete what writes left behind that a killed process had begun."""
        for folder in (self.path, self.checkpoint_folder):
            for path in folder.glob(".*.tmp"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def remove_old_checkpoints(self, *, newest: int, keep: int) -> None:
        """Delete checkpoints before the one at step `newest`, but for the latest `keep` with it.

        Later ones stay and are not counted: they were found damaged when the run went on from an
        earlier step. Raises OSError.
        """
        until_now = [path for step, path in self.checkpoints() if step <= newest]
        for path in until_now[:-keep]:
            remove_folder(path)

    def check(self, *, overwrite: bool, goes_on: bool, need_bytes: int) -> None:
        """Raise InputError if a run of so many bytes cannot begin in this folder, TransientError if
        one that goes on there lacks room. Nothing is written.

        overwrite: it may replace a run that is there.  goes_on: it continues that run.
        """
        run = self.path
        if self.config.exists() and not overwrite and not goes_on:
            raise InputError(
                f"{run} already holds a run; go on with it by --resume, choose another folder with "
                "--run-dir, or replace it with --overwrite"
            )
        if not self.config.exists() and (written := self._written()) and not overwrite:
            raise InputError(
                f"{written[0]} is there, but {self.config} is not: what a run would replace may "
                f"belong to something else; copy {CONFIG} back, choose another folder with --run-dir, or "
                "replace it with --overwrite"
            )
        there = run.absolute()
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise self._unwritable(EEXIST if there == run.absolute() else ENOTDIR)
        if not os.access(there, os.W_OK | os.X_OK):
            raise self._unwritable(EACCES)
        disk, need = shutil.disk_usage(there), need_bytes + _ROOM_FOR_LOGS_BYTES
        if disk.total == 0:  # no disk, such as /proc, whatever its permissions say
            raise self._unwritable(EROFS)
        if disk.free < need:
            # Where a run has begun, there was room.
            kind = TransientError if goes_on else InputError
            raise kind(
                f"run folder {run} has {disk.free / 2**20:.0f} MiB free, this run needs "
                f"{need / 2**20:.0f}; free some or choose another disk with --run-dir"
            )

    def claim(self, *, overwrite: bool, goes_on: bool, need_bytes: int) -> None:
        """Make the folder ready for a run of so many bytes. Raises as `check` does."""
        self.check(overwrite=overwrite, goes_on=goes_on, need_bytes=need_bytes)
        probe = self.path / _PROBE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(probe, "")
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error.errno or EACCES) from None
        if not overwrite:
            return
        # The old run goes once the new one can begin, and only what a run writes: never a whole
        # folder that a user may have pointed to by mistake.
        for path in self._written():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def lock(self) -> BinaryIO | None:
        """Keep every other process from training in the folder while the result is open; None where
        the file system has no locks. Raises InputError if one does already."""
        try:
            lock = open(self.path / _LOCK, "ab")  # noqa: SIM115 (open as long as the run lasts)
        except OSError:
            return None
        try:
            # POSIX's kind: released when the process dies, and not passed on to loader workers, who
            # outlive it a little.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if error.errno in (EACCES, EAGAIN):
                raise InputError(
                    f"run folder {self.path} is in use: another process trains there; wait until it has "
                    "ended, or choose another folder with --run-dir"
                ) from None
            return None
        return lock

    def is_locked(self) -> bool | None:
        """Whether a process holds the lock; None where that cannot be known.

        It is only asked for: taking it, even for a moment, could turn away a run that starts just
        then.
        """
        try:
            with open(self.path / _LOCK, "rb") as file:
                answer = fcntl.fcntl(
                    file, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                )
        except OSError:
            return None
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def _written(self) -> list[Path]:
        """What stands in the folder under the names of a run's files and folders, the configuration
        apart."""
        names = (_CHECKPOINTS, _TENSORBOARD, LOG, METRICS, CLASSES, EMBEDDINGS, REPORT)
        of_others = [
            path
            for name in (METRICS, CLASSES, EMBEDDINGS, REPORT)
            for path in self.path.glob(Evaluation(folder=Path(), split="*").path(name).name)
        ]
        return [
            path
            for path in (*(self.path / name for name in names), *sorted(of_others))
            if path.exists()
        ]

    def _unwritable(self, number: int) -> InputError:
        return InputError(
            f"run folder {self.path} cannot be written ({os.strerror(number)}); choose another with "
            "--run-dir"
        )
