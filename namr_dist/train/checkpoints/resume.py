"""What stands in a run's folder when training starts: nothing, a finished run, or a place to go on
from."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from namr_dist.config import Config
from namr_dist.data.remote.address import shown
from namr_dist.data.shardset.manifest import Manifest, SplitIndex
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.run.folder import RunFolder
from namr_dist.text import printable
from namr_dist.train.checkpoints.state import SavedState, open_state, versions
from namr_dist.train.checkpoints.verified_file import no_hash, verify_file

MAY_DIFFER = {
    "data.path",
    "data.remote.cache",
    "data.remote.cache_gib",
    "data.remote.retries",
    "data.remote.stall_seconds",
    "data.remote.manifest_seconds",
    "data.workers",
    "data.batch_minutes",
    "data.verify",
    "train.zero_stage",
    "train.log_every",
    "train.validate_every",
    "train.tensorboard",
    "train.checkpoint_minutes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.timeout_minutes",
    "train.micro_batch",
    "train.profile",
    "train.profile_after",
    "evaluation.recall_at",
    "evaluation.reidentification_draws",
}
"""Settings that the run does not depend on, but for rounding. The images themselves are compared by
their hash."""
_MAY_BECOME = {"data.damaged_images": ("stop", "replace")}
"""Settings that may change in one direction: a run that has not stopped has replaced nothing."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    step: int = 0
    saved: SavedState | None = None
    """The checkpoint to go on from."""
    goes_on: bool = False
    """The folder holds this run already."""
    finished: bool = False
    warnings: tuple[str, ...] = ()
    """Lines for people."""


def hash_images(manifest: Manifest, index: SplitIndex) -> str:
    """Names the images that are trained on, their bytes and their order: what a plan's numbers
    mean."""
    shards = [manifest.shards[number].sha256 for number in np.unique(index.shard_N)]
    return hashlib.sha256("\n".join([*shards, *index.keys]).encode()).hexdigest()


def find_start(run: RunFolder, config: Config, *, data_hash: str) -> Start:
    """What `--resume` goes on from: the newest whole checkpoint of the same run, or the beginning.

    Raises InputError if the folder holds a run with other settings or images, checkpoints of which
    none is whole or one is an older version's, or none and a trained network that is damaged.
    """
    if not run.config.exists():
        return Start()
    check_same(run.config, Config.load(run.config), config)
    run.remove_unfinished()
    warnings: list[str] = []
    damaged: list[str] = []
    damaged_final = ""
    if run.final.exists():
        try:
            verified = verify_file(run.final, required=False)
            with safetensors.safe_open(run.final, "pt"):
                unknown = () if verified else (no_hash(run.final),)
                return Start(goes_on=True, finished=True, warnings=unknown)
        except (DamagedFileError, safetensors.SafetensorError, OSError) as error:
            damaged_final = f"{run.final} is damaged ({error})"
    if older := run.older_checkpoints():  # a finished run needs none
        raise InputError(
            f"{older[-1]} was written by an older version of namr-dist, which had one file for each checkpoint; "
            "go on with that version, or start again with --overwrite"
        )
    if damaged_final:
        if not run.checkpoints():
            raise InputError(
                f"{damaged_final}, and no checkpoint is there to make it again from; copy it or a checkpoint there "
                "again, or start again with --overwrite"
            )
        warnings.append(f"{damaged_final}; it is made again from a checkpoint")
    for step, path in reversed(run.checkpoints()):
        try:
            saved = open_state(path)
        except DamagedFileError as error:
            damaged.append(f"{path} is damaged ({error})")
            continue
        check_same(path, saved.config, config)
        if saved.step != step:
            raise InputError(
                f"{path} holds step {saved.step}; give it that step's name, or remove it"
            )
        if saved.data_hash != data_hash:
            raise InputError(
                f"{path} was trained on other images than {shown(config.data.path or 'homeware')} holds "
                "now; set data.path to those, or start again with --overwrite"
            )
        warnings += [f"{damage}; an older one is used" for damage in damaged]
        if changed := _other_versions(saved):
            warnings.append(changed)
        return Start(step=saved.step, saved=saved, goes_on=True, warnings=tuple(warnings))
    if run.checkpoints():
        raise InputError(
            f"no checkpoint in {run.checkpoint_folder} is whole: {'; '.join(damaged)}; copy one there "
            "again, or start again with --overwrite"
        )
    return Start(goes_on=True)


def _other_versions(saved: SavedState) -> str | None:
    """A line if another software wrote the checkpoint than runs now: every bit of the state is the
    same, but what is computed from it may round otherwise."""
    here = versions()
    differing = [
        f"{name} {there}, here {here.get(name, 'none')}"
        for name, there in saved.versions.items()
        if here.get(name) != there
    ]
    if saved.versions and not differing:
        return None
    wrote = (
        f"was written with {'; '.join(differing)}"
        if differing
        else "does not say which versions of torch and DeepSpeed wrote it"
    )
    return f"{saved.path} {wrote}: the run goes on, but not bit for bit as it would have"


def check_same(path: Path, there: Config, here: Config, *, option: str = "--run-dir") -> None:
    """Raise InputError, naming the file `path` and the fields, if two configurations do not make
    the same run. option: gives another folder."""
    before, now = _fields(dataclasses.asdict(there)), _fields(dataclasses.asdict(here))
    changed = [
        f"{name} is {now[name]}, there {printable(str(before[name]))}"
        for name in now
        if name not in MAY_DIFFER
        and now[name] != before[name]
        and (before[name], now[name]) != _MAY_BECOME.get(name)
    ]
    if changed:
        raise InputError(
            f"{path} belongs to another run: {'; '.join(changed)}; give its settings, or another folder "
            f"with {option}"
        )


def _fields(section: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in section.items():
        flat.update(
            _fields(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat
