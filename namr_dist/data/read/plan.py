"""The plan of an epoch: which images make which batch. A pure function; no file is opened.

Every batch has P distinct classes with K images each, and is cut into equal runs of whole classes,
one a rank: any number of ranks sees the same global batches, and all have the same number of them.

C classes, N images, V visits (a class in a batch), S steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from namr_dist.data.shardset.manifest import SplitIndex
from namr_dist.errors import InputError

# First words of the random streams, so that plans, augmentations and choices never share one.
_PLAN_STREAM, _AUGMENT_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How batches are made. The fields are those of DataConfig, where each is explained."""

    classes_per_batch: int
    images_per_class: int
    sampling: Literal["uniform", "proportional", "category"] = "uniform"
    categories_per_batch: int = 1
    shuffle: Literal["classes", "shards"] = "classes"
    views: int = 1
    across_groups: bool = False

    @property
    def distinct(self) -> int:
        """Different images that a class shows in a batch, if it has so many."""
        return self.images_per_class // self.views


def check_plan(index: SplitIndex, sampling: Sampling, *, world_size: int) -> None:
    """Raise InputError if no batch of P classes with K images, shared by `world_size` ranks, can be
    made."""
    labels, counts = np.unique(index.label_N, return_counts=True)
    if sampling.classes_per_batch > len(labels):
        raise InputError(
            f"data.classes_per_batch is {sampling.classes_per_batch}, but the training images are of {len(labels)} "
            f"classes; set it to at most {len(labels)}"
        )
    if sampling.distinct > counts.max():
        raise InputError(
            f"data.images_per_class is {sampling.images_per_class}, but the largest class has {counts.max()} images; "
            f"set it to at most {counts.max() * sampling.views}"
        )
    categories = len(np.unique(index.category_N))
    if sampling.sampling == "category" and categories < max(2, sampling.categories_per_batch):
        raise InputError(
            f"data.sampling is category and data.categories_per_batch {sampling.categories_per_batch}, but the "
            f"training images are of {categories} super-class{'es' if categories > 1 else ''}; set data.sampling to "
            "uniform"
            + (f", or data.categories_per_batch to at most {categories}" if categories > 1 else "")
        )
    if sampling.classes_per_batch % world_size:
        raise InputError(
            f"data.classes_per_batch is {sampling.classes_per_batch}, which {world_size} ranks cannot share equally; "
            f"set it to a multiple of {world_size}"
        )


def steps_per_epoch(index: SplitIndex, sampling: Sampling) -> int:
    """Batches of every epoch: all that can be filled. The classes left over differ from epoch to
    epoch."""
    visits_C = _visits(index, sampling)
    # Each batch takes a class once at most, so s batches can be filled if Σ min(visits, s) ≥ s·P;
    # the sum is concave in s, so all s up to the largest can.
    low, high = 0, int(visits_C.sum()) // sampling.classes_per_batch
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(visits_C, middle).sum() >= middle * sampling.classes_per_batch:
            low = middle
        else:
            high = middle - 1
    return low


def small_classes(index: SplitIndex, sampling: Sampling) -> int:
    """Classes with fewer images than a batch shows of one. Their images are repeated."""
    return int((np.unique(index.label_N, return_counts=True)[1] < sampling.distinct).sum())


