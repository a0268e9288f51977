"""A run that does not start: every check for any number of ranks, and the commands that would start
it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from namr_dist.config import Config
from namr_dist.data.remote.address import shown
from namr_dist.errors import InputError
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.network import initial_network
from namr_dist.train.checkpoints.resume import check_same
from namr_dist.train.checkpoints.state import check_saveable
from namr_dist.train.checks import centres_for, check_run, check_sizes, run_bytes
from namr_dist.train.objective import TrainingModule
from namr_dist.train.profile import check_profile

_PROGRAM = "namr_dist.launchers.train"


def dry_run(
    config: Config, run: Path, *, ranks: int, overwrite: bool, resume: bool, words: Sequence[str]
) -> list[str]:
    """Lines that say what `ranks` ranks would do, and how to start them with the words of `namr
    train`.

    Raises InputError for whatever training would refuse before its first step, except that weights
    on a hub are not asked for, checkpoints not opened, and a cache for remote shards is held
    against one rank's needs. A run that goes on needs no weights. No process group is started and
    no file written, but for the manifest of a remote set in the cache.
    """
    if ranks < 1:
        raise InputError(f"--ranks is {ranks}; set it to at least 1")
    training_set = check_run(config, world_size=ranks, local_rank=0)
    from_hub = (
        config.model.backbone.startswith("timm:")
        and config.model.pretrained
        and config.model.weights is None
    )
    folder = RunFolder(run)
    goes_on = resume and folder.has_parameters
    network = initial_network(
        config,
        device=torch.device("cpu"),
        pretrained=not from_hub and not goes_on,
        centres=centres_for(config.structure, images=len(training_set.index)),
    )
    check_sizes(network, config, torch.device("cpu"))
    module = TrainingModule(
        network,
        config.loss,
        classes=training_set.classes,
        images_per_class=config.data.images_per_class,
        structure=config.structure,
    )
    check_saveable(module)
    check_profile(config)
    if resume and folder.config.exists():
        check_same(folder.config, Config.load(folder.config), config)
    there_bytes = folder.checkpoint_bytes() if resume else 0
    folder.check(
        overwrite=overwrite,
        goes_on=resume,
        need_bytes=max(0, run_bytes(module, config) - there_bytes),
    )
    data = config.data
    images = data.classes_per_batch * data.images_per_class
    per_epoch = training_set.steps_per_epoch
    parameters = sum(value.numel() for value in network.parameters())
    lines = [
        f"dry run   {config.recipe} → {run}: nothing wrong found for {ranks} rank(s); nothing written or started",
        f"data      {training_set.manifest.name}: {len(training_set.index)} images, {training_set.classes} classes",
        f"batch     {data.classes_per_batch} × {data.images_per_class} = {images} images; {images // ranks} a rank",
        f"epoch     {per_epoch} steps; the run's {config.optim.steps} are {config.optim.steps / per_epoch:.1f} epochs",
        f"model     {config.model.backbone}, {parameters / 1e6:.1f} million parameters"
        + ("; its weights on the hub were not asked for" if from_hub and not goes_on else ""),
    ]
    return lines + [
        f"{name:<10}{shlex.join(map(shown, command))}"
        for name, command in launch_commands(ranks, words).items()
    ]


def launch_commands(ranks: int, words: Sequence[str]) -> dict[str, list[str]]:
    """Commands that start so many ranks of `namr train` with these words: by torchrun on one
    machine, by deepspeed on the machines of a hostfile whose slots add up to `ranks`, by srun on
    those of a Slurm job."""
    return {
        "torchrun": [
            "python",
            "-m",
            "namr_dist.launchers.torchrun",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            "--module",
            _PROGRAM,
            *words,
        ],
        "deepspeed": ["deepspeed", "--hostfile", "HOSTFILE", "--module", _PROGRAM, *words],
        "srun": ["srun", "--ntasks", str(ranks), "--kill-on-bad-exit=1", "namr", "train", *words],
    }
