"""What can be known to be wrong before the first step: each check raises InputError, and none
writes a file."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

from namr_dist.config import Config, StructureConfig
from namr_dist.data.location import open_shards
from namr_dist.data.read.plan import Sampling, check_plan
from namr_dist.data.read.select import training_images
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.data.remote.cache import check_cache
from namr_dist.data.shardset.manifest import SplitIndex
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.errors import InputError
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.retrieval.roles import divide
from namr_dist.structure.centres import default_centres
from namr_dist.train.checkpoints.state import state_bytes


def check_run(config: Config, *, world_size: int, local_rank: int) -> TrainingSet:
    """What is trained on, once all can serve `config` on so many ranks.

    A machine's first rank hashes the shards as well, if the configuration says so and they lie
    there; others are hashed when they are fetched.
    """
    config.check()
    data = config.data
    manifest = open_shards(data.path, data.remote)
    index = training_images(manifest, data, seed=config.train.seed)
    if data.validation_split and data.validation_split not in (*manifest.splits, *manifest.subsets):
        raise InputError(
            f"{manifest.folder} has no split {data.validation_split!r} to validate on; it has "
            f"{', '.join((*manifest.splits, *manifest.subsets))}; set data.validation_split to None, or "
            "build the set with --validation"
        )
    used = {" and ".join(data.train_splits): manifest.index(*data.train_splits)}
    for split in filter(None, (data.validation_split, data.test_split)):
        used[split] = manifest.index(split)
        _check_measurable(
            used[split], f"split {split!r} of {manifest.folder}", world_size=world_size
        )
    for (one, first), (other, second) in itertools.combinations(used.items(), 2):
        if shared := len(np.intersect1d(first.label_N, second.label_N)):
            raise InputError(
                f"{one} and {other} of {manifest.folder} share {shared} classes; name splits that share "
                "none in data.train_splits, data.validation_split and data.test_split"
            )
    sampling = Sampling(
        classes_per_batch=data.classes_per_batch,
        images_per_class=data.images_per_class,
        sampling=data.sampling,
        categories_per_batch=data.categories_per_batch,
        shuffle=data.shuffle,
        views=data.views,
        across_groups=data.across_groups,
    )
    check_plan(index, sampling, world_size=world_size)
    # The last rank of a machine knows how many there are, and speaks for all.
    training_set = TrainingSet(manifest=manifest, index=index, sampling=sampling)
    check_cache(training_set, world_size=world_size, ranks_here=local_rank + 1)
    if local_rank == 0 and data.verify and manifest.source is None:
        verify_shards(manifest, data.train_splits, hashes_alone=data.damaged_images == "replace")
        verify_shards(manifest, [data.validation_split] if data.validation_split else [])
    return training_set


def _check_measurable(index: SplitIndex, name: str, *, world_size: int) -> None:
    """Raise InputError if a split has an image for each rank to embed too few, or no query with a
    right answer."""
    if len(index) < world_size:
        raise InputError(
            f"{name} has fewer images than there are ranks ({world_size}); use fewer ranks"
        )
    sides = divide(index.role_N, len(index), name)
    labels, counts = np.unique(index.label_N[sides.item_G], return_counts=True)
    right = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    if not any(
        right.get(label, 0) > (own >= 0)
        for label, own in zip(
            index.label_N[sides.query_Q].tolist(), sides.own_Q.tolist(), strict=True
        )
    ):
        raise InputError(
            f"{name} has no query with another image of its class to find; name another split, or rebuild "
            "the shard set with classes of two images or more"
        )


def centres_for(config: StructureConfig, *, images: int) -> int:
    """M, for so many training images; 0 where the structure embedding is made of weights. Raises
    InputError for more centres than images."""
    if config.form == "weights":
        return 0
    if config.centres is not None and config.centres > images:
        raise InputError(
            f"structure.centres is {config.centres}, but {images} images are trained on; set it to at "
            f"most {images}, or leave it out for {default_centres(images)}"
        )
    return config.centres or default_centres(images)


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
            raise InputError(
                f"model.backbone {config.model.backbone} does not take images of {size} px "
                f"({str(error).splitlines()[0]}); change data.{name}"
            ) from None
    network.train()


def run_bytes(module: nn.Module, config: Config) -> int:
    """What a run of this module writes, at its most: its final network, and one checkpoint more
    than are kept."""
    network = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    return network + (config.train.keep_checkpoints + 1) * state_bytes(module)
