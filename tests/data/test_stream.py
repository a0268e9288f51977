"""The stream delivers exactly the plan, whoever decodes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from namr_dist.data.augment import TestTransform, TrainTransform
from namr_dist.data.manifest import Manifest
from namr_dist.data.plan import Sampling, epoch_plan
from namr_dist.data.shards import decode_rgb
from namr_dist.data.stream import Batch, ShardImages, TrainPlan, sequential_batches, stream
from namr_dist.errors import InputError

TRANSFORM = TrainTransform(size=32, crop_scale=(0.3, 1.0), crop_ratio=(0.75, 1.33), flip=True, brightness=0.2,
                           contrast=0.2, saturation=0.2)
HOW = Sampling(classes_per_batch=4, images_per_class=3)


def batches(manifest: Manifest, *, workers: int = 0, rank: int = 0, world_size: int = 1,
            first_step: int = 0) -> Iterator[Batch]:
    index = manifest.index("train")
    plan = TrainPlan(index=index, how=HOW, seed=1, rank=rank, world_size=world_size, steps=7, first_step=first_step)
    return stream(ShardImages(manifest, index, TRANSFORM), plan, workers=workers)


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))


def test_follows_the_plan(shard_set: Manifest) -> None:
    index = shard_set.index("train")
    label_N = index.label_N
    made = list(batches(shard_set))
    planned = np.concatenate([epoch_plan(index, HOW, seed=1, epoch=epoch) for epoch in range(3)])[:7]
    assert (torch.stack([batch.index_b for batch in made]).numpy() == planned.reshape(7, 12)).all()
    for batch in made:
        assert batch.images_bHW3.dtype == torch.uint8 and batch.images_bHW3.shape == (12, 32, 32, 3)
        assert (batch.labels_b.numpy() == label_N[batch.index_b.numpy()]).all()


def test_any_number_of_workers_gives_the_same(shard_set: Manifest) -> None:
    for one, other in zip(batches(shard_set), batches(shard_set, workers=2), strict=True):
        assert same(one, other)


def test_two_ranks_see_the_batches_of_one(shard_set: Manifest) -> None:
    shares = zip(*(batches(shard_set, rank=rank, world_size=2) for rank in range(2)), strict=True)
    for whole, (first, second) in zip(batches(shard_set), shares, strict=True):
        assert torch.equal(whole.images_bHW3, torch.cat([first.images_bHW3, second.images_bHW3]))
        assert torch.equal(whole.labels_b, torch.cat([first.labels_b, second.labels_b]))


def test_starts_anywhere(shard_set: Manifest) -> None:
    for one, other in zip(list(batches(shard_set))[5:], batches(shard_set, first_step=5), strict=True):
        assert same(one, other)


@pytest.mark.parametrize(("count", "world_size"), [(36, 1), (36, 2), (35, 2), (7, 5), (5, 5)])
def test_evaluation_counts_every_image_once(count: int, world_size: int) -> None:
    ranks = [sequential_batches(count, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({tuple(len(batch) for batch in made) for made in ranks}) == 1, "ranks differ in their forwards"
    places = [place for made in ranks for batch in made for place, _ in batch]
    assert sorted(set(places)) == list(range(count))


def test_test_images_are_the_decoded_ones(shard_set: Manifest) -> None:
    index = shard_set.index("test")
    images = ShardImages(shard_set, index, TestTransform(size=48, crop_share=1.0))
    made = next(stream(images, sequential_batches(len(images), batch_size=36), workers=1))
    for place in range(36):
        assert (made.images_bHW3[place].numpy() == decode_rgb(images.jpeg(place), "x")).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_clear_error(own_shard_set: Manifest, workers: int) -> None:
    shard = own_shard_set.shards[0]
    with open(own_shard_set.folder / shard.file, "r+b") as file:
        file.seek(shard.offsets[2] + shard.lengths[2] // 2)
        file.write(os.urandom(8) + b"\xff\xd9" + bytes(shard.lengths[2] // 2 - 10))
    with pytest.raises(InputError, match=rf"^{shard.keys[2]}.jpg in .*{shard.file} cannot be decoded \(.*\); rebuild"):
        images = ShardImages(own_shard_set, own_shard_set.index("train"), TestTransform(size=48, crop_share=1.0))
        list(stream(images, sequential_batches(len(images), batch_size=10), workers=workers))


def test_streams_leave_the_global_generator_alone(shard_set: Manifest) -> None:
    """A resumed run makes other loaders than an unbroken one: what the model draws must not depend on them."""
    index = shard_set.index("train")
    before = torch.get_rng_state()
    images = ShardImages(shard_set, index, TestTransform(size=32, crop_share=1.0))
    for workers in (0, 1):
        list(stream(images, sequential_batches(6, batch_size=3), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
