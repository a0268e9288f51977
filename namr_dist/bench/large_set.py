"""A shard set of the size of Stanford Online Products, to measure training with: real tars,
pictures that repeat."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from namr_dist.bench.example_set import make_example_set
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import ImageClass, Manifest, Shard
from namr_dist.data.shardset.shards import Sample, write_shard

IMAGES, CLASSES = 59_551, 11_318
"""Of the training split of Stanford Online Products (Oh Song et al. 2016)."""
_DISTINCT = 256
"""Different pictures. Each stands in the tars many times, under other keys and at other places of
the disk, so that only making them is saved."""
_CLASSES_PER_SHARD = 200
_TEST_IMAGES = 2


def make_large_set(folder: Path, *, images: int = IMAGES) -> Manifest:
    """Write so many training images in the empty folder, as many to a class as in Stanford Online
    Products (5 or 6), and one class to test, for training asks for a test split. At least two
    classes are made.

    Pictures of 320 to 500 px (example_set.py), which follow each other in a class. Written by a
    process a core. The same files for the same number.
    """
    pool = folder / "pool"
    pool.mkdir()
    make_example_set(pool, images=min(images, _DISTINCT))
    classes = max(2, round(images * CLASSES / IMAGES))
    first_C = np.arange(classes + 1) * images // classes
    tasks = [
        _Task(
            split="train",
            number=number,
            label=label,
            first_C=tuple(first_C[label : label + _CLASSES_PER_SHARD + 1].tolist()),
        )
        for number, label in enumerate(range(0, classes, _CLASSES_PER_SHARD))
    ]
    tasks.append(
        _Task(split="test", number=0, label=classes, first_C=(images, images + _TEST_IMAGES))
    )
    # Forked, as loader workers are: importing all anew would take longer than their work.
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")
    ) as processes:
        shards = tuple(processes.map(partial(_write, folder, pool), tasks))
    manifest = Manifest(
        name="pictures of no meaning",
        description="enlarged homeware renders with noise, repeated",
        classes=tuple(entry for task in tasks for entry in task.classes),
        shards=shards,
        folder=folder,
    )
    manifest.save()
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One tar, of whole classes."""

    split: str
    number: int
    label: int
    """Of its first class; the others follow."""
    first_C: tuple[int, ...]
    """Number of each class's first image, and the one behind the last."""

    @property
    def classes(self) -> list[ImageClass]:
        return [
            ImageClass(label=label, name=f"thing {label}", category="", split=self.split)
            for label in range(self.label, self.label + len(self.first_C) - 1)
        ]


def _write(folder: Path, pool: Path, task: _Task) -> Shard:
    manifest = Manifest.load(pool)
    images = ShardImages(manifest, manifest.index("train"), TestTransform(size=1, crop_share=1.0))
    classes = {entry.label: entry for entry in task.classes}
    samples = (
        Sample(key=f"{number:08d}", label=label, jpeg=images.jpeg(number % len(images)))
        for label, (first, end) in zip(classes, itertools.pairwise(task.first_C), strict=True)
        for number in range(first, end)
    )
    return write_shard(folder, f"{task.split}-{task.number:06d}.tar", task.split, samples, classes)
