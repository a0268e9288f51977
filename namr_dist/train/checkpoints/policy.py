"""Checkpoints at step boundaries: when to write one and when to stop, agreed by all ranks.

Training halts while each rank copies its part of the state to the host. A thread of each then
writes it, and the threads agree among themselves; the next checkpoint waits for the one before.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from namr_dist.config import Config
from namr_dist.parallel.host import HostGroup
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.state import (
    HostMemory,
    Snapshot,
    take_snapshot,
    write_snapshot,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_CLOSE_S = 60.0


class CheckpointPolicy:
    """One on each rank. All ranks must make it and make each call together, but for `news`.

    Leaving its `with` by an error, a rank finishes what it writes, for a minute at most: the others
    may do so too, and then the checkpoint counts.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        run: RunFolder,
        config: Config,
        *,
        data_hash: str,
        host: HostGroup,
        first: bool,
        timeout: timedelta,
    ) -> None:
        """timeout: how long a rank that has written its part waits for the others."""
        self._engine = engine
        self._run = run
        self._config = config
        self._data_hash = data_hash
        self._host = host
        self._first = first
        self._latest_s = time.monotonic()
        self._memory = HostMemory()
        # Of the threads alone: their messages may come between any of training's.
        self._writers = HostGroup(timeout)
        self._write: _Write | None = None
        self._saved = False
        self._news: list[str] = []

    def __enter__(self) -> CheckpointPolicy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._write:
            self._write.thread.join(_CLOSE_S)

    def decide(self, step: int, *, signal: int) -> tuple[bool, int]:
        """After so many steps: (write a checkpoint, the signal to stop for or 0). A signal on any
        rank counts, and the first rank's clock.

        signal: the number of one that asked this rank to stop, 0 if none did.
        """
        train = self._config.train
        waited = time.monotonic() - self._latest_s >= 60 * train.checkpoint_minutes
        due = train.checkpoint_every > 0 and step % train.checkpoint_every == 0
        due = due or (self._first and train.checkpoint_minutes > 0 and waited)
        save, stop = self._host.largest(int(due), signal)
        return bool(save or stop), stop

    def save(self, step: int) -> None:
        """Copy the state after `step` steps to the host, and begin to write it. Older checkpoints
        are dropped once it is written, but for train.keep_checkpoints; where it cannot be, they
        stay."""
        began_s = time.monotonic()
        self.finish()
        snapshot: Snapshot | str
        try:
            snapshot = take_snapshot(
                self._engine,
                self._memory,
                step=step,
                config=self._config,
                data_hash=self._data_hash,
            )
        except MemoryError as error:
            snapshot = str(error)
        self._latest_s = time.monotonic()
        write = _Write(step=step, began_s=began_s, halt_s=self._latest_s - began_s)
        # A daemon: a rank that must end does not wait for a disk that never answers.
        write.thread = threading.Thread(
            target=self._write_all, args=(write, snapshot), name="checkpoint", daemon=True
        )
        write.thread.start()
        self._write = write

    def finish(self) -> bool:
        """Wait until the latest checkpoint is written; whether it was. Raises what its writing
        raised, such as a lost connection to another rank."""
        if self._write:
            write, self._write = self._write, None
            write.thread.join()
            if write.error:
                raise write.error
            self._saved = write.saved
            self._news += write.said
        return self._saved

    def news(self) -> list[str]:
        """Lines for people on what has been written, or could not be, since the last call. Waits
        for nothing."""
        if self._write and not self._write.thread.is_alive():
            self.finish()
        news, self._news = self._news, []
        return news

    def _write_all(self, write: _Write, snapshot: Snapshot | str) -> None:
        try:
            trouble = write_snapshot(snapshot, self._run.checkpoint(write.step), self._writers)
            write.saved = trouble is None
            if self._first:
                write.said.append(self._failed(write, trouble) if trouble else self._done(write))
                if write.saved:
                    self._remove_old(write)
        except Exception as error:
            write.error = error

    def _done(self, write: _Write) -> str:
        return (
            f"checkpoint at step {write.step} in {time.monotonic() - write.began_s:.1f} s, of which training "
            f"waited {write.halt_s:.2f} → {self._run.checkpoint(write.step)}"
        )

    def _failed(self, write: _Write, trouble: str) -> str:
        try:
            last = [before for before, _ in self._run.checkpoints() if before < write.step]
            there = f"step {last[-1]}" if last else "the beginning"
        except OSError:  # the same disk
            there = "the last one"
        return (
            f"WARNING: no checkpoint at step {write.step}: {trouble}; until the next one, a run that "
            f"breaks goes on from {there}"
        )

    def _remove_old(self, write: _Write) -> None:
        keep = self._config.train.keep_checkpoints
        try:
            self._run.remove_old_checkpoints(newest=write.step, keep=keep)
        except OSError as error:
            write.said.append(
                f"WARNING: an older checkpoint stays: {error.strerror}: {error.filename}"
            )


@dataclass(kw_only=True)
class _Write:
    """One checkpoint on its way to disk."""

    step: int
    began_s: float
    halt_s: float
    thread: threading.Thread = field(init=False)
    saved: bool = False
    said: list[str] = field(default_factory=list)
    """Lines for people, on the first rank."""
    error: Exception | None = None
