"""`namr shards verify`: every kind of damage is named, all of them at once."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import simplejpeg
from conftest import make_shards, picture

from namr_dist.cli.main import main
from namr_dist.data.shardset.manifest import Manifest, Shard
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.data.shardset.verify import unnamed_tars, verify


def rewrite(
    manifest: Manifest, change: Callable[[list[tuple[str, bytes]]], None], number: int = 0
) -> Manifest:
    """Change a tar's members by tarfile alone; the manifest gets its new size, hash and, where they
    exist, places."""
    shard = manifest.shards[number]
    path = manifest.folder / shard.file
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    with tarfile.open(path) as tar:
        span_of = {member.name: (member.offset_data, member.size) for member in tar}
    spans = [span_of.get(f"{key}.jpg", (0, 512)) for key in shard.keys]
    return with_shard(
        manifest,
        number,
        offsets=tuple(at for at, _ in spans),
        lengths=tuple(size for _, size in spans),
    )


def with_shard(manifest: Manifest, number: int, **changes: object) -> Manifest:
    """The manifest with a changed entry that has its tar's true size, hash and checksums."""
    content = (manifest.folder / manifest.shards[number].file).read_bytes()
    shard: Shard = dataclasses.replace(  # type: ignore[arg-type]
        manifest.shards[number],
        **{"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **changes},
    )
    spans = zip(shard.offsets, shard.lengths, strict=True)
    crc32 = tuple(zlib.crc32(content[at : at + length]) for at, length in spans)
    shard = dataclasses.replace(shard, crc32=crc32)
    return dataclasses.replace(
        manifest, shards=(*manifest.shards[:number], shard, *manifest.shards[number + 1 :])
    )


def test_a_good_set_has_no_problems(shard_set: Manifest) -> None:
    told: list[int] = []
    assert verify(shard_set, advance=told.append).problems == []
    assert told == [36, 36, 12, 12, 18, 18]
    assert unnamed_tars(shard_set) == []


def test_all_problems_are_told_together(own_shard_set: Manifest) -> None:
    paths = [own_shard_set.folder / shard.file for shard in own_shard_set.shards]
    paths[0].unlink()
    os.truncate(paths[1], paths[1].stat().st_size - 512)
    end = own_shard_set.shards[2].offsets[1] + own_shard_set.shards[2].lengths[1]
    content = bytearray(paths[2].read_bytes())
    content[end - 300 : end - 2] = bytes(298)
    paths[2].write_bytes(content)
    problems = verify(own_shard_set).problems
    assert [line.split(";")[0].split(" ")[1] for line in problems[:3]] == [
        str(path) for path in paths[:3]
    ]
    assert (
        "is missing" in problems[0]
        and "bytes, its manifest says" in problems[1]
        and "has sha256" in problems[2]
    )
    assert len(problems) == 4 and problems[3].startswith(
        f"{own_shard_set.shards[2].keys[1]}.jpg in "
    )
    assert "cannot be decoded" in problems[3]
    assert len(verify(own_shard_set, decode=False).problems) == 3


def set_label(members: list[tuple[str, bytes]]) -> None:
    members[3] = (members[3][0], json.dumps({"label": 99}).encode())


def no_json(members: list[tuple[str, bytes]]) -> None:
    members[3] = (members[3][0], b"label: 0")


def drop_meta(members: list[tuple[str, bytes]]) -> None:
    del members[3]


def rename(members: list[tuple[str, bytes]]) -> None:
    members[2] = ("other.jpg", members[2][1])


def add(members: list[tuple[str, bytes]]) -> None:
    members.append(("README", b"x"))


def repeat(members: list[tuple[str, bytes]]) -> None:
    members.append(members[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_label, ["000_1.json in {path} says label 99, its manifest says 0"]),
        (no_json, ["000_1.json in {path} says label None, its manifest says 0"]),
        (drop_meta, ["{path} has no 000_1.json"]),
        (
            rename,
            [
                "000_1.jpg in {path} is not a JPEG",
                "{path} has no 000_1.jpg",
                "{path} holds other.jpg, which its",
            ],
        ),
        (add, ["{path} holds README, which its manifest does not name"]),
        (repeat, ["{path} holds 000_0.jpg twice"]),
    ],
)
def test_the_tar_itself_is_compared(
    own_shard_set: Manifest, change: Callable, named: list[str]
) -> None:
    changed = rewrite(own_shard_set, change)
    expected = [
        text.format(path=own_shard_set.folder / own_shard_set.shards[0].file) for text in named
    ]
    problems = verify(changed).problems
    assert len(problems) == len(expected)
    for line, text in zip(problems, expected, strict=True):
        assert line.startswith(text)


