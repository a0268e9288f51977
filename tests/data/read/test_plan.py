"""The plan of an epoch: what it promises, for any number of ranks and every way of sampling."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from namr_dist.data.read.plan import (
    Sampling,
    augment_seed,
    check_plan,
    epoch_plan,
    rank_part,
    small_classes,
    steps_per_epoch,
)
from namr_dist.data.read.stream import TrainPlan
from namr_dist.data.shardset.manifest import SplitIndex
from namr_dist.errors import InputError

SAMPLING = Sampling(classes_per_batch=6, images_per_class=4)


def index_of(
    label_N: np.ndarray,
    *,
    shard_N: np.ndarray | None = None,
    category_N: np.ndarray | None = None,
    group_N: np.ndarray | None = None,
) -> SplitIndex:
    count = len(label_N)
    nothing_N = np.zeros(count, np.int64)
    return SplitIndex(
        label_N=label_N,
        shard_N=nothing_N.astype(np.int32) if shard_N is None else shard_N,
        category_N=nothing_N if category_N is None else category_N,
        group_N=nothing_N if group_N is None else group_N,
        offset_N=np.arange(count),
        length_N=np.ones(count, np.int64),
        crc32_N=np.full(count, -1),
        role_N=nothing_N.astype(np.int8),
        keys=tuple(map(str, range(count))),
    )


@pytest.fixture(scope="module")
def index() -> SplitIndex:
    """40 classes of 2 to 9 images, of 3 super-classes, in no order, with labels that have gaps."""
    rng = np.random.default_rng(5)
    labels = rng.permutation(
        np.concatenate([np.full(2 + label % 8, 7 * label) for label in range(40)])
    )
    return index_of(labels, category_N=labels // 7 % 3)


@pytest.fixture(scope="module")
def sop() -> SplitIndex:
    """The training images of a full-size Stanford Online Products: 59,551 in 11,318 classes of 2 to
    12, of 12 super- classes, whole classes in 16 shards."""
    rng = np.random.default_rng(1)
    size_C = rng.integers(2, 9, 11_318)
    while size_C.sum() != 59_551:
        chosen = rng.integers(0, len(size_C), abs(59_551 - size_C.sum()))
        size_C[chosen] = np.clip(size_C[chosen] + np.sign(59_551 - size_C.sum()), 2, 12)
    label_N = np.repeat(rng.permutation(len(size_C)) + 1, size_C)
    return index_of(
        label_N,
        shard_N=(np.repeat(np.arange(len(size_C)), size_C) * 16 // len(size_C)).astype(np.int32),
        category_N=rng.integers(0, 12, 11_319)[label_N],
    )


def sizes(index: SplitIndex) -> dict[int, int]:
    return dict(zip(*np.unique(index.label_N, return_counts=True), strict=True))


EVERY_WAY = pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        replace(SAMPLING, sampling="proportional"),
        replace(SAMPLING, sampling="category", categories_per_batch=2),
        replace(SAMPLING, shuffle="shards"),
        replace(SAMPLING, sampling="proportional", shuffle="shards"),
        replace(SAMPLING, views=2),
        replace(SAMPLING, across_groups=True),
    ],
    ids=lambda one: f"{one.sampling}-{one.shuffle}-{one.views}-{one.across_groups}",
)


@EVERY_WAY
def test_batches_hold_distinct_classes_and_one_of_each_group(
    index: SplitIndex, sampling: Sampling
) -> None:
    for epoch in range(5):
        plan_SPK = epoch_plan(index, sampling, seed=3, epoch=epoch)
        assert plan_SPK.shape == (steps_per_epoch(index, sampling), 6, 4)
        classes_SPK = index.label_N[plan_SPK]
        assert (classes_SPK == classes_SPK[:, :, :1]).all(), "a group mixes classes"
        for batch_P in classes_SPK[:, :, 0]:
            assert len(set(batch_P)) == 6, "a class stands twice in a batch"


@EVERY_WAY
def test_images_repeat_only_where_a_class_is_small_or_views_are_asked_for(
    index: SplitIndex, sampling: Sampling
) -> None:
    size = sizes(index)
    for group in epoch_plan(index, sampling, seed=0, epoch=0).reshape(-1, 4):
        different = min(4 // sampling.views, size[index.label_N[group[0]]])
        assert len(set(group)) == different
        assert max(Counter(group.tolist()).values()) == -(-4 // different)
    assert small_classes(index, sampling) == sum(
        count < 4 // sampling.views for count in size.values()
    )


@EVERY_WAY
def test_pure_function(index: SplitIndex, sampling: Sampling) -> None:
    assert (
        epoch_plan(index, sampling, seed=0, epoch=3) == epoch_plan(index, sampling, seed=0, epoch=3)
    ).all()
    assert (
        epoch_plan(index, sampling, seed=0, epoch=3) != epoch_plan(index, sampling, seed=0, epoch=4)
    ).any()
    assert (
        epoch_plan(index, sampling, seed=1, epoch=3) != epoch_plan(index, sampling, seed=2, epoch=3)
    ).any()


@EVERY_WAY
def test_every_image_is_met_in_the_long_run(index: SplitIndex, sampling: Sampling) -> None:
    epochs = [epoch_plan(index, sampling, seed=0, epoch=epoch) for epoch in range(90)]
    met = np.unique(np.concatenate(epochs, axis=None))
    assert len(met) == len(index)


def test_known_plan() -> None:
    """The plan of a release is part of its results: it must not change unnoticed."""
    sampling = Sampling(classes_per_batch=2, images_per_class=2)
    batch_PK = epoch_plan(index_of(np.repeat(np.arange(5), 3)), sampling, seed=0, epoch=0)
    assert batch_PK.tolist() == [[[2, 0], [6, 7]], [[4, 5], [12, 13]]]


@pytest.mark.parametrize("shuffle", ["classes", "shards"])
def test_uniform_meets_every_class_once_but_the_last_few(index: SplitIndex, shuffle: str) -> None:
    left_over: Counter[int] = Counter()
    for epoch in range(60):
        plan_SPK = epoch_plan(index, replace(SAMPLING, shuffle=shuffle), seed=0, epoch=epoch)
        met = index.label_N[plan_SPK[:, :, 0]].reshape(-1).tolist()
        assert len(met) == len(set(met)) == 36
        left_over.update(set(sizes(index)) - set(met))
    assert len(left_over) == 40 and max(left_over.values()) < 15, "the same classes are left over"


@pytest.mark.parametrize("shuffle", ["classes", "shards"])
def test_proportional_shows_each_image_about_once(index: SplitIndex, shuffle: str) -> None:
    sampling = replace(SAMPLING, sampling="proportional", shuffle=shuffle)
    size = sizes(index)
    expected = {label: max(1, int(count / 4 + 0.5)) for label, count in size.items()}
    for epoch in range(10):
        visits = Counter(
            index.label_N[epoch_plan(index, sampling, seed=0, epoch=epoch)[:, :, 0]]
            .reshape(-1)
            .tolist()
        )
        assert all(visits[label] <= expected[label] for label in size)
        assert sum(expected.values()) - sum(visits.values()) == sum(expected.values()) % 6
    shown = Counter(epoch_plan(index, sampling, seed=0, epoch=0).reshape(-1).tolist())
    assert max(
        shown[image] for image in range(len(index)) if size[index.label_N[image]] >= 8
    ) <= 1 + (9 % 4 > 0)


def test_one_huge_class_does_not_stop_proportional_sampling() -> None:
    """It can stand in every batch, once; the epoch ends when the others cannot fill one."""
    index = index_of(np.r_[np.zeros(4000, np.int64), np.repeat(np.arange(1, 13), 4)])
    sampling = Sampling(classes_per_batch=4, images_per_class=4, sampling="proportional")
    # 12 other visits fill three places in each of four batches.
    assert steps_per_epoch(index, sampling) == 4
    for shuffle in ("classes", "shards"):
        plan_SPK = epoch_plan(index, replace(sampling, shuffle=shuffle), seed=0, epoch=0)
        assert [int((batch_PK[:, 0] < 4000).sum()) for batch_PK in plan_SPK] == [1, 1, 1, 1]


def test_category_batches_are_of_few_super_classes() -> None:
    rng = np.random.default_rng(0)
    category_C = rng.integers(0, 4, 100)
    label_N = np.repeat(np.arange(100), 3)
    index = index_of(label_N, category_N=category_C[label_N])
    sampling = Sampling(
        classes_per_batch=10, images_per_class=2, sampling="category", categories_per_batch=2
    )
    met: list[int] = []
    for batch_PK in epoch_plan(index, sampling, seed=0, epoch=0):
        classes_P = label_N[batch_PK[:, 0]]
        met += classes_P.tolist()
    assert len(met) == len(set(met)) == 100
    mixed = sum(
        len(set(category_C[label_N[batch_PK[start : start + 5, 0]]])) > 1
        for batch_PK in epoch_plan(index, sampling, seed=0, epoch=0)
        for start in (0, 5)
    )
    rest = sum(np.bincount(category_C) % 5)
    assert mixed <= -(-rest // 5), "more groups are mixed than super-classes leave a rest"


def test_category_sampling_leaves_out_others_each_time() -> None:
    """52 classes of 4 super-classes, 50 of them in an epoch, ten of those in a group of what the
    others leave."""
    label_N = np.repeat(np.arange(52), 3)
    index = index_of(label_N, category_N=label_N % 4)
    sampling = Sampling(classes_per_batch=10, images_per_class=2, sampling="category")
    left_out: Counter[int] = Counter()
    for epoch in range(40):
        met = label_N[epoch_plan(index, sampling, seed=0, epoch=epoch)[:, :, 0]].reshape(-1)
        left_out.update(label % 4 for label in set(range(52)) - set(met.tolist()))
    assert set(left_out) == {0, 1, 2, 3} and max(left_out.values()) < 40


def test_across_groups_takes_one_of_each_first() -> None:
    """Five classes of 12 images in 4 groups, one of them with 9 images."""
    group_N = np.tile(np.r_[np.zeros(9, np.int64), 1, 2, 3], 5)
    index = index_of(np.repeat(np.arange(5), 12), group_N=group_N)
    sampling = Sampling(classes_per_batch=5, images_per_class=4, across_groups=True)
    for epoch in range(10):
        for images_K in epoch_plan(index, sampling, seed=0, epoch=epoch)[0]:
            assert sorted(group_N[images_K]) == [0, 1, 2, 3]
    pairs = epoch_plan(index, replace(sampling, images_per_class=2), seed=0, epoch=0)
    assert all(len(set(group_N[images_K])) == 2 for images_K in pairs[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@EVERY_WAY
def test_ranks_share_each_batch(index: SplitIndex, sampling: Sampling, world_size: int) -> None:
    for batch_PK in epoch_plan(index, sampling, seed=0, epoch=0):
        parts = [
            rank_part(batch_PK, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {24 // world_size}
        assert (np.concatenate(parts) == batch_PK.reshape(-1)).all()


FULL = Sampling(classes_per_batch=64, images_per_class=4)


@pytest.mark.parametrize(
    "sampling",
    [
        FULL,
        replace(FULL, shuffle="shards"),
        replace(FULL, sampling="proportional"),
        replace(FULL, sampling="category", categories_per_batch=4),
    ],
    ids=lambda sampling: f"{sampling.sampling}-{sampling.shuffle}",
)
def test_full_size(sop: SplitIndex, sampling: Sampling) -> None:
    """What 1, 2, 8 and 64 ranks are given, from their own samplers: the same multiset, in equally
    many batches."""
    steps = steps_per_epoch(sop, sampling)
    met: dict[int, np.ndarray] = {}
    for world_size in (1, 2, 8, 64):
        shares = []
        for rank in range(world_size):
            plan = TrainPlan(
                index=sop, sampling=sampling, seed=0, rank=rank, world_size=world_size, steps=steps
            )
            batches = [positions for _, positions in plan._parts()]
            if rank in (0, world_size - 1):  # not for each: it plans the epoch once more
                assert [position for position, _ in next(iter(plan))] == batches[0].tolist()
            assert [len(positions) for positions in batches] == [256 // world_size] * steps
            shares += batches
        met[world_size] = np.sort(np.concatenate(shares))
    assert all((met[1] == met[world_size]).all() for world_size in (2, 8, 64))
    classes, visits = np.unique(sop.label_N[met[1]], return_counts=True)
    if sampling.sampling != "proportional":
        assert len(classes) == 11_318 // 64 * 64 and set(visits) == {4}


def test_full_size_plan_is_small(sop: SplitIndex) -> None:
    for sampling in (FULL, replace(FULL, shuffle="shards"), replace(FULL, sampling="proportional")):
        tracemalloc.start()
        plan_SPK = epoch_plan(sop, sampling, seed=0, epoch=7)
        parts = [
            rank_part(batch_PK, rank=rank, world_size=64)
            for batch_PK in plan_SPK
            for rank in range(64)
        ]
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(parts) == 64 * steps_per_epoch(sop, sampling)
        assert peak_bytes < 100 << 20


def test_resuming_far_on_needs_one_epochs_plan(sop: SplitIndex) -> None:
    """A batch after ten million steps: with those before it, this would not end."""
    plan = TrainPlan(index=sop, sampling=FULL, seed=0, rank=3, world_size=8, steps=10_000_000)
    resumed = next(iter(replace(plan, first_step=9_876_543)))
    epoch, step_in_epoch = divmod(9_876_543, steps_per_epoch(sop, FULL))
    whole_PK = epoch_plan(sop, FULL, seed=0, epoch=epoch)[step_in_epoch]
    assert [image for image, _ in resumed] == rank_part(whole_PK, rank=3, world_size=8).tolist()


@pytest.mark.parametrize("sampling", ["uniform", "proportional"])
@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_shards_are_read_front_to_back(sop: SplitIndex, world_size: int, sampling: str) -> None:
    """Each slot of a rank's batches passes through a few stretches of tars, always forwards; a tar
    is cut in two at one place, and once more where a slot ends."""
    sampling = replace(FULL, shuffle="shards", sampling=sampling)
    plan_SPK = epoch_plan(sop, sampling, seed=0, epoch=2)
    stretches: Counter[int] = Counter()
    for rank in range(world_size):
        share_SpK = np.stack(
            [rank_part(batch_PK, rank=rank, world_size=world_size) for batch_PK in plan_SPK]
        )
        for lane_SK in np.split(share_SpK, 64 // world_size, axis=1):
            firsts = lane_SK.min(axis=1).tolist()
            assert (np.diff(lane_SK, axis=1) >= 0).all()
            same_class = sop.label_N[firsts]
            jumps = [
                step
                for step, (before, after) in enumerate(pairwise(firsts))
                if same_class[step] != same_class[step + 1]
                and (after < before or sop.shard_N[before] != sop.shard_N[after])
            ]
            starts = [0, *(step + 1 for step in jumps)]
            assert len(starts) <= 4
            stretches.update(int(sop.shard_N[firsts[start]]) for start in starts)
    assert set(stretches) == set(range(16))
    assert sum(stretches.values()) <= 2 * 16 + 64


def test_classes_of_one_shard_meet_in_some_epoch(sop: SplitIndex) -> None:
    sampling = replace(FULL, shuffle="shards")
    shard_of = dict(zip(sop.label_N.tolist(), sop.shard_N.tolist(), strict=True))
    together = [
        len(batch_P) - len({shard_of[label] for label in batch_P})
        for epoch in range(3)
        for batch_P in sop.label_N[epoch_plan(sop, sampling, seed=0, epoch=epoch)[:, :, 0]]
    ]
    assert np.mean(together) > 64 - 16 - 1  # 64 lanes over 16 shards: three quarters share one


def test_augment_seeds_differ() -> None:
    seeds = {augment_seed(seed=0, step=step, slot=slot) for step in range(50) for slot in range(50)}
    assert len(seeds) == 2500
    assert augment_seed(seed=0, step=1, slot=2) != augment_seed(seed=1, step=1, slot=2)


@pytest.mark.parametrize(
    ("change", "world_size", "named"),
    [
        ({"classes_per_batch": 41}, 1, "data.classes_per_batch is 41.*40 classes"),
        ({"images_per_class": 10}, 1, "data.images_per_class is 10.*9 images"),
        ({"images_per_class": 20, "views": 2}, 1, "data.images_per_class is 20.*at most 18"),
        ({}, 4, "data.classes_per_batch is 6, which 4 ranks"),
        ({"sampling": "category"}, 1, "of 1 super-class; set data.sampling to uniform"),
    ],
)
def test_impossible_plans_are_refused(
    index: SplitIndex, change: dict[str, int], world_size: int, named: str
) -> None:
    check_plan(index, SAMPLING, world_size=2)
    one_category = replace(index, category_N=np.zeros(len(index), np.int64))
    with pytest.raises(InputError, match=named):
        check_plan(one_category, replace(SAMPLING, **change), world_size=world_size)
