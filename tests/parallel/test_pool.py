"""The pool of ranks: answers in order, failures told, no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import alive
from training_runs import start_parent

from namr_dist.parallel import pool as pools
from namr_dist.parallel.pool import RankError, Ranks

SCRIPT = """
import os, time
from namr_dist.parallel.pool import Ranks
if __name__ == "__main__":
    pool = Ranks(2)
    print(*pool(os.getpid), flush=True)
    pool(time.sleep, 600)
"""


def rank_and_size() -> tuple[int, int, str]:
    print("not for the parent's stdout")
    return dist.get_rank(), dist.get_world_size(), os.environ["RANK"]


def fail_on_the_second() -> None:
    if dist.get_rank() == 1:
        raise ValueError("as the test wants it")
    dist.barrier()


@pytest.mark.dist
def test_ranks_answer_in_order(two_ranks: Ranks, capfd: pytest.CaptureFixture[str]) -> None:
    assert two_ranks(rank_and_size) == [(0, 2, "0"), (1, 2, "1")]
    assert capfd.readouterr().out == ""


@pytest.mark.dist
def test_a_failure_is_told_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    start_parent()
    monkeypatch.setattr(pools, "_AFTER_FAILURE_S", 0.2)
    monkeypatch.setenv("NAMR_OF_NOW", "set after the server's start")
    with Ranks(2) as pool:
        assert pool(os.getenv, "NAMR_OF_NOW") == ["set after the server's start"] * 2
        with pytest.raises(RankError, match="rank 1:(.|\n)*as the test wants it"):
            pool(fail_on_the_second)
        assert [rank for rank, _, _ in pool(rank_and_size)] == [0, 1]
        with pytest.raises(RankError, match="ended without an answer"):
            pool(os._exit, 3)


@pytest.mark.dist
def test_ranks_end_with_a_killed_parent(tmp_path: Path) -> None:
    """While they work, when nothing else would tell them."""
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        ranks = [int(word) for word in parent.stdout.readline().split()]
        assert len(ranks) == 2 and all(map(alive, ranks))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(alive, ranks)):
        assert time.monotonic() < deadline, "ranks outlive their parent"
        time.sleep(0.05)
