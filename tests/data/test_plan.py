"""The plan of an epoch: what it promises, for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from namr_dist.data.plan import augment_seed, check_plan, epoch_plan, rank_part, small_classes, steps_per_epoch
from namr_dist.errors import InputError


@pytest.fixture
def label_N() -> np.ndarray:
    """40 classes of 2 to 9 images, in no order, with labels that have gaps."""
    rng = np.random.default_rng(5)
    labels = np.concatenate([np.full(2 + label % 8, 7 * label) for label in range(40)])
    return rng.permutation(labels)


def plan(label_N: np.ndarray, *, epoch: int = 0, seed: int = 0) -> np.ndarray:
    return epoch_plan(label_N, classes_per_batch=6, images_per_class=4, seed=seed, epoch=epoch)


def test_shape_and_classes(label_N: np.ndarray) -> None:
    batches_SPK = plan(label_N)
    assert batches_SPK.shape == (6, 6, 4) == (steps_per_epoch(label_N, classes_per_batch=6), 6, 4)
    classes = label_N[batches_SPK]
    assert (classes == classes[:, :, :1]).all(), "a group mixes classes"
    assert len(np.unique(classes[:, :, 0])) == 36, "a class is met twice in an epoch"


def test_images_repeat_only_where_a_class_is_small(label_N: np.ndarray) -> None:
    size = dict(zip(*np.unique(label_N, return_counts=True), strict=True))
    for group in plan(label_N).reshape(-1, 4):
        assert len(set(group)) == min(4, size[label_N[group[0]]])
    assert small_classes(label_N, images_per_class=4) == sum(count < 4 for count in size.values()) > 0


def test_pure_function(label_N: np.ndarray) -> None:
    assert (plan(label_N, epoch=3) == plan(label_N, epoch=3)).all()
    assert (plan(label_N, epoch=3) != plan(label_N, epoch=4)).any()
    assert (plan(label_N, seed=1) != plan(label_N, seed=2)).any()


def test_known_plan() -> None:
    """The plan of a release is part of its results: it must not change unnoticed."""
    batch_PK = epoch_plan(np.repeat(np.arange(5), 3), classes_per_batch=2, images_per_class=2, seed=0, epoch=0)
    assert batch_PK.tolist() == [[[2, 0], [6, 7]], [[4, 5], [12, 13]]]


def test_every_image_is_met_in_the_long_run(label_N: np.ndarray) -> None:
    met = np.unique(np.concatenate([plan(label_N, epoch=epoch).reshape(-1) for epoch in range(60)]))
    assert len(met) == len(label_N)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_each_batch(label_N: np.ndarray, world_size: int) -> None:
    for batch_PK in plan(label_N):
        parts = [rank_part(batch_PK, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {24 // world_size}
        assert (np.concatenate(parts) == batch_PK.reshape(-1)).all()


def test_augment_seeds_differ() -> None:
    seeds = {augment_seed(seed=0, step=step, slot=slot) for step in range(50) for slot in range(50)}
    assert len(seeds) == 2500
    assert augment_seed(seed=0, step=1, slot=2) != augment_seed(seed=1, step=1, slot=2)


@pytest.mark.parametrize(("change", "named"), [
    ({"classes_per_batch": 41}, "data.classes_per_batch is 41.*40 classes"),
    ({"images_per_class": 10}, "data.images_per_class is 10.*9 images"),
    ({"world_size": 4}, "data.classes_per_batch is 6, which 4 ranks"),
])
def test_impossible_plans_are_refused(label_N: np.ndarray, change: dict[str, int], named: str) -> None:
    possible = {"classes_per_batch": 6, "images_per_class": 4, "world_size": 2}
    check_plan(label_N, **possible)
    with pytest.raises(InputError, match=named):
        check_plan(label_N, **{**possible, **change})
