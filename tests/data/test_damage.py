"""Damaged data of every kind: one named error or a counted replacement; no hang, no crash, nothing
lost unseen."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import launch, make_shards, picture, small_run
from damaged_sets import edit, with_images
from pictures import jpeg_claiming, saved
from PIL import Image

from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.plan import Sampling, epoch_plan
from namr_dist.data.read.stream import Batch, ShardImages, sequential_batches, stream
from namr_dist.data.shardset.manifest import Manifest, Shard
from namr_dist.data.shardset.shards import MOST_PIXELS, decode_rgb, verify_shards
from namr_dist.errors import InputError

CLASSES, IMAGES = 4, 6
WHOLE = TestTransform(size=48, crop_share=1.0)
POSITION, KEY = 8, "001_2"
"""The damaged image: the third of its class, in the first of two tars."""


@pytest.fixture
def own_set(tmp_path: Path) -> Manifest:
    """Four classes of six images, in two tars."""
    return make_shards(tmp_path / "shards", classes={"train": CLASSES})


def show(manifest: Manifest, *, damaged: str | None = None, workers: int = 0) -> list[Batch]:
    """The whole split in batches of five, read as training reads it."""
    images = ShardImages(manifest, manifest.index("train"), WHOLE, damaged=damaged)  # type: ignore[arg-type]
    return list(stream(images, sequential_batches(len(images), batch_size=5), workers=workers))


def first_tar(manifest: Manifest) -> Path:
    return manifest.folder / manifest.shards[0].file


# Shards: always an error, for no other image could be trusted either.


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def of_another_set(path: Path) -> None:
    other = make_shards(path.parent.parent / "other", classes={"train": CLASSES}, size=32)
    os.replace(other.folder / other.shards[0].file, path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("damaged", ["stop", "replace"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (Path.unlink, r"cannot be read \(No such file or directory\); copy it again"),
        (cut_off, r"has \d+ bytes, its manifest says \d+; copy it again"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, its manifest says"),
        (
            lambda path: path.write_bytes(path.read_bytes() + b"more"),
            r"has \d+ bytes, its manifest says",
        ),
        (of_another_set, r"has \d+ bytes, its manifest says"),
        (a_folder, r"cannot be read \(Is a directory\)"),
        (a_link_to_itself, r"cannot be read \(Too many levels of symbolic links\)"),
    ],
)
def test_a_damaged_shard_is_an_error_that_names_it(
    own_set: Manifest, spoil: Callable[[Path], object], named: str, damaged: str
) -> None:
    path = first_tar(own_set)
    spoil(path)
    with pytest.raises(InputError, match=rf"^shard {path} {named}"):
        show(own_set, damaged=damaged)
    with pytest.raises(InputError, match=str(path)):
        verify_shards(own_set, ["train"])


# Images: bytes in the place of one JPEG, in a shard that is as its manifest says.


def jpeg() -> bytes:
    return simplejpeg.encode_jpeg(picture(1, 2), quality=90)


def flipped_bits() -> bytes:
    """Entropy-coded data with an end-of-image marker in the middle, as a few flipped bits make."""
    whole = bytearray(jpeg())
    whole[len(whole) // 2 : len(whole) // 2 + 2] = b"\xff\xd9"
    return bytes(whole)


UNREADABLE = {
    "cut in half": lambda: jpeg()[: len(jpeg()) // 2],
    "without its end": lambda: jpeg()[:-2],
    "bits flipped": flipped_bits,
    "header alone": lambda: jpeg()[:20],
    "a PNG": lambda: saved(Image.fromarray(picture(1, 2)), "PNG"),
    "a PNG of 16 bits": lambda: saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
    "text": lambda: b"not an image\n" * 40,
    "zeros": lambda: bytes(500),
    "65,500 px square": lambda: jpeg_claiming(65_500, 65_500),
    "a row too many": lambda: jpeg_claiming(13_000, MOST_PIXELS // 13_000 + 1),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_image_is_an_error_or_replaced_and_named(
    own_set: Manifest, kind: str
) -> None:
    built = with_images(own_set, {KEY: UNREADABLE[kind]()})
    named = f"{KEY}.jpg in {first_tar(built)} "
    with pytest.raises(InputError) as caught:
        show(built)
    assert (
        str(caught.value).startswith(named)
        and str(caught.value).count("rebuild the shard set") == 1
    )
    with pytest.raises(InputError) as stopped:
        show(built, damaged="stop")
    assert str(stopped.value).startswith(named) and "rebuild" not in str(stopped.value)
    assert "set data.damaged_images to replace" in str(stopped.value)
    batches = show(built, damaged="replace")
    fault = str(caught.value).split("; rebuild")[0]
    assert [line for batch in batches for line in batch.replaced] == [fault]
    index_N = np.concatenate([batch.index_b.numpy() for batch in batches])
    want_N = np.where(
        np.arange(CLASSES * IMAGES) == POSITION, POSITION + 1, np.arange(CLASSES * IMAGES)
    )
    assert (index_N == want_N).all()
    assert (np.concatenate([batch.labels_b.numpy() for batch in batches]) == want_N // IMAGES).all()
    shown = np.concatenate([batch.images_bHW3.numpy() for batch in batches])
    assert (shown[POSITION] == shown[POSITION + 1]).all()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("junk behind the end", lambda: jpeg() + b"junk" * 100),
        ("grey", lambda: saved(Image.fromarray(picture(1, 2)).convert("L"), "JPEG")),
        ("four inks", lambda: saved(Image.fromarray(picture(1, 2)).convert("CMYK"), "JPEG")),
    ],
)
def test_unusual_images_are_shown_as_others_show_them(
    own_set: Manifest, kind: str, data: Callable[[], bytes]
) -> None:
    built = with_images(own_set, {KEY: data()})
    shown = np.concatenate([batch.images_bHW3.numpy() for batch in show(built)])[POSITION]
    pillow = np.asarray(Image.open(io.BytesIO(data())).convert("RGB"))
    # A conversion of four inks to RGB may round otherwise.
    assert np.abs(shown.astype(int) - pillow).max() <= 2, kind


@pytest.mark.parametrize(("width", "height"), [(65_500, 65_500), (13_000, 5_163)])
def test_the_size_of_a_large_image_is_named(width: int, height: int) -> None:
    """The second by less than a row, so that another limit would show."""
    with pytest.raises(InputError, match=f"x has {width} × {height} pixels, more than 67,108,864"):
        decode_rgb(jpeg_claiming(width, height), "x")


def test_replacements_go_round_the_class_past_other_damaged_ones(own_set: Manifest) -> None:
    built = with_images(own_set, {f"001_{view}": b"x" for view in (1, 4, 5)})
    (index_b,) = {
        tuple(batch.index_b.tolist())
        for batch in stream(
            ShardImages(built, built.index("train"), WHOLE, damaged="replace"),
            [[(6 + view, 0) for view in range(6)]],
            workers=0,
        )
    }
    assert index_b == (6, 8, 8, 9, 6, 6)


def test_a_class_without_any_readable_image_is_an_error(own_set: Manifest) -> None:
    built = with_images(own_set, {f"001_{view}": b"x" for view in range(IMAGES)})
    with pytest.raises(
        InputError,
        match=r"^class 1 \(thing 1\) of .*/shards has no image .*: 001_0.jpg .*; rebuild .* --overwrite$",
    ):
        show(built, damaged="replace")


def test_replacements_do_not_depend_on_the_workers(own_set: Manifest) -> None:
    built = with_images(own_set, {KEY: b"x", "000_5": b"y"})
    for one, other in zip(
        show(built, damaged="replace"), show(built, damaged="replace", workers=2), strict=True
    ):
        assert one.replaced == other.replaced
        assert all(
            (mine == theirs).all() for mine, theirs in zip(one.tensors, other.tensors, strict=True)
        )


# Manifests: refused before anything is read.


def first(body: dict) -> dict:
    return body["shards"][0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda body: body.update(format="namr-shards/2"),
            "has format 'namr-shards/2', expected 'namr-shards/1'",
        ),
        (
            lambda body: first(body)["lengths"].__setitem__(0, 0),
            "train-0.tar has an image at byte .* of 0 bytes",
        ),
        (
            lambda body: first(body)["offsets"].__setitem__(0, 10**7),
            "has an image at byte 10000000",
        ),
        (
            lambda body: first(body)["keys"].__setitem__(0, "003_0"),
            "key '003_0' occurs in two shards",
        ),
        (
            lambda body: body["classes"][0].update(split="test"),
            "of split 'train' but holds class 0, which is of 'test'",
        ),
        (lambda body: first(body)["labels"].__setitem__(0, 77), "holds class 77"),
    ],
)
def test_a_damaged_manifest_is_refused(
    own_set: Manifest, change: Callable[[dict], object], named: str
) -> None:
    edit(own_set, change)
    with pytest.raises(InputError, match=named):
        Manifest.load(own_set.folder)


def test_half_a_manifest_is_refused(own_set: Manifest) -> None:
    path = own_set.folder / "manifest.json"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        InputError, match="manifest.json cannot be read as a manifest.*; rebuild the shard set"
    ):
        Manifest.load(own_set.folder)


def test_the_manifest_of_another_set_does_not_fit_the_shards(
    own_set: Manifest, tmp_path: Path
) -> None:
    other = make_shards(tmp_path / "other", classes={"train": CLASSES}, size=32)
    (own_set.folder / "manifest.json").write_bytes((other.folder / "manifest.json").read_bytes())
    with pytest.raises(
        InputError, match=r"shard .*train-0.tar has \d+ bytes, its manifest says \d+"
    ):
        show(Manifest.load(own_set.folder))


def test_exchanged_images_are_seen_by_no_reader_of_bytes(own_set: Manifest) -> None:
    """Two images under each other's key: each is a good JPEG, and the tar is the one that the
    manifest hashed.

    The stream shows what it is told to; that keys and byte ranges go together is for `namr shards
    verify`. One whose CRC-32 is left behind is seen.
    """

    def exchange(body: dict, *columns: str) -> None:
        for column in (first(body)[name] for name in columns):
            column[0], column[POSITION] = column[POSITION], column[0]

    right = np.concatenate([batch.images_bHW3.numpy() for batch in show(own_set)])
    edit(own_set, lambda body: exchange(body, "offsets", "lengths"))
    with pytest.raises(InputError, match="000_0.jpg has CRC-32 [0-9a-f]{8}, not [0-9a-f]{8}"):
        show(Manifest.load(own_set.folder))
    with pytest.raises(InputError, match="000_0.jpg in .*train-0.tar has CRC-32 .*; rebuild"):
        verify_shards(Manifest.load(own_set.folder), ["train"])
    edit(own_set, lambda body: exchange(body, "crc32"))
    wrong = np.concatenate(
        [batch.images_bHW3.numpy() for batch in show(Manifest.load(own_set.folder))]
    )
    assert (wrong[0] == right[POSITION]).all() and (wrong[POSITION] == right[0]).all()


def without_crc32(manifest: Manifest) -> Manifest:
    """As older versions built it, and read some time after it was built."""
    edit(manifest, lambda body: [shard.pop("crc32", None) for shard in body["shards"]])
    for shard in manifest.shards:
        os.utime(manifest.folder / shard.file, (1, 1))
    later = time.time_ns() + 10**12
    return dataclasses.replace(Manifest.load(manifest.folder), read_ns=later)


def test_every_flipped_bit_of_an_image_is_found(own_set: Manifest) -> None:
    """Also those that a decoder passes over."""
    path, shard = first_tar(own_set), own_set.shards[0]
    assert shard.crc32 == tuple(
        zlib.crc32(path.read_bytes()[at : at + length])
        for at, length in zip(shard.offsets, shard.lengths, strict=True)
    )
    at, length = shard.offsets[POSITION], shard.lengths[POSITION]
    whole, images = path.read_bytes(), own_set.index("train")
    for position in range(at, at + length, 3):
        tar = bytearray(whole)
        tar[position] ^= 1 << position % 8
        path.write_bytes(tar)
        with pytest.raises(InputError, match=f"^shard {path} is not the one of its .*: {KEY}.jpg"):
            ShardImages(own_set, images, WHOLE, damaged="replace").jpeg(POSITION)


def another_of_the_same_size(path: Path, shard: Shard) -> None:
    """A shard whose images are good JPEGs, each under another's key, put in the place of this
    one."""
    tar = bytearray(path.read_bytes())
    smallest = tar[shard.offsets[0] :][: shard.lengths[0]]
    for at, length in zip(shard.offsets, shard.lengths, strict=True):
        if length >= len(smallest):
            tar[at : at + length] = smallest.ljust(length, b"\0")
    beside = path.with_name("another")
    beside.write_bytes(tar)
    os.replace(beside, path)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_replaced_while_it_is_read_ends_the_run(
    own_set: Manifest, old: bool, workers: int
) -> None:
    manifest = without_crc32(own_set) if old else own_set
    path = first_tar(manifest)
    images = ShardImages(manifest, manifest.index("train"), WHOLE, damaged="replace")
    # Longer than what a worker reads ahead.
    plan = [[(position, 0) for position in range(12)]] * 20
    batches = stream(images, plan, workers=workers)
    next(batches)
    another_of_the_same_size(path, manifest.shards[0])
    with pytest.raises(InputError, match=f"^shard {path} .*; copy it again$"):
        list(batches)


@pytest.mark.parametrize("old", [False, True])
def test_a_shard_that_is_copied_again_is_read_on(own_set: Manifest, old: bool) -> None:
    manifest = without_crc32(own_set) if old else own_set
    path = first_tar(manifest)
    images = ShardImages(manifest, manifest.index("train"), WHOLE)
    right = images.jpeg(0)
    beside = path.with_name("copy")
    beside.write_bytes(path.read_bytes())
    os.replace(beside, path)
    assert images.jpeg(0) == right


def test_a_shard_replaced_before_it_is_opened_is_found_without_checksums(
    own_set: Manifest,
) -> None:
    """Between the check before the first step and a worker's first look."""
    manifest = dataclasses.replace(without_crc32(own_set), read_ns=time.time_ns())
    path = first_tar(manifest)
    another_of_the_same_size(path, manifest.shards[0])
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=f"^shard {path} has been changed or replaced"):
        show(manifest)


