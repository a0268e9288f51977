"""Checkpoints at step boundaries: when to write one and when to stop, agreed by all ranks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from namr_dist.config import Config
from namr_dist.parallel.host import HostGroup
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.state import save_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class CheckpointPolicy:
    """One on each rank. All ranks must make each call together."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        run: RunFolder,
        config: Config,
        *,
        data_hash: str,
        host: HostGroup,
        first: bool,
    ) -> None:
        self._engine = engine
        self._run = run
        self._config = config
        self._data_hash = data_hash
        self._host = host
        self._first = first
        self._latest_s = time.monotonic()

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

    def save(self, step: int) -> tuple[bool, str]:
        """Write the state after `step` steps and then drop what is older than
        train.keep_checkpoints; whether it was written, and a line for people. Where it was not, the
        line says why, and the checkpoints before stay."""
        began = time.monotonic()
        path = self._run.checkpoint(step)
        trouble = save_state(
            self._engine,
            path,
            step=step,
            config=self._config,
            data_hash=self._data_hash,
            host=self._host,
        )
        self._latest_s = time.monotonic()
        if trouble is not None:
            last = [before for before, _ in self._run.checkpoints() if before < step]
            return False, (
                f"WARNING: no checkpoint at step {step}: {trouble}; until the next one, a run that breaks "
                f"goes on from {f'step {last[-1]}' if last else 'the beginning'}"
            )
        if self._first:
            self._run.remove_old_checkpoints(newest=step, keep=self._config.train.keep_checkpoints)
        return True, f"checkpoint at step {step} in {self._latest_s - began:.1f} s → {path}"
