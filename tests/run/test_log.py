"""A run's log is read in one way by all: bad lines are skipped and counted, and no value stops a
reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from namr_dist.errors import InputError
from namr_dist.results.evaluate_run import _training_figures
from namr_dist.run.log import (
    GrowingLog,
    count_of,
    cut_log,
    figures_of,
    number_of,
    read_log,
    text_of,
    time_of,
)

GOOD = [
    {"step": 1, "loss": 2.5, "time_s": 0.5},
    {"step": 2, "loss": float("nan"), "time_s": 1.0},
    {"step": 2, "val": {"R@1": 50.0}, "time_s": 1.5},
    {"step": 3, "img_per_s": 40.0, "time_s": 2.0},
]
BAD = [
    b"no JSON",
    b'{"step": 4, "lo',
    b"[1, 2]",
    b"7",
    b"null",
    b"{}",
    b'{"loss": 1.0}',
    b'{"step": 1.0}',
    b'{"step": "1"}',
    b'{"step": true}',
    b'{"step": null}',
    b'{"step": 1, "host": "\xff"}',
    "{}".encode("utf-16"),
    b"\x00\x00",
    b"[" * 100_000,
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
]
WRONG: list[Any] = [None, "x", [1], {"a": 1}, True, float("nan"), float("inf")]


def lines(*entries: dict[str, Any]) -> list[bytes]:
    return [json.dumps(entry).encode() for entry in entries]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_good_lines_are_read_and_empty_ones_are_nothing(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(b"\n".join([b"", *lines(*GOOD), b"  ", b"\r", b""]))
    log = read_log(path)
    # By their texts, for NaN is not itself.
    assert repr(log.entries) == repr(tuple(GOOD)) and log.unreadable == 0
    log.warn()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_anywhere_is_skipped_and_counted_by_all_readers(path: Path, bad: bytes) -> None:
    first, *rest = lines(*GOOD)
    for content in ([first, bad, *rest, b""], [bad, first, *rest, b""], [first, *rest, bad]):
        path.write_bytes(b"\n".join(content))
        log = read_log(path)
        assert repr(log.entries) == repr(tuple(GOOD)) and log.unreadable == 1
        growing = GrowingLog(path)
        assert repr(growing.read()) == repr((True, GOOD))
        assert growing.unreadable == (content[-1] == b"")  # else it is still being written
        cut = cut_log(path, 2)
        assert repr(cut.entries) == repr(tuple(GOOD[:3])) and cut.unreadable == 1
        assert path.read_bytes() == b"".join(line + b"\n" for line in lines(*GOOD[:3]))
        assert read_log(path).unreadable == 0


def test_the_number_of_bad_lines_is_told_once(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(b"\n".join([*BAD, *lines(GOOD[0]), b""]))
    read_log(path).warn()
    assert (
        capsys.readouterr().err
        == f"WARNING: {len(BAD)} lines of {path} could not be read; left out\n"
    )
    path.write_bytes(b"{")
    read_log(path).warn()
    assert capsys.readouterr().err == f"WARNING: 1 line of {path} could not be read; left out\n"


def test_a_log_that_is_missing(path: Path) -> None:
    with pytest.raises(InputError, match="metrics.jsonl is missing: train the run first"):
        read_log(path)
    assert cut_log(path, 3).entries == () and not path.exists()
    assert GrowingLog(path).read() == (True, [])


def test_a_line_without_its_end_is_not_whole(path: Path) -> None:
    """It would run into the next one that is written."""
    path.write_bytes(b"\n".join(lines(*GOOD)))
    assert len(read_log(path).entries) == len(cut_log(path, 3).entries) == 3
    assert path.read_bytes().endswith(b"}\n")


def test_a_growing_log_is_read_once(path: Path) -> None:
    growing = GrowingLog(path)
    path.write_bytes(lines(GOOD[0])[0] + b"\n" + b"{\n{")
    assert growing.read() == (True, [GOOD[0]]) and growing.unreadable == 1
    with open(path, "ab") as file:
        file.write(b"}\n" + lines(GOOD[2])[0] + b"\n")
    assert growing.read() == (False, [GOOD[2]]) and growing.unreadable == 2
    assert growing.read() == (False, [])
    path.write_bytes(b"")
    assert growing.read() == (True, []) and growing.unreadable == 0 and growing.changed is None


@pytest.mark.parametrize("wrong", WRONG)
def test_fields_of_wrong_types_are_missing(wrong: Any) -> None:
    entry = {
        "step": 1,
        "time_s": wrong,
        "loss": wrong,
        "val": {"R@1": wrong, "MAP@R": 3},
        "slowest_rank": wrong,
    }
    assert number_of(entry, "loss") is time_of(entry) is count_of(entry, "slowest_rank") is None
    assert figures_of(entry) == {"MAP@R": 3}
    if not isinstance(wrong, dict):
        assert figures_of({"val": wrong}) is None
    assert (text_of(entry, "loss") is None) == (wrong != "x")
    assert text_of({"host": "a\x1b[2J"}, "host") is None and time_of({"time_s": -1}) is None


def test_evaluation_and_resumption_pass_over_wrong_values(path: Path) -> None:
    wrong = [{"step": 2, "loss": value, "time_s": value, "img_per_s": value} for value in WRONG]
    path.write_bytes(b"".join(line + b"\n" for line in lines(*GOOD, *wrong)))
    assert _training_figures(path.parent, {"steps": 3}) == {
        "steps": 3,
        "seconds": 2.0,
        "img_per_s": 40.0,
    }
    assert max(time_of(entry) or 0.0 for entry in cut_log(path, 2).entries) == 1.5
    path.write_bytes(b"".join(line + b"\n" for line in lines(*wrong)))
    assert _training_figures(path.parent, {"steps": 3}) == {
        "steps": 3,
        "seconds": None,
        "img_per_s": None,
    }