def epoch_plan(index: SplitIndex, sampling: Sampling, *, seed: int, epoch: int) -> np.ndarray:
    """The epoch's global batches: int64 (S, P, K), positions in `index`.

    Depends on its arguments alone. Rank r of W takes classes r·P/W to (r+1)·P/W of each batch
    (`rank_part`). With `shuffle` "shards", slot p of one batch after another runs through the tars
    front to back; with "classes", any two classes may meet. Memory O(N + S·P·K).
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_PLAN_STREAM, seed, epoch])))
    # Sorting by (class, random) puts each class's images in a run of their own, shuffled within.
    random_N = rng.random(len(index))
    order_N = (
        np.lexsort((random_N, _turn_in_group(index, random_N), index.label_N))
        if sampling.across_groups
        else np.lexsort((random_N, index.label_N))
    )
    _, first_C, count_C = np.unique(index.label_N[order_N], return_index=True, return_counts=True)
    steps = steps_per_epoch(index, sampling)
    chosen_SP = _chosen(index, sampling, steps, rng)
    # A class that comes again goes on with its next images.
    turn_V = _occurrence(chosen_SP.reshape(-1)) if sampling.sampling == "proportional" else 0
    start_SP1 = np.broadcast_to(turn_V * sampling.distinct, chosen_SP.size).reshape(
        *chosen_SP.shape, 1
    )
    chosen_SP1 = chosen_SP[..., None]
    slot_K = np.arange(sampling.images_per_class) // sampling.views
    plan_SPK = order_N[first_C[chosen_SP1] + (start_SP1 + slot_K) % count_C[chosen_SP1]]
    return np.sort(plan_SPK, axis=-1) if sampling.shuffle == "shards" else plan_SPK


def rank_part(batch_PK: np.ndarray, *, rank: int, world_size: int) -> np.ndarray:
    """The rank's share of one global batch: int64 (P/W · K,), whole classes."""
    share = batch_PK.shape[0] // world_size
    return batch_PK[rank * share : (rank + 1) * share].reshape(-1)


def augment_seed(*, seed: int, step: int, slot: int) -> int:
    """Seed of one image's augmentation: its position in the run decides, so no worker or rank count
    shows."""
    return int(
        np.random.SeedSequence([_AUGMENT_STREAM, seed, step, slot]).generate_state(1, np.uint64)[0]
    )


