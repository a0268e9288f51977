"""How far a changed copy of a picture moves in the embedding, relative to the spacing of the items,
on homeware's validation images: what DEFAULT_RATIO of gallery/duplicates.py rests on.

    python tools/duplicate_recall.py RUN > docs/results/duplicate-recall.txt

RUN: a run of the recipe homeware, which was trained on other products.

Shapes: N pictures, D width of z.
"""

from __future__ import annotations

import io
import sys

import numpy as np
from hash_recall import CHANGES
from PIL import Image

import namr_dist
from namr_dist.data.homeware import embedded_shards
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import decode_rgb
from namr_dist.gallery.duplicates import DEFAULT_RATIO, SPACING_NEIGHBOUR
from namr_dist.provenance import provenance
from namr_dist.retrieval.arrays import unit_rows
from namr_dist.retrieval.search import search_excluding_self

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
EVERY = 2
"""Of the validation images, one in so many."""


def main() -> None:
    """Print, by ratio, how many copies are within it of their originals, and how many originals of
    another picture."""
    here = provenance()
    model = namr_dist.load(sys.argv[1])
    manifest = Manifest.load(embedded_shards())
    whole = manifest.index("val")
    chosen = whole.only(np.arange(0, len(whole), EVERY))
    source = ShardImages(manifest, chosen, TestTransform(size=1, crop_share=1.0))
    pictures = [
        Image.fromarray(decode_rgb(source.jpeg(position), key))
        for position, key in enumerate(chosen.keys)
    ]
    print(f"{here['machine']}; {here['versions']}; commit {here['commit']}")

    def embedded(images: list[Image.Image]) -> np.ndarray:
        z_ND = model.embed(images).astype(np.float64)
        return unit_rows(z_ND) if model.geometry.distance == "cosine" else z_ND

    z_ND = embedded(pictures)
    squared_NK, nearest_NK = search_excluding_self(z_ND, z_ND, SPACING_NEIGHBOUR)
    distance_NK = np.sqrt(squared_NK.astype(np.float64))
    spacing = float(np.median(distance_NK[:, -1]))
    other_N = chosen.label_N != chosen.label_N[nearest_NK[:, 0]]
    print(
        f"{len(pictures)} validation images of homeware ({len(set(chosen.label_N.tolist()))} products); half of "
        f"them have their {SPACING_NEIGHBOUR}th neighbour within {spacing:.4g}, the spacing. Percent within so "
        f"much of it; the default is {DEFAULT_RATIO}:"
    )
    print(f"  {'':<40}" + "".join(f"{ratio:>7g}" for ratio in RATIOS))

    def line(name: str, ratio_N: np.ndarray) -> None:
        shares = "".join(f"{100 * (ratio_N <= ratio).mean():7.1f}" for ratio in RATIOS)
        print(f"  {name:<40}{shares}", flush=True)

    for name, (change, quality) in CHANGES.items():
        copies = [Image.open(_encoded(change(picture), quality)) for picture in pictures]
        line(name, np.linalg.norm(embedded(copies) - z_ND, axis=1) / spacing)
    line("another picture, of any product", distance_NK[:, 0] / spacing)
    line(
        "another picture, of another product",
        np.where(other_N, distance_NK[:, 0], np.inf) / spacing,
    )


def _encoded(image: Image.Image, quality: int) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    buffer.seek(0)
    return buffer


if __name__ == "__main__":
    main()
