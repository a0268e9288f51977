"""The plan of an epoch: which images make which batch. A pure function; no file is opened.

An epoch visits every class once, with K of its images, P classes to a global batch. So every class is met
equally often, no class stands twice in a batch, and all ranks have the same number of batches. A batch is cut
into equal runs of whole classes, one a rank: any number of ranks sees the same global batches.
"""

from __future__ import annotations

import numpy as np

from namr_dist.errors import InputError

# First words of the random streams, so that plans and augmentations never share one.
_PLAN_STREAM, _AUGMENT_STREAM = 1, 2


def check_plan(label_N: np.ndarray, *, classes_per_batch: int, images_per_class: int, world_size: int) -> None:
    """Raise InputError if no batch of P classes with K images, shared by `world_size` ranks, can be made."""
    labels, counts = np.unique(label_N, return_counts=True)
    if classes_per_batch > len(labels):
        raise InputError(
            f"data.classes_per_batch is {classes_per_batch}, but the training split has {len(labels)} classes; "
            f"set it to at most {len(labels)}"
        )
    if images_per_class > counts.max():
        raise InputError(
            f"data.images_per_class is {images_per_class}, but the largest class has {counts.max()} images; "
            f"set it to at most {counts.max()}"
        )
    if classes_per_batch % world_size:
        raise InputError(
            f"data.classes_per_batch is {classes_per_batch}, which {world_size} ranks cannot share equally; "
            f"set it to a multiple of {world_size}"
        )


def steps_per_epoch(label_N: np.ndarray, *, classes_per_batch: int) -> int:
    """Full batches in one visit to every class; the classes left over differ from epoch to epoch."""
    return len(np.unique(label_N)) // classes_per_batch


def small_classes(label_N: np.ndarray, *, images_per_class: int) -> int:
    """Classes with fewer than K images. Their images are repeated to make up K."""
    return int((np.unique(label_N, return_counts=True)[1] < images_per_class).sum())


def epoch_plan(label_N: np.ndarray, *, classes_per_batch: int, images_per_class: int, seed: int,
               epoch: int) -> np.ndarray:
    """The epoch's global batches: int64 (steps, P, K), indices into the training split.

    Depends on its arguments alone. Rank r of W takes classes r·P/W to (r+1)·P/W of each batch (`rank_part`).
    Memory O(N).
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_PLAN_STREAM, seed, epoch])))
    # Sorting by (class, random) puts each class's images in a run of their own, shuffled within.
    order_N = np.lexsort((rng.random(len(label_N)), label_N))
    _, first_C, count_C = np.unique(label_N[order_N], return_index=True, return_counts=True)
    chosen_C = rng.permutation(len(first_C))
    steps = len(first_C) // classes_per_batch
    chosen = chosen_C[: steps * classes_per_batch].reshape(steps, classes_per_batch, 1)
    slot_K = np.arange(images_per_class) % count_C[chosen]
    return order_N[first_C[chosen] + slot_K]


def rank_part(batch_PK: np.ndarray, *, rank: int, world_size: int) -> np.ndarray:
    """The rank's share of one global batch: int64 (P/W · K,), whole classes."""
    share = batch_PK.shape[0] // world_size
    return batch_PK[rank * share : (rank + 1) * share].reshape(-1)


def augment_seed(*, seed: int, step: int, slot: int) -> int:
    """Seed of one image's augmentation: its place in the run decides, so no worker or rank count shows."""
    return int(np.random.SeedSequence([_AUGMENT_STREAM, seed, step, slot]).generate_state(1, np.uint64)[0])
