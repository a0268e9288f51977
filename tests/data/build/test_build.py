"""Building a shard set: every format, the same bytes always, broken files, and going on after a
kill."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import miniatures
import numpy as np
import pytest
import simplejpeg
import webdataset
import wids
from conftest import alive, picture
from PIL import Image

from namr_dist.cli.main import main
from namr_dist.data.build.build import BuildOptions, Built, build
from namr_dist.data.build.formats import folder, sop
from namr_dist.data.build.layout import shard_plans, with_validation
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.errors import InputError

SMALL = BuildOptions(shard_mib=0.02)
"""About six images a shard."""


def files(out: Path) -> dict[str, bytes]:
    """Every file of a set, hidden ones too, but for the record of what made it."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "build.json"}


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature of Stanford Online Products. Not to be changed."""
    return miniatures.sop(tmp_path_factory.mktemp("sop"))


@pytest.fixture(scope="module")
def whole(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """It, built in one go by this process."""
    return build(sop.read(products), tmp_path_factory.mktemp("whole"), SMALL)


@pytest.mark.parametrize(
    ("make", "words", "counts"),
    [
        (miniatures.sop, ["sop"], miniatures.SOP_COUNTS),
        (miniatures.inshop, ["inshop"], miniatures.INSHOP_COUNTS),
        (miniatures.cub, ["cub"], miniatures.CUB_COUNTS),
        (miniatures.cars_devkit, ["cars"], miniatures.CARS_COUNTS),
        (miniatures.vehicleid, ["vehicleid"], miniatures.VEHICLEID_COUNTS),
        (miniatures.user_folder, ["folder"], miniatures.USER_FOLDER_COUNTS),
        (miniatures.user_table, ["folder"], miniatures.USER_TABLE_COUNTS),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_format_becomes_a_verified_set(
    tmp_path: Path, make: Callable[[Path], Path], words: list[str], counts: dict[str, int]
) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    assert (
        main(
            [
                "shards",
                "build",
                *words,
                str(source),
                "--out",
                str(out),
                "--allow-counts",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    manifest = Manifest.load(out)
    assert verify_shards(manifest, manifest.splits, decode=True) == counts["images"]
    assert len(manifest.classes) == counts["classes"]
    for name in (*manifest.splits, *manifest.subsets):
        index = manifest.index(name)
        assert (len(index), len(np.unique(index.label_N))) == (
            counts[f"{name} images"],
            counts[f"{name} classes"],
        )
    roles = [role for shard in manifest.shards for role in shard.roles]
    assert (roles.count("query"), roles.count("gallery")) == (
        counts.get("query images", 0),
        counts.get("gallery images", 0),
    )
    assert set(files(out)) == {"manifest.json", *(shard.file for shard in manifest.shards)}


def test_readers_of_tars_see_all_that_is_known_of_an_image(
    products: Path, whole: Built, tmp_path: Path
) -> None:
    manifest, listing = whole.manifest, {image.key: image for image in sop.read(products).images}
    tars = [str(manifest.folder / shard.file) for shard in manifest.shards]
    samples = [sample for tar in tars for sample in webdataset.WebDataset(tar, shardshuffle=False)]
    assert {sample["__key__"] for sample in samples} == set(listing)
    for sample in samples:
        image, meta = listing[sample["__key__"]], json.loads(sample["json"])
        entry = manifest.class_by_label[image.label]
        assert meta == {
            "label": image.label,
            "name": entry.name,
            "category": entry.category,
            "source": image.path.relative_to(products).as_posix(),
        }
        assert sample["jpg"] == image.path.read_bytes()
    indexed = wids.ShardListDataset(
        [
            {"url": tar, "nsamples": len(shard.keys)}
            for tar, shard in zip(tars, manifest.shards, strict=True)
        ],
        cache_dir=str(tmp_path),
    )
    assert [indexed[number]["__key__"] for number in range(len(indexed))] == [
        sample["__key__"] for sample in samples
    ]
    assert (np.asarray(indexed[7][".jpg"]) == simplejpeg.decode_jpeg(samples[7]["jpg"])).all()


def test_roles_and_groups_are_in_the_manifest_and_in_the_tars(tmp_path: Path) -> None:
    table = miniatures.user_table(tmp_path / "source")
    listing = folder.read(table)
    manifest = build(listing, tmp_path / "out", BuildOptions()).manifest
    expected = {image.key: (image.role, image.group) for image in listing.images}
    assert {role for role, _ in expected.values()} == {"", "query", "gallery"}
    for shard in manifest.shards:
        roles = shard.roles or [""] * len(shard.keys)
        assert (
            dict(zip(shard.keys, zip(roles, shard.groups, strict=True), strict=True)).items()
            <= expected.items()
        )
        for sample in webdataset.WebDataset(str(manifest.folder / shard.file), shardshuffle=False):
            meta = json.loads(sample["json"])
            assert (meta.get("role", ""), meta["group"]) == expected[sample["__key__"]]


def test_classes_are_whole_and_shuffled_over_shards_of_like_size(products: Path) -> None:
    listing = sop.read(products)
    size_of = {image.key: 10_000 for image in listing.images}
    plans = shard_plans(listing, size_of, target_bytes=65_000, seed=0)
    order = [image.label for plan in plans for image in plan.images]
    runs = [
        label
        for position, label in enumerate(order)
        if position == 0 or order[position - 1] != label
    ]
    assert len(runs) == len(set(runs)) == 12, "a class is torn"
    assert {plan.file: len(plan.images) for plan in plans}.keys() == {
        f"{split}-{number:06d}.tar" for split in ("train", "test") for number in range(4)
    }
    assert all(2 <= len(plan.images) <= 8 for plan in plans)
    assert order != [
        image.label
        for plan in shard_plans(listing, size_of, target_bytes=65_000, seed=1)
        for image in plan.images
    ]
    assert len(shard_plans(listing, size_of, target_bytes=10**9, seed=0)) == 2


def test_validation_classes_come_from_training_alone(products: Path) -> None:
    listing = sop.read(products)
    drawn = with_validation(listing, share=1 / 3, seed=0)
    split_of = {entry.label: entry.split for entry in drawn.classes}
    before = {entry.label: entry.split for entry in listing.classes}
    assert list(split_of.values()).count("val") == 2
    assert all(
        split_of[label] == before[label] or (before[label], split_of[label]) == ("train", "val")
        for label in before
    )
    assert all(image.split == split_of[image.label] for image in drawn.images)
    others = {
        tuple(
            entry.label
            for entry in with_validation(listing, share=1 / 3, seed=seed).classes
            if entry.split == "val"
        )
        for seed in range(20)
    }
    assert len(others) > 5
    with pytest.raises(InputError, match="--validation is 0.01, which is 0 of 6 training classes"):
        with_validation(listing, share=0.01, seed=0)
    with pytest.raises(InputError, match="has a split val of its own"):
        with_validation(drawn, share=0.5, seed=0)


def test_two_workers_write_the_same_bytes_as_one(
    products: Path, whole: Built, tmp_path: Path
) -> None:
    again = build(sop.read(products), tmp_path, SMALL, workers=2)
    assert files(tmp_path) == files(whole.manifest.folder)
    assert again.treated == whole.treated == {"kept": 42}


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 of the command alone, as the kernel does it, once the first of many shards is
    finished."""
    source = miniatures.cars_devkit(tmp_path / "source")
    words = [
        "shards",
        "build",
        "cars",
        str(source),
        "--allow-counts",
        "--shard-mib",
        "0.01",
        "--out",
    ]
    command = [
        sys.executable,
        "-m",
        "namr_dist.cli",
        *words,
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("out/.*.tar.json")):
            time.sleep(0.001)
        assert process.poll() is None, "the build ended before it could be killed"
        children = [
            int(word)
            for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        process.send_signal(signal.SIGKILL)
    assert (
        process.returncode == -signal.SIGKILL and not (tmp_path / "out" / "manifest.json").exists()
    )
    deadline = time.monotonic() + 60
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(children) >= 2 and not any(map(alive, children))
    finished = {
        path.name[1:-5]: os.stat(tmp_path / "out" / path.name[1:-5]).st_mtime_ns
        for path in (tmp_path / "out").glob(".*.tar.json")
    }
    (tmp_path / "out" / ".train-000001.tar.0123456789ab.tmp").write_bytes(b"half a shard")
    assert main([*words, str(tmp_path / "out"), "--workers", "1"]) == 0
    assert main([*words, str(tmp_path / "unbroken"), "--workers", "1"]) == 0
    assert files(tmp_path / "out") == files(tmp_path / "unbroken")
    assert finished and all(
        os.stat(tmp_path / "out" / file).st_mtime_ns == then for file, then in finished.items()
    )


@pytest.fixture
def own_products(products: Path, tmp_path: Path) -> Path:
    """The miniature, for a test that damages it."""
    return shutil.copytree(products, tmp_path / "own")


def damage(source: Path) -> dict[str, str]:
    """Break one image in each way; returns what is wrong by path."""
    images = sorted(source.rglob("*.JPG"))
    ways = {
        "empty": b"",
        "not an image": b"Not found\n",
        "truncated": images[2].read_bytes()[:-300],
    }
    broken = dict(zip(ways, images, strict=False))
    for kind, path in broken.items():
        path.write_bytes(ways[kind])
    return {path.relative_to(source).as_posix(): kind for kind, path in broken.items()}


def reasons(table: Path) -> dict[str, str]:
    with open(table, newline="") as file:
        return {row["path"]: row["reason"].split(" (")[0] for row in csv.DictReader(file)}


def test_broken_files_are_all_named_then_left_out_on_request(
    own_products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = damage(own_products), tmp_path / "out"
    words = [
        "shards",
        "build",
        "sop",
        str(own_products),
        "--out",
        str(out),
        "--allow-counts",
        "--shard-mib",
        "0.02",
        "--workers",
        "1",
    ]
    assert main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        "3 of 42 images are broken (1 empty, 1 not an image, 1 truncated)" in told
        and "--skip-broken" in told
    )
    assert all(f"{path} ({kind})" in told for path, kind in broken.items())
    assert not (out / "manifest.json").exists() and not (out / "skipped.csv").exists()
    assert str(out / "broken.csv") in told and reasons(out / "broken.csv") == broken
    tars = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert main([*words, "--skip-broken"]) == 0
    assert "left out: 1 empty, 1 not an image, 1 truncated" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == tars, (
        "a finished shard was made again"
    )
    manifest = Manifest.load(out)
    assert verify_shards(manifest, manifest.splits, decode=True) == 39
    assert reasons(out / "skipped.csv") == broken and not (out / "broken.csv").exists()


def test_a_repaired_file_makes_its_shard_anew_and_no_other(
    own_products: Path, tmp_path: Path, whole: Built
) -> None:
    damaged, out = own_products / "bicycle_final" / "111085122872_0.JPG", tmp_path / "out"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:100] + bytes(len(good) - 100))
    with pytest.raises(InputError, match="1 of 42 images are broken"):
        build(sop.read(own_products), out, SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    damaged.write_bytes(good)
    build(sop.read(own_products), out, SMALL)
    changed = [name for name, then in before.items() if (out / name).stat().st_mtime_ns != then]
    assert len(changed) == 1 and len(before) > 4
    assert files(out) == files(whole.manifest.folder)


def test_a_repaired_file_may_keep_its_size_and_time(
    own_products: Path, tmp_path: Path, whole: Built
) -> None:
    damaged, out = own_products / "bicycle_final" / "111085122872_0.JPG", tmp_path / "out"
    good, then = damaged.read_bytes(), damaged.stat().st_mtime_ns
    for data, broken in ((good[:100] + bytes(len(good) - 100), True), (good, False)):
        damaged.write_bytes(data)
        os.utime(damaged, ns=(then, then))
        with pytest.raises(InputError, match="1 of 42") if broken else contextlib.nullcontext():
            build(sop.read(own_products), out, SMALL)
    assert files(out) == files(whole.manifest.folder)


def test_what_the_system_would_not_read_is_tried_again(own_products: Path, tmp_path: Path) -> None:
    (own_products / "bicycle_final" / "111085122872_0.JPG").write_bytes(b"")
    listing, out = sop.read(own_products), tmp_path / "out"
    with pytest.raises(InputError, match="1 empty"):
        build(listing, out, SMALL)
    path = next(path for path in out.glob(".*.tar.json") if '"empty"' in path.read_text())
    path.write_text(path.read_text().replace('"empty"', '"unreadable"'))
    assert build(listing, out, SMALL, skip_broken=True).skipped == {"empty": 1}


def test_want_of_memory_is_no_broken_file(tmp_path: Path) -> None:
    source = miniatures.user_folder(tmp_path / "source")
    Image.new("L", (8_000, 8_000)).save(source / "bench" / "large.png", compress_level=1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, before[1]))
    try:
        with pytest.raises(
            InputError,
            match="large.png needs more memory than there is; give the same command again",
        ):
            build(folder.read(source), tmp_path / "out", BuildOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_list_of_files_that_were_skipped_does_not_outlive_them(
    own_products: Path, tmp_path: Path
) -> None:
    """A build that skips one is killed before its manifest; then the file is repaired."""
    damaged, out = own_products / "bicycle_final" / "111085122872_0.JPG", tmp_path / "out"
    good = damaged.read_bytes()
    damaged.write_bytes(b"")
    with pytest.raises(InputError, match="1 empty"):
        build(sop.read(own_products), out, SMALL)
    (out / "broken.csv").rename(out / "skipped.csv")
    damaged.write_bytes(good)
    build(sop.read(own_products), out, SMALL, skip_broken=True)
    assert not (out / "skipped.csv").exists()


def test_a_class_without_a_whole_image_is_named_and_left_out(
    own_products: Path, tmp_path: Path
) -> None:
    listing = sop.read(own_products)
    for image in listing.images:
        if image.label == 3:
            image.path.write_bytes(b"")
    built = build(listing, tmp_path / "out", SMALL, skip_broken=True)
    assert built.lost == ("3",) and built.skipped == {"empty": 5}
    assert {entry.label for entry in Manifest.load(tmp_path / "out").classes} == {
        1,
        2,
        4,
        5,
        6,
        *range(11319, 11325),
    }


def test_subsets_lose_what_is_left_out(tmp_path: Path) -> None:
    source = miniatures.vehicleid(tmp_path / "source")
    (source / "image" / "0303000.jpg").write_bytes(b"")
    assert (
        main(
            [
                "shards",
                "build",
                "vehicleid",
                str(source),
                "--out",
                str(tmp_path / "out"),
                "--allow-counts",
                "--skip-broken",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    manifest = Manifest.load(tmp_path / "out")
    assert [len(manifest.index(name)) for name in ("test_800", "test_1600", "test_2400")] == [
        5,
        8,
        15,
    ]


def test_images_are_normalised_and_counted(tmp_path: Path) -> None:
    source = miniatures.user_folder(tmp_path / "source")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(9, 9, size=80)).save(source / "bench" / "large.jpg", exif=exif)
    (source / "bench" / "trailer.jpg").write_bytes(
        (source / "bench" / "view 0.jpg").read_bytes() + bytes(500)
    )
    listing = folder.read(source)
    built = build(listing, tmp_path / "out", BuildOptions())
    assert built.treated == {"converted": 18, "cut": 1, "kept": 6, "turned": 1}
    smaller = dataclasses.replace(SMALL, encoding=dataclasses.replace(SMALL.encoding, size=40))
    assert build(listing, tmp_path / "small", smaller).treated == {
        "converted": 18,
        "cut": 1,
        "kept": 6,
        "shrunk": 1,
    }


def test_a_finished_set_is_left_alone(products: Path, whole: Built, tmp_path: Path) -> None:
    out = shutil.copytree(whole.manifest.folder, tmp_path / "out")
    then = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = build(sop.read(products), out, SMALL)
    assert again.was_there and not whole.was_there
    assert (again.treated, again.skipped, again.lost) == (whole.treated, {}, ())
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == then


def test_a_finished_set_without_one_of_its_tars_is_no_set(
    products: Path, whole: Built, tmp_path: Path
) -> None:
    out = shutil.copytree(whole.manifest.folder, tmp_path / "out")
    tar = out / whole.manifest.shards[2].file
    os.truncate(tar, 1024)
    with pytest.raises(
        InputError, match=f"{tar.name} has 1024 bytes, its manifest says .*; remove the folder and"
    ):
        build(sop.read(products), out, SMALL)
    tar.unlink()
    with pytest.raises(
        InputError,
        match=f"is a finished set, but {tar.name} is missing; remove the folder and build",
    ):
        build(sop.read(products), out, SMALL)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda listing, options: (listing, dataclasses.replace(options, seed=1)),
            "other options .seed 0, here 1",
        ),
        (
            lambda listing, options: (
                dataclasses.replace(listing, images=listing.images[1:]),
                options,
            ),
            "another listing",
        ),
    ],
)
def test_a_folder_of_another_build_is_refused(
    products: Path, whole: Built, change: Callable, named: str
) -> None:
    before = files(whole.manifest.folder)
    listing, options = change(sop.read(products), SMALL)
    with pytest.raises(InputError, match=named):
        build(listing, whole.manifest.folder, options)
    assert files(whole.manifest.folder) == before