def _visits(index: SplitIndex, sampling: Sampling) -> np.ndarray:
    """int64 (C,): in how many batches of an epoch each class would stand, if enough others did."""
    counts_C = np.unique(index.label_N, return_counts=True)[1]
    if sampling.sampling != "proportional":
        return np.ones(len(counts_C), np.int64)
    # As often as shows each of its images once, to the nearest whole visit (halves up).
    return np.maximum(1, (2 * counts_C + sampling.distinct) // (2 * sampling.distinct))


def _chosen(
    index: SplitIndex, sampling: Sampling, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """int64 (S, P): the classes of each batch, by their position among the sorted labels; distinct
    in a batch."""
    per_batch = sampling.classes_per_batch
    visits_C = np.minimum(_visits(index, sampling), steps)
    if sampling.shuffle == "shards":
        # A lane is one slot of the batches. Cutting the visits into P runs of S keeps those of a
        # class in successive batches, and none holds it twice, for it has at most S (McNaughton's
        # wrap-around rule).
        class_C = _classes_by_stretch(index, rng)
        visits_V = np.repeat(class_C, visits_C[class_C])
        # What no batch has room for is left out anywhere, or it would be the same tars' ends again
        # and again.
        kept_V = np.sort(rng.permutation(len(visits_V))[: steps * per_batch])
        return visits_V[kept_V].reshape(per_batch, steps).T
    if sampling.sampling == "proportional":
        return _spread(visits_C, steps, per_batch, rng)
    if sampling.sampling == "category":
        return _by_category(index, sampling, steps, rng)
    return rng.permutation(len(visits_C))[: steps * per_batch].reshape(steps, per_batch)


def _classes_by_stretch(index: SplitIndex, rng: np.random.Generator) -> np.ndarray:
    """All classes: each tar's, in its order, cut in two at a random place; the stretches shuffled.

    The cut is what lets classes of one tar meet in a batch, in some epochs; each tar is still read
    by few.
    """
    first_C = np.unique(index.label_N, return_index=True)[1]
    shard_C = index.shard_N[first_C]
    in_tar_order_C = np.argsort(first_C)
    position_C = _occurrence(shard_C[in_tar_order_C])
    shards, size = np.unique(shard_C, return_counts=True)
    shard_C = np.searchsorted(shards, shard_C[in_tar_order_C])
    after_cut_C = position_C >= rng.integers(0, size)[shard_C]
    stretch_C = 2 * shard_C + after_cut_C
    return in_tar_order_C[np.lexsort((position_C, rng.permutation(2 * len(shards))[stretch_C]))]


def _by_category(
    index: SplitIndex, sampling: Sampling, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Classes of a category in groups of P / G, and G groups to a batch; a category's last classes,
    too few for a group, make groups with those of others."""
    group = sampling.classes_per_batch // sampling.categories_per_batch
    first_C = np.unique(index.label_N, return_index=True)[1]
    shuffled_C = rng.permutation(len(first_C))
    # In another order each time, or the classes that no batch has room for would be the last
    # super-class's.
    number_of = rng.permutation(int(index.category_N.max()) + 1)
    category_C = number_of[index.category_N[first_C[shuffled_C]]]
    by_category_C = shuffled_C[np.argsort(category_C, kind="stable")]
    category_C = np.sort(category_C)
    position_C = _occurrence(category_C)
    size_C = np.bincount(category_C)[category_C]
    left_over_C = position_C >= size_C - size_C % group
    together_C = by_category_C[np.argsort(left_over_C, kind="stable")]
    groups = len(first_C) // group
    grouped = together_C[: groups * group].reshape(groups, group)
    return rng.permutation(grouped)[: steps * sampling.categories_per_batch].reshape(
        steps, sampling.classes_per_batch
    )


def _spread(
    visits_C: np.ndarray, steps: int, per_batch: int, rng: np.random.Generator
) -> np.ndarray:
    """Each class in as many batches as it has visits, at random, yet evenly over the epoch. Needs
    visits ≤ S."""
    class_V = np.repeat(np.arange(len(visits_C)), visits_C)
    # One visit in each of as many equal parts of the epoch.
    time_V = (_occurrence(class_V) + rng.random(len(class_V))) / visits_C[class_V]
    batches: list[set[int]] = [set() for _ in range(steps)]
    number, waiting = 0, []
    for visit in class_V[np.argsort(time_V, kind="stable")].tolist():
        if number == steps:
            break
        if visit in batches[number]:
            waiting.append(visit)
            continue
        batches[number].add(visit)
        while number < steps and len(batches[number]) == per_batch:
            number += 1
            # Those that were in the last batch already stand at the head of the next.
            batch, still = batches[number] if number < steps else set(), []
            for early in waiting:
                if number < steps and early not in batch and len(batch) < per_batch:
                    batch.add(early)
                else:
                    still.append(early)
            waiting = still
    for step in range(number, steps):
        _fill(batches, step, waiting, per_batch, rng)
    return np.array([rng.permutation(sorted(batch)) for batch in batches], np.int64).reshape(
        steps, per_batch
    )


def _fill(
    batches: list[set[int]], step: int, waiting: list[int], per_batch: int, rng: np.random.Generator
) -> None:
    """Fill a batch at the end of the epoch from the visits that are left, by exchange with others
    where it has them.

    Some batch without the class has another that this one lacks: the class stands in fewer than S,
    and that batch has P classes where this one has fewer.
    """
    batch = batches[step]
    while len(batch) < per_batch:
        visit = waiting.pop(0)
        if visit not in batch:
            batch.add(visit)
            continue
        for other in rng.permutation(len(batches)).tolist():
            spare = batches[other] - batch
            if other != step and visit not in batches[other] and spare:
                given = min(spare)
                batches[other].remove(given)
                batches[other].add(visit)
                batch.add(given)
                break


def _turn_in_group(index: SplitIndex, random_N: np.ndarray) -> np.ndarray:
    """How many images of the same class and group come before each, in random order."""
    order_N = np.lexsort((random_N, index.group_N, index.label_N))
    pair_N = index.label_N[order_N] * (int(index.group_N.max()) + 1) + index.group_N[order_N]
    turn_N = np.empty(len(order_N), np.int64)
    turn_N[order_N] = _occurrence(pair_N)
    return turn_N


def _occurrence(values_N: np.ndarray) -> np.ndarray:
    """How often each value stood before."""
    order_N = np.argsort(values_N, kind="stable")
    in_order_N = values_N[order_N]
    starts_N = np.r_[True, in_order_N[1:] != in_order_N[:-1]]
    since_N = np.arange(len(values_N)) - np.maximum.accumulate(
        np.where(starts_N, np.arange(len(values_N)), 0)
    )
    before_N = np.empty(len(values_N), np.int64)
    before_N[order_N] = since_N
    return before_N
