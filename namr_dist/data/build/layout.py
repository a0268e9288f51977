"""Which class of a new shard set is for validation, and which goes into which shard. Pure
functions; no file is opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.errors import InputError

# First words of the random streams; data/read/plan.py and data/read/select.py have the others.
_VALIDATION_STREAM, _SHARD_STREAM = 4, 5
_SPLITS = ("train", "val", "test")
_TAR_BLOCK = 512
_HEADERS = 3 * _TAR_BLOCK
"""Of one image in a tar: a header for the JPEG, one for the JSON, and the JSON itself."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One shard before it is written: whole classes, one after another."""

    file: str
    split: str
    images: tuple[SourceImage, ...]


def tar_bytes(size: int) -> int:
    """What an image file of `size` bytes takes in a tar."""
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK + _HEADERS


def with_validation(listing: Listing, *, share: float, seed: int) -> Listing:
    """The listing with this share of the training classes, drawn by the seed, in a split "val" of
    their own.

    Raises InputError if it has such a split already, or if either split would have no class.
    """
    if not share:
        return listing
    if any(entry.split == "val" for entry in listing.classes):
        raise InputError(
            f"--validation is {share}, but {listing.name} has a split val of its own; leave it out"
        )
    labels = sorted(entry.label for entry in listing.classes if entry.split == "train")
    number = round(share * len(labels))
    if not 0 < number < len(labels):
        raise InputError(
            f"--validation is {share}, which is {number} of {len(labels)} training classes; give a share "
            "that leaves at least one class on either side"
        )
    drawn = set(_shuffled(labels, [_VALIDATION_STREAM, seed])[:number])
    return dataclasses.replace(
        listing,
        classes=tuple(
            dataclasses.replace(entry, split="val") if entry.label in drawn else entry
            for entry in listing.classes
        ),
        images=tuple(
            dataclasses.replace(image, split="val") if image.label in drawn else image
            for image in listing.images
        ),
    )


def shard_plans(
    listing: Listing, size_of: dict[str, int], *, target_bytes: int, seed: int
) -> list[ShardPlan]:
    """Every split in shards of much the same size, about `target_bytes` or less, its classes
    shuffled by the seed.

    size_of: bytes of each image's file by its key. A class's images lie together in one shard, in
        the listing's order.
    """
    by_class: dict[int, list[SourceImage]] = {}
    for image in listing.images:
        by_class.setdefault(image.label, []).append(image)
    plans = []
    for split in sorted({entry.split for entry in listing.classes}, key=_SPLITS.index):
        labels = _shuffled(
            sorted(entry.label for entry in listing.classes if entry.split == split),
            [_SHARD_STREAM, seed],
        )
        bytes_C = np.asarray(
            [sum(tar_bytes(size_of[image.key]) for image in by_class[label]) for label in labels]
        )
        count = -(-int(bytes_C.sum()) // target_bytes)
        # The shard in which the middle of a class falls, were the split one run of bytes cut into
        # equal parts.
        shard_C = ((bytes_C.cumsum() - bytes_C / 2) * count // bytes_C.sum()).astype(int)
        for number, shard in enumerate(np.unique(shard_C)):
            images = [
                image
                for position in np.flatnonzero(shard_C == shard)
                for image in by_class[labels[position]]
            ]
            plans.append(
                ShardPlan(file=f"{split}-{number:06d}.tar", split=split, images=tuple(images))
            )
    return plans


def _shuffled(labels: list[int], stream: list[int]) -> list[int]:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(stream)))
    return [labels[position] for position in np.argsort(rng.random(len(labels)), kind="stable")]
