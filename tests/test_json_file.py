"""JSON that others wrote."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from namr_dist.config import Config
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.json_file import MOST_DEPTH, parse_json
from namr_dist.reproduce.cells import name_of
from namr_dist.results import export
from namr_dist.results.record import read_run
from namr_dist.run.log import read_log

DEEP = "[" * 100_000


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_depth() -> None:
    assert parse_json(nested(MOST_DEPTH), "x", "y") is not None
    for text in (
        nested(MOST_DEPTH + 1),
        nested(3000),
        DEEP,
        '{"a":' * (MOST_DEPTH + 1) + "1" + "}" * 65,
    ):
        with pytest.raises(InputError, match="^x is not JSON .*; y$"):
            parse_json(text, "x", "y")


@pytest.mark.parametrize(
    "text",
    ["", "{", b"\xff", "1" * 41, "-" + "1" * 5000, '"\\ud800"', '{"\\ud800a": 1}', "\ufeff{}"],
)
def test_what_is_refused(text: str | bytes) -> None:
    with pytest.raises(InputError, match="^x is not JSON .*; y$"):
        parse_json(text, "x", "y")


@pytest.mark.parametrize(
    "value", [2**64, -(2**63), "\U0001f600", "\udc80", {"1" * 50: 1.5}, [None, True]]
)
def test_what_is_read(value: object) -> None:
    assert parse_json(json.dumps(value), "x", "y") == value


def read_manifest(path: Path) -> object:
    return Manifest.load(path.parent)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("manifest.json", read_manifest),
        ("config.json", Config.load),
        ("config.json", lambda path: export.load(path.parent)),
        ("config.json", lambda path: read_run(path.parent)),
        ("cell.json", lambda path: name_of(path.parent)),
    ],
)
def test_no_reader_recurses(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / name
    for text in (DEEP, '{"a":' * 3000 + "1" + "}" * 3000):
        path.write_text(text)
        with pytest.raises(InputError, match=name):
            read(path)


def test_a_line_of_a_log_that_is_too_deep_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "a": ' + nested(200) + "}\n" + DEEP + "\n")
    log = read_log(path)
    assert [entry["step"] for entry in log.entries] == [1] and log.unreadable == 2


def peak(read: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("piece", ["[]", "{}", "[[]]", '{"":[]}'])
def test_lists_of_nothing_are_refused_before_they_take_memory(tmp_path: Path, piece: str) -> None:
    """Parsed, each takes about thirty times its bytes."""
    path = tmp_path / "manifest.json"
    count = 1_200_000 // (len(piece) + 1)
    path.write_text('{"format":"namr-shards/1","classes":[' + ",".join([piece] * count) + "]}")

    def read() -> None:
        with pytest.raises(InputError, match="hardly anything else"):
            Manifest.load(tmp_path)

    assert peak(read) < 5 * path.stat().st_size


@pytest.mark.parametrize(("images", "classes", "times"), [(20_000, 1_500, 9), (9_000, 9_000, 6.5)])
def test_a_manifest_takes_a_few_times_its_bytes(
    tmp_path: Path, images: int, classes: int, times: float
) -> None:
    path = tmp_path / "manifest.json"
    shard = {
        "file": "a.tar",
        "split": "train",
        "bytes": 10**10,
        "sha256": "0" * 64,
        "keys": [f"{image:07d}_{image * 7919 % 10**8:08d}" for image in range(images)],
        "labels": [image % classes for image in range(images)],
        "offsets": [512 + 29_184 * image for image in range(images)],
        "lengths": [20_000 + image % 9_000 for image in range(images)],
    }
    entries = [
        {"label": label, "name": f"class {label}", "category": "", "split": "train"}
        for label in range(classes)
    ]
    body = {"format": "namr-shards/1", "name": "n", "description": "d"}
    path.write_text(json.dumps({**body, "classes": entries, "shards": [shard]}))
    assert peak(lambda: Manifest.load(tmp_path)) < times * path.stat().st_size


def test_the_estimate_refuses_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"values": list(range(300_000))})
    assert parse_json(text, "x", "y")
    monkeypatch.setattr("namr_dist.json_file.MOST_MEMORY", 1 << 20)
    with pytest.raises(InputError, match=r"x is not JSON \(to read it would take about 0.0 GiB"):
        parse_json(text, "x", "y")
