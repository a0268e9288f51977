"""What a run says of itself before its first step."""

from __future__ import annotations

import torch

from namr_dist import kernels
from namr_dist.config import Config, LossConfig
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.losses import registry
from namr_dist.parallel.ranks import Rank
from namr_dist.retrieval.search import search_backend
from namr_dist.run.folder import RunFolder
from namr_dist.train.precision import Precision


def banner(
    config: Config, training_set: TrainingSet, run: RunFolder, rank: Rank, precision: Precision
) -> list[str]:
    """What runs, on what, which fast paths are on, and why not where they are not."""
    device = (
        torch.cuda.get_device_name(rank.device)
        if rank.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads a rank"
    )
    data, loss, sampling, manifest = (
        config.data,
        config.loss,
        training_set.sampling,
        training_set.manifest,
    )
    few = training_set.small_classes
    idle = [
        split
        for split in manifest.splits
        if split not in (*data.train_splits, data.validation_split, data.test_split)
    ]
    ranking = (
        f" + {loss.ranking.weight:g} × multi-cluster ranking (M = {loss.ranking.clusters})"
        if loss.ranking.weight
        else ", no multi-cluster ranking"
    )
    memory = (
        f", memory of {loss.memory.rows} rows from step {loss.memory.start_step} on"
        if loss.memory.rows
        else ""
    )
    return [
        f"run       {config.recipe} → {run.path}",
        f"device    {rank.world_size} × {device}; ZeRO {config.train.zero_stage}; {precision}"
        + (f"; started by {rank.launcher}" if rank.launcher != "none" else ""),
        f"data      {manifest.name}: {len(training_set.index)} images, {training_set.classes} classes; batches of "
        f"{data.classes_per_batch} × {data.images_per_class} at {data.image_size} px"
        + (f", {config.train.micro_batch} a rank at a time" if config.train.micro_batch else "")
        + (f"; {few} classes have fewer images and repeat some" if few else "")
        + (f"; not used: {', '.join(idle)}" if idle and data.test_split in manifest.splits else ""),
        f"sampling  {sampling.sampling}, {training_set.steps_per_epoch} steps an epoch; "
        + (
            "shards read front to back"
            if sampling.shuffle == "shards"
            else "any classes share a batch"
        )
        + (f"; {sampling.views} views of an image" if sampling.views > 1 else "")
        + ("; across groups" if sampling.across_groups else ""),
        f"model     {config.model.backbone}, batch norm {config.model.batchnorm}, width {config.model.width}",
        f"loss      {loss.metric}{ranking}{memory}; {_how_computed(loss, rank.device)}",
        *([_how_searched()] if data.validation_split else []),
    ]


def _how_searched() -> str:
    """What finds neighbours in validation."""
    backend = search_backend()
    return f"search    {backend.name} ({backend.reason})"


def _how_computed(loss: LossConfig, device: torch.device) -> str:
    """What serves the ops that the losses rest on, and what a loss from outside costs."""
    known = registry.find(loss.metric)
    ops = [
        "mean_pairwise_distance",
        *([known.op] if known else []),
        *(["multi_cluster_ranking"] if loss.ranking.weight else []),
    ]
    outside = (
        ""
        if known
        else f"{loss.metric} by autograd on the rows of all ranks, with memory B² for all pairs; "
    )
    return outside + kernels.describe(device, *ops)
