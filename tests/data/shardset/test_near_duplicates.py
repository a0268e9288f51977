"""Near duplicates: planted copies are found and named, other pictures are not."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pictures import saved
from PIL import Image
from rich.console import Console

from namr_dist.data.shardset.manifest import ImageClass, Manifest
from namr_dist.data.shardset.near_duplicates import NEAR_BITS, hash_split, near_duplicates, nearest
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.data.shardset.show import near_duplicate_tables, statistics_tables
from namr_dist.data.shardset.statistics import statistics
from namr_dist.errors import InputError

jpeg = partial(saved, kind="JPEG", quality=90)


def scene(seed: int) -> Image.Image:
    """A photograph's stand-in: smooth light and dark of all sizes."""
    small_HW3 = np.random.default_rng(seed).uniform(0, 255, (9, 9, 3)).astype(np.uint8)
    return Image.fromarray(small_HW3).resize((300, 200), Image.Resampling.BICUBIC)


def make_set(folder: Path, images: dict[str, dict[str, bytes]]) -> Manifest:
    classes, shards = {}, []
    for label, (split, by_key) in enumerate(images.items()):
        classes[label] = ImageClass(label=label, name=split, category="", split=split)
        samples = [Sample(key=key, label=label, jpeg=data) for key, data in by_key.items()]
        shards.append(write_shard(folder, f"{split}.tar", split, samples, classes))
    return Manifest(
        name="scenes",
        description="",
        classes=tuple(classes.values()),
        shards=tuple(shards),
        folder=folder,
    )


@pytest.fixture
def planted(tmp_path: Path) -> Manifest:
    flat = Image.new("RGB", (300, 200), (200, 200, 210))
    return make_set(
        tmp_path,
        {
            "train": {
                **{f"train{seed}": jpeg(scene(seed)) for seed in range(20)},
                "blank": jpeg(flat),
            },
            "val": {
                "mirrored": jpeg(scene(4).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
                "own": jpeg(scene(104)),
            },
            "test": {
                "copy": jpeg(scene(7).resize((190, 127)), quality=50),
                "grey": jpeg(scene(3).convert("L")),
                "cut": jpeg(scene(12).crop((3, 2, 297, 198))),
                "val-too": jpeg(scene(104), quality=60),
                "blank-too": jpeg(flat, quality=40),
                **{f"test{seed}": jpeg(scene(200 + seed)) for seed in range(20)},
            },
        },
    )


def test_planted_copies_are_found_by_name(planted: Manifest) -> None:
    told: list[int] = []
    audit = near_duplicates(planted, advance=told.append)
    assert {split: list(row["against"]) for split, row in audit["splits"].items()} == {
        "train": [],
        "val": ["train"],
        "test": ["train", "val"],
    }
    test = audit["splits"]["test"]["against"]
    assert audit["splits"]["test"]["images"] == 25 and (
        test["train"]["near"],
        test["val"]["near"],
    ) == (3, 1)
    assert {(pair["key"], pair["other_key"]) for pair in test["train"]["nearest"][:3]} == {
        ("copy", "train7"),
        ("grey", "train3"),
        ("cut", "train12"),
    }
    assert (test["val"]["nearest"][0]["key"], test["val"]["nearest"][0]["other_key"]) == (
        "val-too",
        "own",
    )
    bits = [pair["bits"] for pair in test["train"]["nearest"]]
    assert len(bits) == 10 and bits == sorted(bits) and bits[2] <= NEAR_BITS and bits[3] > 40
    assert sum(told) == 48


def test_flat_pictures_are_counted_apart(planted: Manifest) -> None:
    """The two blanks are alike in every bit and say nothing."""
    audit = near_duplicates(planted)
    assert {split: row["flat"] for split, row in audit["splits"].items()} == {
        "train": 1,
        "val": 0,
        "test": 1,
    }
    train, test = (hash_split(planted, split) for split in ("train", "test"))
    assert (
        train.bits_N32[train.keys.index("blank")] == test.bits_N32[test.keys.index("blank-too")]
    ).all()
    assert "blank-too" not in [
        pair["key"] for pair in audit["splits"]["test"]["against"]["train"]["nearest"]
    ]


def test_a_mirrored_copy_is_not_found(planted: Manifest) -> None:
    val = near_duplicates(planted)["splits"]["val"]["against"]["train"]
    assert val["near"] == 0 and {pair["key"] for pair in val["nearest"]} == {"mirrored", "own"}


def test_only_flat_pictures(tmp_path: Path) -> None:
    blank = jpeg(Image.new("RGB", (30, 30), "white"))
    audit = near_duplicates(make_set(tmp_path, {"train": {"a": blank}, "test": {"b": blank}}))
    assert audit["splits"]["test"] == {
        "images": 1,
        "flat": 1,
        "against": {"train": {"near": 0, "nearest": []}},
    }


def test_search_equals_brute_force() -> None:
    rng = np.random.default_rng(1)
    bits_N32 = rng.integers(0, 256, (700, 32), dtype=np.uint8)
    bits_N32[500:600] = bits_N32[:100]  # ties
    bits_M32 = np.concatenate([rng.integers(0, 256, (300, 32), dtype=np.uint8), bits_N32[490:510]])
    every_MN = np.unpackbits(bits_M32[:, None] ^ bits_N32, axis=2).sum(axis=2, dtype=np.int64)
    distance_M, position_M = nearest(bits_M32, bits_N32)
    assert (distance_M == every_MN.min(axis=1)).all()
    assert (position_M == every_MN.argmin(axis=1)).all()


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    whole = jpeg(scene(0))
    manifest = make_set(
        tmp_path, {"train": {"good": whole, "half": whole[: len(whole) // 2]}, "test": {"t": whole}}
    )
    with pytest.raises(InputError, match="half.jpg in .*train.tar cannot be decoded"):
        near_duplicates(manifest)


def test_a_missing_shard_is_named(planted: Manifest) -> None:
    (planted.folder / "val.tar").unlink()
    with pytest.raises(
        InputError, match="shard .*val.tar cannot be read .*; copy it there or rebuild"
    ):
        near_duplicates(planted)


def test_tables_show_names_as_they_are(tmp_path: Path) -> None:
    """Splits of other programs' manifests may have any name, also one that looks like rich's
    markup."""
    manifest = make_set(
        tmp_path,
        {
            "train": {"[b]": jpeg(scene(0))},
            "[red]": {"[": jpeg(scene(0))},
            "test[i]": {"[bold]": jpeg(scene(9))},
        },
    )
    console = Console(file=io.StringIO(), width=200)
    for table in (
        *near_duplicate_tables(near_duplicates(manifest)),
        *statistics_tables(statistics(manifest)),
    ):
        console.print(table)
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert all(
        text in said
        for text in ("Nearest pairs of test[i] and [red]", "near [red]", "[b]", "[bold]")
    )


def test_a_set_without_training_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'train'; it has test"):
        near_duplicates(make_set(tmp_path, {"test": {"t": jpeg(scene(0))}}))