def test_flipped_bits_that_still_decode_are_seen_by_the_hash(own_set: Manifest) -> None:
    own_set = without_crc32(own_set)
    path, shard = first_tar(own_set), own_set.shards[0]
    tar = bytearray(path.read_bytes())
    for at in range(
        shard.offsets[POSITION] + 700, shard.offsets[POSITION] + shard.lengths[POSITION] - 2
    ):
        tar[at] ^= 1
        path.write_bytes(tar)
        try:
            show(own_set)
            break
        except InputError:
            tar[at] ^= 1
    assert hashlib.sha256(tar).hexdigest() != shard.sha256, "no flipped bit passed the decoder"
    with pytest.raises(InputError, match="train-0.tar has sha256"):
        verify_shards(own_set, ["train"])


# A cache that drops a shard between naming its file and the reader's open.


class Forgetful:
    """Has each shard in a folder beside; removes it again after naming it, so many times."""

    def __init__(self, store: Path, folder: Path, *, losses: int) -> None:
        self._store, self._folder, self.losses = store, folder, losses

    def path(self, shard: Shard) -> Path:
        path = self._folder / shard.file
        path.write_bytes((self._store / shard.file).read_bytes())
        if self.losses:
            self.losses -= 1
            path.unlink()
        return path


@pytest.mark.parametrize("losses", [1, 2])
def test_a_shard_dropped_by_its_cache_is_asked_for_once_more(
    own_set: Manifest, tmp_path: Path, losses: int
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    source = Forgetful(own_set.folder, cache, losses=losses)
    images = ShardImages(
        dataclasses.replace(own_set, folder=cache, source=source), own_set.index("train"), WHOLE
    )
    if losses == 1:
        assert images.jpeg(0) == ShardImages(own_set, own_set.index("train"), WHOLE).jpeg(0)
    else:
        with pytest.raises(InputError, match="shard train-0.tar of synthetic cannot be read"):
            images.jpeg(0)


# A whole run.


def entries(run: Path) -> Iterator[dict]:
    return map(json.loads, (run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.dist
def test_a_run_names_each_damaged_image_once_and_counts_those_of_all_ranks(
    own_shard_set: Manifest, tmp_path: Path
) -> None:
    """Every image of two classes but the last is damaged; the shards' hashes are right."""
    built = with_images(
        own_shard_set,
        {f"00{label}_{view}": flipped_bits() for label in (2, 3) for view in range(5)},
    )
    done = launch(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "-m",
        "namr_dist.cli",
        "train",
        "homeware_conv4",
        "--run-dir",
        tmp_path / "run",
        *small_run(built, steps=8),
        "--set.train.log_every",
        2,
        "--set.train.tensorboard",
        "False",
        "--set.data.damaged_images",
        "replace",
    )
    assert done.returncode == 0, done.stderr
    # An epoch has two steps, a line in the log each.
    index, sampling = built.index("train"), Sampling(classes_per_batch=6, images_per_class=3)
    plans = [epoch_plan(index, sampling, seed=0, epoch=epoch).reshape(-1) for epoch in range(4)]
    planned = [
        [
            key
            for key in (index.keys[position] for position in plan_N)
            if key[:4] in ("002_", "003_") and key[4] != "5"
        ]
        for plan_N in plans
    ]
    so_far = [sum(planned[: epoch + 1], []) for epoch in range(4)]
    counts = [
        (entry["damaged_images"], entry["replacements"])
        for entry in entries(tmp_path / "run")
        if "damaged_images" in entry
    ]
    assert counts == [(len(set(keys)), len(keys)) for keys in so_far]
    warned = [
        line.split(".jpg in ")[0]
        for line in done.stderr.splitlines()
        if line.startswith("WARNING: ")
    ]
    assert sorted(warned) == sorted(f"WARNING: {key}" for key in set(so_far[-1]))
    assert f"damaged   {counts[-1][0]} images, replaced {counts[-1][1]} times" in done.stderr
