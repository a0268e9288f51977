"""How far a changed copy of an image moves in difference hash, on homeware's training images, and
how many validation images are as near to a training image of another product: what NEAR_BITS of
data/shardset/near_duplicates.py rests on.

    python tools/hash_recall.py > docs/results/hash-recall.txt
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance, ImageOps

from namr_dist.data.homeware import embedded_shards
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.near_duplicates import NEAR_BITS, hash_split, near_duplicates
from namr_dist.data.shardset.shards import Sample, decode_rgb, write_shard
from namr_dist.provenance import provenance

IMAGES = 600


def scaled(image: Image.Image, factor: float) -> Image.Image:
    """The image with both sides times `factor`."""
    return image.resize(
        (round(factor * image.width), round(factor * image.height)), Image.Resampling.BICUBIC
    )


def cropped(image: Image.Image, share: float) -> Image.Image:
    """The image without a border, which takes `share` of its width away."""
    return ImageOps.crop(image, round(share * image.width / 2))


CHANGES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "encoded again at quality 75": (lambda image: image, 75),
    "encoded again at quality 50": (lambda image: image, 50),
    "half the size": (lambda image: scaled(image, 0.5), 90),
    "0.7 of the size": (lambda image: scaled(image, 0.7), 90),
    "twice the size": (lambda image: scaled(image, 2.0), 90),
    "15 % brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.15), 90),
    "2 % of width and height cut off": (lambda image: cropped(image, 0.02), 90),
    "4 % of width and height cut off": (lambda image: cropped(image, 0.04), 90),
    "mirrored": (ImageOps.mirror, 90),
}


def main() -> None:
    """Print how many copies stay near after each change, and how many validation images are near
    another product."""
    here = provenance()
    manifest = Manifest.load(embedded_shards())
    whole = manifest.index("train")
    chosen = whole.only(np.linspace(0, len(whole) - 1, IMAGES).astype(int))
    source = ShardImages(manifest, chosen, TestTransform(size=1, crop_share=1.0))
    pictures = [
        Image.fromarray(decode_rgb(source.jpeg(position), key))
        for position, key in enumerate(chosen.keys)
    ]
    original = hash_split(manifest, "train")
    position_of = {key: position for position, key in enumerate(original.keys)}
    positions = np.array([position_of[key] for key in chosen.keys])
    kept_M = ~original.flat_N[positions]
    print(f"{here['machine']}; {here['versions']}; commit {here['commit']}")
    print(
        f"{IMAGES} training images of homeware, {kept_M.sum()} of them not flat; within {NEAR_BITS} bits of 256:"
    )
    for name, (change, quality) in CHANGES.items():
        with tempfile.TemporaryDirectory() as folder:
            samples = [
                Sample(
                    key=key,
                    label=int(label),
                    jpeg=simplejpeg.encode_jpeg(np.ascontiguousarray(change(picture)), quality),
                )
                for key, label, picture in zip(chosen.keys, chosen.label_N, pictures, strict=True)
            ]
            shard = write_shard(
                Path(folder), "changed.tar", "train", samples, manifest.class_by_label
            )
            changed = hash_split(
                dataclasses.replace(manifest, shards=(shard,), folder=Path(folder)), "train"
            )
        moved_M = np.unpackbits(changed.bits_N32 ^ original.bits_N32[positions], axis=1).sum(1)
        print(f"  {name:<33}{100 * (moved_M[kept_M] <= NEAR_BITS).mean():6.1f} %")
    audit = near_duplicates(manifest)["splits"]["val"]
    print(
        f"validation images near a training image, all of other products: {audit['against']['train']['near']} of "
        f"{audit['images']}, {audit['flat']} of which are flat"
    )


if __name__ == "__main__":
    main()
