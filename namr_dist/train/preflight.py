"""What can be known to be wrong before the first step: each check raises InputError, and none writes a file.

`claim_folder` and `lock_folder` alone write: they make the run's folder once a run may begin there.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from errno import EACCES, EAGAIN, EEXIST, ENOTDIR, EROFS
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import nn

from namr_dist.atomic import write_atomic
from namr_dist.config import Config
from namr_dist.data.location import open_shards
from namr_dist.data.read.plan import Sampling, check_plan
from namr_dist.data.read.select import training_images
from namr_dist.data.remote.cache import check_cache
from namr_dist.data.shardset.manifest import Manifest, SplitIndex
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.errors import InputError
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.retrieval.roles import divide
from namr_dist.train.checkpoints.state import state_bytes

# What a run writes beside its network (logs, events, embeddings, report), generously.
_ROOM_FOR_LOGS_BYTES = 32 << 20


def preflight(config: Config, *, world_size: int, local_rank: int) -> tuple[Manifest, SplitIndex, Sampling]:
    """The shard set, its training images and how they make batches, once all can serve `config` on so many ranks.

    A machine's first rank hashes the shards as well, if the configuration says so and they lie there; others are
    hashed when they are fetched.
    """
    config.check()
    data = config.data
    manifest = open_shards(data.path, data.remote)
    index = training_images(manifest, data, seed=config.train.seed)
    if data.validation_split and data.validation_split not in (*manifest.splits, *manifest.subsets):
        raise InputError(f"{manifest.folder} has no split {data.validation_split!r} to validate on; it has "
                         f"{', '.join((*manifest.splits, *manifest.subsets))}; set data.validation_split to None, or "
                         "build the set with --validation")
    used = {" and ".join(data.train_splits): manifest.index(*data.train_splits)}
    for split in filter(None, (data.validation_split, data.test_split)):
        used[split] = manifest.index(split)
        _check_measurable(used[split], f"split {split!r} of {manifest.folder}", world_size=world_size)
    for (one, first), (other, second) in itertools.combinations(used.items(), 2):
        if shared := len(np.intersect1d(first.label_N, second.label_N)):
            raise InputError(f"{one} and {other} of {manifest.folder} share {shared} classes; name splits that share "
                             "none in data.train_splits, data.validation_split and data.test_split")
    how = Sampling(classes_per_batch=data.classes_per_batch, images_per_class=data.images_per_class,
                   sampling=data.sampling, categories_per_batch=data.categories_per_batch, shuffle=data.shuffle,
                   views=data.views, across_groups=data.across_groups)
    check_plan(index, how, world_size=world_size)
    # The last rank of a machine knows how many there are, and speaks for all.
    check_cache(manifest, index, how, world_size=world_size, ranks_here=local_rank + 1)
    if local_rank == 0 and data.verify and manifest.source is None:
        verify_shards(manifest, data.train_splits, hashes_alone=data.damaged_images == "replace")
        verify_shards(manifest, [data.validation_split] if data.validation_split else [])
    return manifest, index, how


def _check_measurable(index: SplitIndex, name: str, *, world_size: int) -> None:
    """Raise InputError if a split has an image for each rank to embed too few, or no query with a right answer."""
    if len(index) < world_size:
        raise InputError(f"{name} has fewer images than there are ranks ({world_size}); use fewer ranks")
    sides = divide(index.role_N, len(index), name)
    labels, counts = np.unique(index.label_N[sides.item_G], return_counts=True)
    right = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    if not any(right.get(label, 0) > (own >= 0)
               for label, own in zip(index.label_N[sides.query_Q].tolist(), sides.own_Q.tolist(), strict=True)):
        raise InputError(f"{name} has no query with another image of its class to find; name another split, or rebuild "
                         "the shard set with classes of two images or more")


@torch.no_grad()
def check_sizes(network: EmbeddingNetwork, config: Config, device: torch.device) -> None:
    """Raise InputError if the backbone refuses images of the training or of the test size."""
    network.eval()
    for name, size in (("image_size", config.data.image_size), ("test_size", config.test_size)):
        try:
            network(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device))
        except InputError:
            raise
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"model.backbone {config.model.backbone} does not take images of {size} px "
                             f"({str(error).splitlines()[0]}); change data.{name}") from None
    network.train()


def run_bytes(module: nn.Module, config: Config) -> int:
    """What a run of this module writes, at its most: its final network, and one checkpoint more than are kept."""
    network = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    return network + (config.train.keep_checkpoints + 1) * state_bytes(module)


def check_folder(run: Path, *, overwrite: bool, goes_on: bool, need_bytes: int) -> None:
    """Raise InputError if a run of so many bytes cannot begin in the folder `run`, which need not be there yet.

    overwrite: it may replace a run that is there.  goes_on: it continues that run.
    """
    if (run / "config.json").exists() and not overwrite and not goes_on:
        raise InputError(f"{run} already holds a run; go on with it by --resume, choose another folder with "
                         "--run-dir, or replace it with --overwrite")
    if not (run / "config.json").exists() and (written := _written(run)) and not overwrite:
        raise InputError(f"{written[0]} is there, but {run / 'config.json'} is not: what a run would replace may "
                         "belong to something else; copy config.json back, choose another folder with --run-dir, or "
                         "replace it with --overwrite")
    there = run.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise _unwritable(run, EEXIST if there == run.absolute() else ENOTDIR)
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(run, EACCES)
    disk, need = shutil.disk_usage(there), need_bytes + _ROOM_FOR_LOGS_BYTES
    if disk.total == 0:  # no disk, such as /proc, whatever its permissions say
        raise _unwritable(run, EROFS)
    if disk.free < need:
        raise InputError(f"run folder {run} has {disk.free / 2**20:.0f} MiB free, this run needs {need / 2**20:.0f}; "
                         "free some or choose another disk with --run-dir")


def claim_folder(run: Path, *, overwrite: bool, goes_on: bool, need_bytes: int) -> None:
    """Make the folder `run` ready for a run of so many bytes. Raises InputError as `check_folder` does."""
    check_folder(run, overwrite=overwrite, goes_on=goes_on, need_bytes=need_bytes)
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / ".writable", "")
        (run / ".writable").unlink()
    except OSError as error:
        raise _unwritable(run, error.errno or EACCES) from None
    if not overwrite:
        return
    # The old run goes once the new one can begin, and only what a run writes: never a whole folder that a user may
    # have pointed to by mistake.
    for path in _written(run):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written(run: Path) -> list[Path]:
    """What stands in the folder under the names of a run's files and folders, config.json apart."""
    names = ("checkpoints", "tensorboard", "metrics.jsonl", "metrics.json", "embeddings.safetensors", "report.html")
    of_splits = [*run.glob("metrics-*.json"), *run.glob("embeddings-*.safetensors")]
    return [path for path in (*(run / name for name in names), *sorted(of_splits)) if path.exists()]


def lock_folder(run: Path) -> BinaryIO | None:
    """Keep every other process from training in the folder `run` while the result is open; None where the file system
    has no locks. Raises InputError if one does already."""
    try:
        lock = open(run / ".lock", "ab")  # noqa: SIM115 (open as long as the run lasts)
    except OSError:
        return None
    try:
        # POSIX's kind: released when the process dies, and not passed on to loader workers, who outlive it a little.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if error.errno in (EACCES, EAGAIN):
            raise InputError(f"run folder {run} is in use: another process trains there; wait until it has ended, or "
                             "choose another folder with --run-dir") from None
        return None
    return lock


def _unwritable(run: Path, number: int) -> InputError:
    return InputError(f"run folder {run} cannot be written ({os.strerror(number)}); choose another with --run-dir")
