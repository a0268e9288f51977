"""Shards: what other readers see in them, and what is noticed when they are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset
from conftest import make_shards, picture
from damaged_sets import edit

from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import check_jpeg, decode_rgb, verify_shards
from namr_dist.data.shardset.statistics import statistics
from namr_dist.errors import InputError

ALL = ("train", "val", "test")


def test_webdataset_reads_them(shard_set: Manifest) -> None:
    shard = shard_set.shards[0]
    read = webdataset.WebDataset(str(shard_set.folder / shard.file), shardshuffle=False)
    samples = list(read)
    assert [sample["__key__"] for sample in samples] == list(shard.keys)
    assert [json.loads(sample["json"])["label"] for sample in samples] == list(shard.labels)
    tar = (shard_set.folder / shard.file).read_bytes()
    for sample, offset, length in zip(samples, shard.offsets, shard.lengths, strict=True):
        assert sample["jpg"] == tar[offset : offset + length]


def test_same_images_same_bytes(shard_set: Manifest, tmp_path: Path) -> None:
    again = make_shards(tmp_path, classes={"train": 12, "val": 4, "test": 6})
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in shard_set.shards]
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*(shard.file for shard in again.shards), "manifest.json"]
    )


def test_manifest_survives_its_file(shard_set: Manifest) -> None:
    assert Manifest.load(shard_set.folder) == shard_set


def test_counts(shard_set: Manifest) -> None:
    assert verify_shards(shard_set, ALL, decode=True) == 22 * 6
    rows = statistics(shard_set)["splits"]
    assert {split: (row["images"], row["classes"]) for split, row in rows.items()} == {
        "train": (72, 12),
        "val": (24, 4),
        "test": (36, 6),
    }


def test_split_hash_names_the_images(shard_set: Manifest, tmp_path: Path) -> None:
    assert shard_set.split_hash("test") != shard_set.split_hash("val")
    fewer = make_shards(tmp_path, classes={"train": 12, "val": 4, "test": 5})
    assert fewer.split_hash("val") == shard_set.split_hash("val")
    assert fewer.split_hash("test") != shard_set.split_hash("test")


def damage(path: Path, at: int, value: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(value)


@pytest.mark.parametrize("kind", ["missing", "short", "one byte"])
def test_damaged_shard_is_named(own_shard_set: Manifest, kind: str) -> None:
    path = own_shard_set.folder / own_shard_set.shards[1].file
    if kind == "missing":
        path.unlink()
    elif kind == "short":
        os.truncate(path, path.stat().st_size - 512)
    else:
        middle = own_shard_set.shards[1].offsets[0] + 300
        damage(path, middle, bytes([path.read_bytes()[middle] ^ 1]))
    with pytest.raises(InputError, match=rf"{path.name} .*(missing|bytes|sha256).*; copy it"):
        verify_shards(own_shard_set, ALL)


def test_truncated_jpeg() -> None:
    jpeg = simplejpeg.encode_jpeg(picture(0, 0))
    check_jpeg(jpeg, "x", decode=True)
    check_jpeg(jpeg + b"\0" * 8, "x", decode=False)
    with pytest.raises(InputError, match="k.jpg is a truncated JPEG"):
        check_jpeg(jpeg[: len(jpeg) // 2], "k.jpg", decode=False)
    with pytest.raises(InputError, match="k.jpg is not a JPEG"):
        check_jpeg(b"RIFF" + jpeg, "k.jpg", decode=False)
    with pytest.raises(InputError, match="k.jpg cannot be decoded"):
        decode_rgb(jpeg[: len(jpeg) // 2], "k.jpg")


def test_large_images_are_shrunk_while_decoding() -> None:
    image = np.kron(picture(1, 1), np.ones((8, 8, 1), np.uint8))  # 384 px
    jpeg = simplejpeg.encode_jpeg(image)
    for shrink, side in ((2, 192), (4, 96), (8, 48)):
        assert decode_rgb(jpeg, "x", shrink=shrink).shape == (side, side, 3)
    assert decode_rgb(jpeg, "x").shape == (384, 384, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda body: body.update(format="other"), "format 'other'"),
        (lambda body: body.pop("classes"), "not a complete manifest .'classes'"),
        (lambda body: body["shards"][0].update(file="../x.tar"), "not a plain file name"),
        (lambda body: body["shards"][0]["offsets"].pop(), "differ in length"),
        (
            lambda body: body["classes"][0].update(split="test"),
            "train-0.tar is of split 'train' but holds class 0",
        ),
        (
            lambda body: body["shards"][1].update(keys=body["shards"][0]["keys"]),
            "occurs in two shards",
        ),
        (lambda body: body.update(shards=[]), "lists no images"),
        (
            lambda body: body["shards"][0]["offsets"].__setitem__(3, 10**9),
            "has an image at byte 1000000000",
        ),
        (lambda body: body["shards"][0]["lengths"].__setitem__(3, -5), "of -5 bytes"),
        (lambda body: body["classes"].append(body["classes"][0]), "label occurs twice"),
        *(
            (
                lambda body, file=file: body["shards"][0].update(file=file),
                "not a plain file name of at most 200 bytes",
            )
            for file in ("", ".", "..", "/x.tar", "a" * 201, "ä" * 101)
        ),
        (
            lambda body: body["shards"][0]["keys"].__setitem__(3, ""),
            "train-0.tar has an image with an empty key",
        ),
        (lambda body: body.update(name=3), "name and description must be text"),
        *(
            (
                lambda body, wrong=wrong, name=name: body["shards"][0].update({name: wrong}),
                f"{name} of shards must be {kind}",
            )
            for name, kind, wrong in (
                ("file", "text", 3),
                ("file", "text", "a\0"),
                ("split", "text", None),
                ("sha256", "text", 3),
                ("bytes", "whole numbers", "10"),
                ("bytes", "whole numbers", 2**70),
            )
        ),
        *(
            (
                lambda body, wrong=wrong, name=name: body["classes"][0].update({name: wrong}),
                f"{name} of classes must be {kind}",
            )
            for name, kind, wrong in (
                ("category", "text", None),
                ("name", "text", ["x"]),
                ("name", "text", "\ud800"),
                ("label", "whole numbers", "0"),
                ("label", "whole numbers", 0.5),
                ("label", "whole numbers", [0]),
                ("label", "whole numbers", 2**70),
            )
        ),
        *(
            (
                lambda body, wrong=wrong, name=name: body["shards"][0][name].__setitem__(3, wrong),
                f"{name} of train-0.tar must be {kind}",
            )
            for name, kind, wrong in (
                ("keys", "text", 3),
                ("keys", "text", "a\0"),
                ("labels", "whole numbers", "0"),
                ("labels", "whole numbers", None),
                ("labels", "whole numbers", [0]),
                ("offsets", "whole numbers", 512.0),
                ("lengths", "whole numbers", True),
            )
        ),
        *(
            (
                lambda body, wrong=wrong, name=name: body["shards"][0].update({name: wrong}),
                f"{name} of train-0.tar must be",
            )
            for name, wrong in (
                ("keys", "abc"),
                ("keys", 3),
                ("labels", {}),
                ("offsets", None),
                ("roles", [["query"]] * 36),
                ("groups", [[1, 2]] * 36),
            )
        ),
        (
            lambda body: body.update(subsets={"part": [["000_0"]]}),
            "keys of subset 'part' must be text",
        ),
        (lambda body: body.update(subsets=["part"]), "not a complete manifest"),
    ],
)
def test_wrong_manifests_are_refused(own_shard_set: Manifest, change, named: str) -> None:  # type: ignore[no-untyped-def]
    edit(own_shard_set, change)
    with pytest.raises(InputError, match=named):
        Manifest.load(own_shard_set.folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe{}", b"1" * 5000])
def test_what_is_no_json_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(
        InputError, match=r"manifest.json cannot be read as a manifest: .*; rebuild the shard set"
    ):
        Manifest.load(tmp_path)


def test_unknown_split(shard_set: Manifest) -> None:
    with pytest.raises(InputError, match="no split 'query'; it has train, val, test"):
        shard_set.index("query")
