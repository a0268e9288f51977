"""Real processes that hang, freeze, fail and are killed: the report names the right rank and
phase."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY, small_run
from training_runs import Program, start_parent

from namr_dist.config import Config, TrainConfig
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.train.watchdog import EXIT_CODE, Place, backend_timeout, describe

# Steps of 20 ms under a watchdog of 3 s. A rank that is named hangs in its third step, or raises.
STEPS = """
import sys, time
import torch
import torch.distributed as dist
from namr_dist.errors import InputError
from namr_dist.parallel.ranks import discover
from namr_dist.train.phases import Phases
from namr_dist.train.signals import StopRequests
from namr_dist.train.watchdog import Watchdog, backend_timeout

hangs, fails = int(sys.argv[1]), int(sys.argv[2])
rank = discover()
dist.init_process_group("gloo", timeout=backend_timeout(0.05))
phases = Phases(rank.device)
with StopRequests() as requests, Watchdog(phases, rank, requests, timeout_minutes=0.05):
    for phases.step in range(1, 10**9):
        with phases("data"):
            time.sleep(0.02 if rank.rank != hangs or phases.step < 3 else 1000)
        if rank.rank == fails and phases.step == 3:
            with phases("loss"):
                raise (InputError if len(sys.argv) > 3 else ValueError)("a wrong number")
        with phases("gather"):
            dist.all_reduce(torch.ones(1))
        if phases.step == 3:
            print("running", flush=True)
"""


def lines_of(*places: Place, silent: set[int] = frozenset()) -> list[str]:  # type: ignore[assignment]
    return describe(places, silent=silent, now_unix_s=1000.0)


def place(
    rank: int, *, step: int = 7, phase: str = "gather", ended: str | None = None, lost: bool = False
) -> Place:
    return Place(
        rank=rank,
        host=f"node{rank}",
        pid=100 + rank,
        beat=1,
        beat_unix_s=990.0,
        step=step,
        phase=phase,
        since_unix_s=970.0,
        ended=ended,
        lost=lost,
    )


def test_ranks_at_one_place_share_a_line_and_the_last_comes_first() -> None:
    assert lines_of(
        *map(place, (0, 1, 2, 4, 6, 7)), place(3, step=6, phase="step"), place(5, phase="data")
    ) == [
        "rank 3 on node3 (pid 103): in 'step' of step 6 for 30 s",
        "rank 5 on node5 (pid 105): in 'data' of step 7 for 30 s",
        "ranks 0-2, 4, 6-7: in 'gather' of step 7 for 30 s",
    ]


def test_silent_ranks_come_first_then_errors_then_what_they_caused() -> None:
    assert lines_of(
        place(0, ended="Connection reset", lost=True),
        place(1),
        place(2, step=8),
        place(3, step=9, ended="ValueError: no"),
        silent={2, 4},
    ) == [
        "rank 4: never published anything",
        "rank 2 on node2 (pid 102): silent for 10 s (dead, frozen or cut off); last heard of in 'gather' of step 8",
        "rank 3 on node3 (pid 103): ended in 'gather' of step 9 by ValueError: no",
        "rank 1 on node1 (pid 101): in 'gather' of step 7 for 30 s",
        "rank 0 on node0 (pid 100): ended in 'gather' of step 7 by Connection reset",
    ]


def test_speaks_before_the_backend() -> None:
    for minutes in (0.05, TrainConfig().timeout_minutes, 600):
        # What a report waits for comes on top of the time-out.
        assert backend_timeout(minutes).total_seconds() > 60 * minutes + 30


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_no_time_at_all_is_refused(minutes: float) -> None:
    with pytest.raises(InputError, match=f"train.timeout_minutes is {minutes}"):
        Config(recipe="x", train=TrainConfig(timeout_minutes=minutes)).check()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks of a program, without a launcher that would end the others."""

    ranks: list[Program]
    said: list[Path]
    """Files with what each said. Not pipes: a frozen worker would hold one open."""

    def outcome(self, *numbers: int) -> tuple[list[int], str]:
        """Exit codes of these ranks, once they have ended, and the reports of all."""
        codes = [self.ranks[rank].wait(timeout=120) for rank in numbers]
        lines = "".join(path.read_text() for path in self.said).splitlines(keepends=True)
        return codes, "".join(
            line for line in lines if line.startswith(("namr:", "  rank", "  the "))
        )

    def wait_until(self, true: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 120
        while not true():
            assert time.monotonic() < deadline_s and all(
                process.poll() is None for process in self.ranks
            ), "".join(path.read_text() for path in self.said)
            time.sleep(0.05)


@contextmanager
def started(folder: Path, world_size: int, program: Path, *words: object) -> Iterator[Group]:
    """All that still runs at the end is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_parent()
    common = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    group = Group(ranks=[], said=[folder / f"said-{rank}" for rank in range(world_size)])
    try:
        for rank, said in enumerate(group.said):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            group.ranks.append(Program(program, *words, environment=environment, output=said))
        yield group
    finally:
        for process in group.ranks:
            kill(children(process))
            process.kill()
            process.wait()


def children(process: Program) -> list[int]:
    pids: list[int] = []
    if process.poll() is not None:  # its number may be another's by now
        return pids
    for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            pids += map(int, task.read_text().split())
    return pids


def kill(processes: list[int]) -> None:
    """Some may be gone: a data worker ends with its rank, and whoever adopts it may have reaped it
    by now."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "steps.py").write_text(STEPS)
    return tmp_path / "steps.py"


def running(group: Group) -> None:
    group.wait_until(lambda: all("running" in path.read_text() for path in group.said))


def test_hung_alone(program: Path) -> None:
    with started(program.parent, 1, program, 0, -1) as group:
        codes, reports = group.outcome(0)
    assert codes == [EXIT_CODE]
    assert re.search(
        r"no progress for 3 s .*\n  rank 0 on \S+ \(pid \d+\): in 'data' of step 3 for \d+ s",
        reports,
    )


@pytest.mark.dist
def test_frozen_rank_is_named_once(program: Path) -> None:
    with started(program.parent, 3, program, -1, -1) as group:
        running(group)
        group.ranks[1].send_signal(signal.SIGSTOP)
        codes, reports = group.outcome(0, 2)
        pid = group.ranks[1].pid
    assert codes == [EXIT_CODE] * 2
    assert reports.count("namr: error:") == 1, reports
    assert re.search(
        rf"no progress .*\n  rank 1 on \S+ \(pid {pid}\): silent for \d+ s .*\n"
        r"  ranks 0, 2: in 'gather' of step \d+ for \d+ s",
        reports,
    ), reports


@pytest.mark.dist
def test_error_of_one_rank_is_told_by_another(program: Path) -> None:
    with started(program.parent, 2, program, -1, 1) as group:
        codes, reports = group.outcome(0, 1)
    assert codes == [EXIT_CODE, 1]
    assert re.search(
        r"rank 0, in 'gather' of step 3, lost .*\n"
        r"  rank 1 .*: ended in 'loss' of step 3 by ValueError: a wrong number\n",
        reports,
    ), reports


@pytest.mark.dist
@pytest.mark.parametrize("fails", [0, 1])
def test_a_rank_that_refuses_ends_all_with_its_code(program: Path, fails: int) -> None:
    with started(program.parent, 2, program, -1, fails, "refuses") as group:
        group.wait_until(lambda: any("namr: error: " in said.read_text() for said in group.said))
        # A launcher ends the others with one that has ended, here a while before the end.
        for _ in range(2):
            group.ranks[fails].terminate()
            time.sleep(1.2)
        codes, reports = group.outcome(0, 1)
    assert codes == [2, 2]
    assert re.fullmatch(rf"namr: error: a wrong number \(rank {fails} on \S+\)\n", reports), reports


@pytest.mark.dist
def test_store_lost_with_the_first_rank(program: Path) -> None:
    with started(program.parent, 2, program, -1, -1) as group:
        running(group)
        group.ranks[0].kill()
        codes, reports = group.outcome(0, 1)
    assert codes == [-signal.SIGKILL, EXIT_CODE]
    assert re.search(
        r"rank 1, in 'gather' of step \d+, lost .*\n  the store at 127.0.0.1:\d+ does not answer: rank 0",
        reports,
    ), reports


LAUNCHER = REPOSITORY / "launchers" / "train.py"


def begin(shard_set: Manifest, run: Path) -> list[object]:
    return [
        "homeware_conv4",
        "--run-dir",
        run,
        *small_run(shard_set, steps=10**6),
        "--set.train.timeout_minutes",
        0.2,
    ]


def has_begun(group: Group, run: Path) -> None:
    metrics = run / "metrics.jsonl"
    group.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)


