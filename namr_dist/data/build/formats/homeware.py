"""homeware: the embedded data set, 820 household products in six rendered views each.

The package carries the finished shards. `python -m namr_dist.data.build.formats.homeware IMAGES`
packs a folder made by the renderer (tools/homeware/render.py) into them again.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from namr_dist.data.homeware import embedded_shards
from namr_dist.data.shardset.manifest import ImageClass, Manifest
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.errors import InputError
from namr_dist.text import say

PRODUCTS, VIEWS = 820, 6
_SHARDS_PER_SPLIT = {"train": 4, "val": 1, "test": 4}
_DESCRIPTION = (
    "820 household products, six views each, rendered at 112 px from the openly licensed 3D models of Debian's "
    "sweethome3d-furniture; creators and licences: ATTRIBUTION.csv"
)


def split_of(position: int, position_in_training: int) -> str:
    """Split of the product at `position` within its category, ordered by id.

    Even positions train and odd ones test; of the products that train, every fifth is for
    validation.
    """
    if position % 2:
        return "test"
    return "val" if position_in_training % 5 == 4 else "train"


def build(images: Path, out: Path) -> Manifest:
    """Pack IMAGES (products.csv and ID_VIEW.jpg files) into shards in `out`.

    Raises InputError if the folder does not hold 820 products with six views each.
    """
    with open(images / "products.csv", encoding="utf-8", newline="") as file:
        products = sorted(
            csv.DictReader(file), key=lambda row: (row["category"], row["product_id"])
        )
    if len(products) != PRODUCTS:
        raise InputError(
            f"{images / 'products.csv'} lists {len(products)} products, expected {PRODUCTS}; render again"
        )
    classes: dict[int, ImageClass] = {}
    position_in_category: dict[str, int] = {}
    in_training = 0
    for label, row in enumerate(products):
        position = position_in_category.get(row["category"], 0)
        position_in_category[row["category"]] = position + 1
        split = split_of(position, in_training)
        in_training += split != "test"
        classes[label] = ImageClass(
            label=label, name=row["name"], category=row["category"], split=split
        )
    out.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, count in _SHARDS_PER_SPLIT.items():
        labels = [label for label, entry in classes.items() if entry.split == split]
        for number in range(count):
            # Whole classes go to a shard, one after another: their images lie together.
            part = labels[number * len(labels) // count : (number + 1) * len(labels) // count]
            samples = [
                _sample(images, products[label]["product_id"], view, label)
                for label in part
                for view in range(VIEWS)
            ]
            shards.append(write_shard(out, f"{split}-{number:06d}.tar", split, samples, classes))
    manifest = Manifest(
        name="homeware",
        description=_DESCRIPTION,
        classes=tuple(classes.values()),
        shards=tuple(shards),
        folder=out,
    )
    manifest.save()
    return manifest


def _sample(images: Path, product: str, view: int, label: int) -> Sample:
    path = images / f"{product}_{view}.jpg"
    if not path.is_file():
        raise InputError(f"{path} is missing; render again")
    return Sample(key=f"{product}_{view}", jpeg=path.read_bytes(), label=label)


def main() -> None:
    """Pack the renderer's folder, by default into the package itself, and print how large the
    shards are."""
    parser = argparse.ArgumentParser(description="Pack rendered homeware images into shards.")
    parser.add_argument("images", type=Path, help="folder written by the renderer")
    parser.add_argument(
        "--out", type=Path, default=embedded_shards(), help="folder of the shards (%(default)s)"
    )
    arguments = parser.parse_args()
    manifest = build(arguments.images, arguments.out)
    say(
        f"{sum(shard.bytes for shard in manifest.shards) / 2**20:.1f} MiB in {len(manifest.shards)} shards"
    )


if __name__ == "__main__":
    main()
