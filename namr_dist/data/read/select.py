"""Which images of the training splits are trained on: class and super-class filters, least and most
images a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from namr_dist.config import DataConfig
from namr_dist.data.shardset.manifest import Manifest, SplitIndex
from namr_dist.errors import InputError

# First word of the random stream that chooses a class's images; data/read/plan.py has the others.
_CHOICE_STREAM = 3


def training_images(manifest: Manifest, data: DataConfig, *, seed: int) -> SplitIndex:
    """The images of `data.train_splits` that the filters leave, in the order of the tars.

    The same for every rank and epoch. Raises InputError for a super-class or class that the set
    does not have, and if nothing is left.
    """
    index = manifest.index(*data.train_splits)
    keep_N = np.ones(len(index), bool)
    if data.categories:
        keep_N &= np.isin(index.category_N, [_category(manifest, name) for name in data.categories])
    if data.class_list:
        keep_N &= np.isin(index.label_N, _listed_labels(manifest, data.class_list))
    labels, class_N, count_C = np.unique(index.label_N, return_inverse=True, return_counts=True)
    keep_N &= count_C[class_N] >= data.least_images
    if data.most_images is not None:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([_CHOICE_STREAM, seed])))
        order_N = np.lexsort((rng.random(len(index)), class_N))
        first_C = np.r_[0, np.cumsum(count_C)[:-1]]
        keep_N[order_N] &= np.arange(len(index)) - first_C[class_N[order_N]] < data.most_images
    if not keep_N.any():
        raise InputError(
            f"no image of {', '.join(data.train_splits)} in {manifest.folder} is left by data.categories, "
            f"data.class_list and data.least_images ({data.least_images}); loosen one"
        )
    return index if keep_N.all() else index.only(np.flatnonzero(keep_N))


def _category(manifest: Manifest, name: str) -> int:
    if name not in manifest.categories:
        raise InputError(
            f"data.categories names {name!r}; {manifest.folder} has "
            f"{', '.join(filter(None, manifest.categories)) or 'no super-classes'}"
        )
    return manifest.categories.index(name)


def _listed_labels(manifest: Manifest, path: Path) -> list[int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.class_list {path} cannot be read ({error}); give a text file with a class a line"
        ) from None
    labels_of: dict[str, set[int]] = {}
    for entry in manifest.classes:
        labels_of.setdefault(entry.name, set()).add(entry.label)
        labels_of.setdefault(str(entry.label), set()).add(entry.label)
    chosen = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word:
            continue
        labels = sorted(labels_of.get(word, ()))
        if not labels:
            raise InputError(
                f"{path}, line {number}: {manifest.folder} has no class {word!r}; give a name or a label "
                "of its manifest"
            )
        if len(labels) > 1:
            raise InputError(
                f"{path}, line {number}: {word!r} is a name or a label of classes {labels[0]} and "
                f"{labels[1]} of {manifest.folder}; give another word for the one that is meant"
            )
        chosen += labels
    return chosen
