"""The embedded set is what the docs say it is."""

from __future__ import annotations

import csv
from collections import Counter

import numpy as np

from namr_dist.data.build.formats.homeware import split_of
from namr_dist.data.homeware import embedded_shards
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import decode_rgb, verify_shards


def attribution() -> list[dict[str, str]]:
    with open(embedded_shards().parent / "ATTRIBUTION.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_counts_and_size() -> None:
    manifest = Manifest.load(embedded_shards())
    assert verify_shards(manifest, manifest.splits, decode=True) == 4920
    classes = Counter(entry.split for entry in manifest.classes)
    assert classes == {"train": 330, "val": 82, "test": 408}
    assert len({entry.category for entry in manifest.classes}) == 12
    for split in manifest.splits:
        assert (np.unique(manifest.index(split).label_N, return_counts=True)[1] == 6).all()
    assert sum(path.stat().st_size for path in embedded_shards().iterdir()) <= 20 * 2**20


def test_split_rule() -> None:
    """Even positions of a category train, every fifth of those validates, odd ones test."""
    manifest = Manifest.load(embedded_shards())
    in_training = 0
    for category in sorted({entry.category for entry in manifest.classes}):
        members = [entry for entry in manifest.classes if entry.category == category]
        for position, entry in enumerate(members):
            assert entry.split == split_of(position, in_training)
            assert (entry.split == "test") == (position % 2 == 1)
            in_training += entry.split != "test"


def test_every_product_is_attributed() -> None:
    manifest = Manifest.load(embedded_shards())
    rows = {row["product_id"]: row for row in attribution()}
    for split in manifest.splits:
        index = manifest.index(split)
        for key, label in zip(index.keys, index.label_N, strict=True):
            row = rows[key.rsplit("_", 1)[0]]
            entry = manifest.class_by_label[int(label)]
            assert (row["name"], row["category"]) == (entry.name, entry.category)
    assert len(rows) == 820
    assert all(
        row["creator"].strip() and row["licence_url"].startswith("https://")
        for row in rows.values()
    )
    assert set(Counter(row["licence"] for row in rows.values())) == {
        "CC0-1.0",
        "CC-BY-3.0",
        "CC-BY-3.0-US",
    }


def test_pictures_show_something() -> None:
    """No picture is of one colour, all black or all white; the faintest are road markings, white on
    white."""
    manifest = Manifest.load(embedded_shards())
    index = manifest.index(*manifest.splits)
    images = ShardImages(manifest, index, TestTransform(size=112, crop_share=1.0))
    for position in range(len(index)):
        pixels = decode_rgb(images.jpeg(position), index.keys[position])
        assert pixels.shape == (112, 112, 3)
        assert pixels.std() > 3 and 8 < pixels.mean() < 253, index.keys[position]