def test_a_finished_set_of_files_that_have_changed_is_refused(
    own_products: Path, tmp_path: Path
) -> None:
    build(sop.read(own_products), tmp_path / "out", SMALL)
    os.utime(own_products / "bicycle_final" / "111085122872_0.JPG", (1, 1))
    with pytest.raises(InputError, match="files of its source have changed"):
        build(sop.read(own_products), tmp_path / "out", SMALL)


def test_a_folder_that_no_build_made_is_refused(products: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is there and not from a build; give a new folder"):
        build(sop.read(products), tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_small_a_disk_is_told_before(
    products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(
        InputError, match="need about 0 MiB, .* free; free some space or give another folder"
    ):
        build(sop.read(products), tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_two_builds_do_not_share_a_folder(products: Path, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another build is writing"):
        build(sop.read(products), tmp_path, SMALL)
    os.close(handle)
    assert build(sop.read(products), tmp_path, SMALL).treated == {"kept": 42}


def test_a_shard_without_a_whole_image_is_left_out(own_products: Path, tmp_path: Path) -> None:
    listing, out = sop.read(own_products), tmp_path / "out"
    for image in listing.images:
        if image.split == "train":
            image.path.write_bytes(b"no image")
    built = build(listing, out, SMALL, skip_broken=True)
    assert (
        built.manifest.splits == ("test",)
        and built.skipped == {"not an image": 21}
        and len(built.lost) == 6
    )
    assert set(files(out)) == {
        "manifest.json",
        "skipped.csv",
        *(shard.file for shard in built.manifest.shards),
    }
    for image in listing.images:
        image.path.write_bytes(b"no image")
    with pytest.raises(InputError, match="no image of sop is whole"):
        build(listing, tmp_path / "none", SMALL, skip_broken=True)
