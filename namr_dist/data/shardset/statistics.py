"""What a shard set holds, in numbers: images and classes by split, subset and super-class, and
image sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from namr_dist.data.shardset.manifest import ROLES, Manifest, SplitIndex
from namr_dist.data.shardset.shards import jpeg_size, map_jpegs

_MOST_BINS = 16


def statistics(manifest: Manifest, *, sizes: bool = False) -> dict[str, Any]:
    """Figures of a set, ready for JSON.

    `splits` and `subsets`: by name, what `_row` counts; with `sizes`, `width` and `height` in
    pixels as well, which reads every image's header. `categories`: by name, most images first,
    classes in all and images by split; empty where the set has no super-classes. `histogram`:
    `bins`, (least, most) images a class, and by split the classes in each of them. Raises
    InputError, with `sizes`, for a shard or image that cannot be read.
    """
    rows = {
        name: _row(manifest, manifest.index(name)) for name in (*manifest.splits, *manifest.subsets)
    }
    if sizes:
        for name, row in rows.items():
            row |= _sizes(manifest, manifest.index(name))
    return {
        "name": manifest.name,
        "description": manifest.description,
        "splits": {name: rows[name] for name in manifest.splits},
        "subsets": {name: rows[name] for name in manifest.subsets},
        "categories": _categories(manifest),
        "histogram": _histogram(manifest),
    }


def _row(manifest: Manifest, index: SplitIndex) -> dict[str, Any]:
    """Images, classes, images a class (mean, least, most), lone classes, shards, MiB of images;
    images of each role and groups where the set has any. A lone class has no pair of a query and
    another image for it to find."""
    _, class_N, count_C = np.unique(index.label_N, return_inverse=True, return_counts=True)
    query_C, gallery_C = (
        np.bincount(class_N, index.role_N != ROLES.index(other)) for other in ("gallery", "query")
    )
    both_C = np.bincount(class_N, index.role_N == ROLES.index(""))
    row = {
        "images": len(index),
        "classes": len(count_C),
        "images_per_class": float(count_C.mean()),
        "least": int(count_C.min()),
        "most": int(count_C.max()),
        "lone_classes": int((query_C * gallery_C == both_C).sum()),
        "shards": len(np.unique(index.shard_N)),
        "mib": float(index.length_N.sum() / 2**20),
    }
    if any(shard.roles for shard in manifest.shards):
        row |= {role: int((index.role_N == ROLES.index(role)).sum()) for role in ROLES if role}
    if any(shard.groups for shard in manifest.shards):
        row["groups"] = len(np.unique(np.stack([index.label_N, index.group_N]), axis=1).T)
    return row


def _sizes(manifest: Manifest, index: SplitIndex) -> dict[str, Any]:
    size_N2 = np.array(list(map_jpegs(manifest, index, jpeg_size)))
    return {
        side: {
            "least": int(size_N.min()),
            "median": float(np.median(size_N)),
            "most": int(size_N.max()),
        }
        for side, size_N in zip(("height", "width"), size_N2.T, strict=True)
    }


def _categories(manifest: Manifest) -> dict[str, Any]:
    if not any(manifest.categories):
        return {}
    names = manifest.categories
    classes_G = np.bincount([names.index(entry.category) for entry in manifest.classes])
    images_SG = np.stack(
        [
            np.bincount(manifest.index(split).category_N, minlength=len(names))
            for split in manifest.splits
        ]
    )
    order_G = np.argsort(-images_SG.sum(axis=0), kind="stable")
    return {
        names[g]: {
            "classes": int(classes_G[g]),
            "images": dict(zip(manifest.splits, images_SG[:, g].tolist(), strict=True)),
        }
        for g in order_G
    }


def _histogram(manifest: Manifest) -> dict[str, Any]:
    counts = {
        split: np.unique(manifest.index(split).label_N, return_counts=True)[1]
        for split in manifest.splits
    }
    everything = np.concatenate(list(counts.values()))
    bins = bins_of(int(everything.min()), int(everything.max()))
    edges = [least for least, _ in bins] + [bins[-1][1] + 1]
    return {
        "bins": bins,
        "classes": {
            split: np.histogram(count_C, edges)[0].tolist() for split, count_C in counts.items()
        },
    }


def bins_of(least: int, most: int) -> list[tuple[int, int]]:
    """At most 16 equally wide bins of whole numbers, (first, last) of each, from `least` to `most`:
    of one number each, or of 2, 5, 10, 20 … beginning at a multiple of that."""
    width = next(
        factor * 10**power
        for power in range(19)
        for factor in (1, 2, 5)
        if most // (factor * 10**power) - least // (factor * 10**power) < _MOST_BINS
    )
    return [
        (width * number, width * number + width - 1)
        for number in range(least // width, most // width + 1)
    ]
