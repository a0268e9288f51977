"""Ranks that meet before there is a process group: all go on, or all end, and say why once."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import Program, start_parent

pytestmark = pytest.mark.dist

# A word for each rank says what becomes of it: "ends", "waits", "groups", which waits for the
# others in making a process group, "dies" before it, or the name of a mistake. One that is "late"
# takes 2 s for the last stage, when the others look every 0.5 s; "hurried" gives up on it before,
# "patient" does not, though others would.
RANK = """
import os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from namr_dist.errors import InputError, ReportedError
from namr_dist.parallel import meeting as module
from namr_dist.parallel.meeting import Meeting
from namr_dist.parallel.ranks import discover

rank = discover()
word = sys.argv[1 + rank.rank]
how = {}
if word == "hurried":
    how = {"longest": timedelta(seconds=0.5)}
if word == "patient":
    how = {"longest": None}
    module._TIMEOUT = timedelta(seconds=0.5)  # of the store, too
try:
    meeting = Meeting(rank)
    print("here", flush=True)
    for stage in range(2):
        with meeting.all_or_none(**how if stage else {}):
            if word == "waits":
                time.sleep(1000)
            if word == "late" and stage:
                time.sleep(2)
            if word not in ("ends", "groups", "dies", "late", "hurried", "patient"):
                raise InputError(word)
    with meeting.watched():
        if word == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "groups":
            dist.init_process_group("gloo")
except ReportedError as error:
    print(f"namr: error: {error}")
    sys.exit(error.exit_code)
print("met")
"""


@contextlib.contextmanager
def met(folder: Path, *words: str, port: int | None = None) -> Iterator[list[Program]]:
    """A rank for each word, at the port or at a free one. All that still run at the end are
    killed."""
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    (folder / "rank.py").write_text(RANK)
    start_parent()
    common = {"WORLD_SIZE": str(len(words)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Program(
            folder / "rank.py",
            *words,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            output=folder / f"said-{rank}",
        )
        for rank in range(len(words))
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def ends(ranks: list[Program]) -> tuple[list[int], str]:
    """Exit codes, and what all said."""
    codes = [rank.wait(240) for rank in ranks]
    return codes, "".join(rank.said() for rank in ranks)


def until_here(rank: Program) -> None:
    give_up = time.monotonic() + 120
    while "here\n" not in rank.said():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_all_are_here(tmp_path: Path) -> None:
    """Also for one that looks when the first, which has the store, could have ended."""
    with met(tmp_path, "late", "ends", "patient") as ranks:
        codes, said = ends(ranks)
    assert codes == [0, 0, 0] and said.count("met") == 3, said


def test_one_that_takes_too_long_ends_all(tmp_path: Path) -> None:
    with met(tmp_path, "late", "hurried") as ranks:
        codes, said = ends(ranks)
    assert codes == [74, 74] and "met" not in said
    assert said.count("namr: error: ") == 1 and f"(pid {ranks[0].pid}) did not come within" in said


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("wrong", "wrong", "wrong"), 1),
        (("ends", "ends", "wrong"), 1),
        (("wrong", "ends", "other"), 2),
    ],
)
def test_each_mistake_is_said_once_and_all_end_alike(
    tmp_path: Path, words: tuple[str, ...], lines: int
) -> None:
    with met(tmp_path, *words) as ranks:
        codes, said = ends(ranks)
    assert codes == [2, 2, 2] and "met" not in said and "Traceback" not in said
    told = re.findall(r"namr: error: (\w+) \(rank \d on ", said)
    # One that comes late ends with the others, and never meets its own mistake.
    assert told and len(told) == len(set(told)) <= lines and set(told) <= set(words)


def test_one_that_dies_ends_the_others(tmp_path: Path) -> None:
    """Without a launcher that would."""
    with met(tmp_path, "ends", "waits") as ranks:
        until_here(ranks[1])
        ranks[1].kill()
        codes, said = ends(ranks)
    assert codes == [74, -signal.SIGKILL]
    assert f"(pid {ranks[1].pid}) has ended before training began" in said


def test_a_first_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    with met(tmp_path, "waits", "ends") as ranks:
        until_here(ranks[1])
        ranks[0].kill()
        codes, said = ends(ranks)
    assert codes == [-signal.SIGKILL, 74]
    assert said.count("namr: error: ") == 1 and "Traceback" not in said


@pytest.mark.parametrize("words", [("groups", "dies", "groups"), ("dies", "groups")])
def test_one_that_dies_while_the_process_group_is_made_ends_the_others(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """They would wait for it half an hour, the first rank among them or not."""
    with met(tmp_path, *words) as ranks:
        codes, said = ends(ranks)
    dead = words.index("dies")
    assert [code for rank, code in enumerate(codes) if rank != dead] == [74] * (len(words) - 1)
    assert said.count("namr: error: ") == 1 and "start all ranks again" in said, said


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with met(tmp_path, "ends", "ends", port=port) as ranks:
            codes, said = ends(ranks[:1])
    assert codes == [2] and f"port {port} of 127.0.0.1" in said and "set MASTER_PORT" in said
    assert "Traceback" not in said