@pytest.mark.dist
@pytest.mark.slow
def test_training_with_a_hung_loader(shard_set: Manifest, tmp_path: Path) -> None:
    with started(tmp_path, 2, LAUNCHER, *begin(shard_set, tmp_path / "run")) as group:
        has_begun(group, tmp_path / "run")
        workers = children(group.ranks[1])
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        codes, reports = group.outcome(0, 1)
        kill(workers)
    assert codes == [EXIT_CODE] * 2
    assert reports.count("namr: error:") == 1, reports
    # Rank 0 waits in the batch norm over all ranks.
    assert re.search(
        r"no progress for 12 s .*\n  rank 1 on .*: in 'data' of step (\d+) for \d+ s\n"
        r"  rank 0 on .*: in 'forward' of step \1 for \d+ s\n",
        reports,
    ), reports


@pytest.mark.dist
@pytest.mark.slow
def test_training_with_a_killed_rank(shard_set: Manifest, tmp_path: Path) -> None:
    with started(tmp_path, 2, LAUNCHER, *begin(shard_set, tmp_path / "run")) as group:
        has_begun(group, tmp_path / "run")
        group.ranks[1].kill()
        codes, reports = group.outcome(0, 1)
        pid = group.ranks[1].pid
    assert codes == [EXIT_CODE, -signal.SIGKILL]
    assert re.search(
        rf"rank 0, in '\w+' of step \d+, lost .*\n  rank 1 on \S+ \(pid {pid}\): silent", reports
    ), reports
