"""A shard set to measure with: pictures of the size that shops and catalogues have, for homeware's
are smaller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from namr_dist.data.homeware import embedded_shards
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import ImageClass, Manifest
from namr_dist.data.shardset.shards import Sample, decode_rgb, write_shard

IMAGES_PER_CLASS = 4
_SIDES = (320, 501)
"""Sides are drawn from 320 to 500 pixels."""
_NOISE = 6.0
"""Standard deviation of the noise in levels. It stands for the fine detail that enlarged renders
lack: without it, files would be a quarter as large as photographs of that size, and decoding
faster."""
_QUALITY = 90


def make_example_set(folder: Path, *, images: int) -> Manifest:
    """Write about so many enlarged homeware renders with noise, four to a class, as a shard set of
    one split.

    JPEG of quality 90 with halved chroma, as cameras and shops write it; one tar a thousand images.
    The same images for the same number.
    """
    homeware = Manifest.load(embedded_shards())
    count = max(2, -(-images // IMAGES_PER_CLASS))
    classes = {
        label: ImageClass(label=label, name=f"thing {label}", category="", split="train")
        for label in range(count)
    }
    shards = [
        write_shard(
            folder,
            f"train-{number:06d}.tar",
            "train",
            _samples(homeware, range(first, min(first + 250, count))),
            classes,
        )
        for number, first in enumerate(range(0, count, 250))
    ]
    manifest = Manifest(
        name="example pictures",
        description="enlarged homeware renders with noise",
        classes=tuple(classes.values()),
        shards=tuple(shards),
        folder=folder,
    )
    manifest.save()
    return manifest


def _samples(homeware: Manifest, labels: range) -> Iterator[Sample]:
    index = homeware.index(*homeware.splits)
    renders = ShardImages(homeware, index, TestTransform(size=1, crop_share=1.0))
    for label in labels:
        for view in range(IMAGES_PER_CLASS):
            number = label * IMAGES_PER_CLASS + view
            image = number % len(index)
            render = decode_rgb(renders.jpeg(image), index.keys[image])
            yield Sample(
                key=f"{number:06d}",
                label=label,
                jpeg=_enlarged(render, np.random.default_rng(number)),
            )


def _enlarged(render_HW3: np.ndarray, rng: np.random.Generator) -> bytes:
    height, width = (int(side) for side in rng.integers(*_SIDES, size=2))
    large = np.asarray(
        Image.fromarray(render_HW3).resize((width, height), Image.Resampling.BICUBIC), np.float32
    )
    noisy = large + _NOISE * rng.standard_normal(large.shape, np.float32)
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.clip(noisy, 0, 255).astype(np.uint8), _QUALITY, "RGB", "420"
    )
    return jpeg