def test_two_exchanged_images_are_noticed(own_shard_set: Manifest) -> None:
    """Both ranges hold whole images, so only the tar's headers can tell."""
    shard = own_shard_set.shards[0]
    swapped = [1, 0, *range(2, len(shard.keys))]
    changed = with_shard(
        own_shard_set,
        0,
        offsets=tuple(shard.offsets[position] for position in swapped),
        lengths=tuple(shard.lengths[position] for position in swapped),
    )
    problems = verify(changed).problems
    assert len(problems) == 2 and all("is at byte" in line for line in problems)
    assert str(shard.offsets[0]) in problems[0] and str(shard.offsets[1]) in problems[0]


def test_what_is_no_tar_is_named(own_shard_set: Manifest) -> None:
    path = own_shard_set.folder / own_shard_set.shards[0].file
    content = bytearray(path.read_bytes())
    content[:512] = b"x" * 512
    path.write_bytes(content)
    problems = verify(with_shard(own_shard_set, 0)).problems
    assert len(problems) == 1 and f"{path} cannot be read as a tar" in problems[0]


def test_an_image_in_two_splits_is_named(own_shard_set: Manifest) -> None:
    own, first = own_shard_set.shards[4], own_shard_set.shards[0]  # of test and of train
    stolen = (own_shard_set.folder / first.file).read_bytes()[
        first.offsets[2] : first.offsets[2] + first.lengths[2]
    ]
    samples = [
        Sample(key=key, label=label, jpeg=simplejpeg.encode_jpeg(picture(label, position + 100)))
        for position, (key, label) in enumerate(zip(own.keys, own.labels, strict=True))
    ]
    samples[3] = dataclasses.replace(samples[3], jpeg=stolen)
    again = write_shard(
        own_shard_set.folder, own.file, own.split, samples, own_shard_set.class_by_label
    )
    changed = dataclasses.replace(
        own_shard_set, shards=(*own_shard_set.shards[:4], again, own_shard_set.shards[5])
    )
    verified = verify(changed)
    assert verified.shared == [
        f"{first.keys[2]}.jpg of train and {own.keys[3]}.jpg of test are the same image"
    ]
    assert not verified.problems


def test_the_command_tells_twenty_and_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_shards(tmp_path / "set", classes={"train": 6, "test": 2})
    shard = manifest.shards[0]
    with_shard(
        manifest,
        0,
        labels=(1,) * 6 + (0,) * 6 + shard.labels[12:],
        offsets=shard.offsets[:12] + tuple(at + 1 for at in shard.offsets[12:]),
    ).save()
    (manifest.folder / "train-9.tar").write_bytes(b"")
    assert main(["shards", "verify", str(manifest.folder)]) == 2
    said = capsys.readouterr()
    warning, head, *lines = said.err.splitlines()
    assert (
        warning.startswith("WARNING: ")
        and "train-9.tar is not in the manifest" in warning
        and not said.out
    )
    # 12 labels, and 6 images that begin a byte late: no JPEGs, and not where the tar says.
    assert head == f"namr: error: 24 problems in {manifest.folder}:"
    assert len(lines) == 21 and lines[-1] == "  …"
    assert main(["shards", "verify", str(manifest.folder), "--json"]) == 2
    as_json = json.loads(capsys.readouterr().out)
    assert len(as_json["problems"]) == 24 and as_json["unnamed_tars"] == ["train-9.tar"]
