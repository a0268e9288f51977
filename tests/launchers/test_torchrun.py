"""Our torchrun: what it passes on to its ranks, and with which code it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, alive

pytestmark = pytest.mark.dist

_RANK = """
import os, signal, sys, time
from pathlib import Path
heard = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: heard.append(number))
Path(f"up-{os.environ['RANK']}").write_text(str(os.getpid()))
while not heard:
    time.sleep(0.05)
Path(f"heard-{os.environ['RANK']}").write_text(str(int(heard[0])))
os._exit(75)
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """torchrun, and the ids of its two ranks, once they listen for signals."""
    (folder / "rank.py").write_text(_RANK)
    process = subprocess.Popen(
        [sys.executable, "-m", "namr_dist.launchers.torchrun", "--nproc-per-node", "2", "rank.py"],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stderr=subprocess.PIPE,
    )
    give_up = time.monotonic() + 60
    files = [folder / f"up-{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.05)
    return process, [int(file.read_text()) for file in files]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_goes_to_the_ranks_and_their_code_comes_back(
    tmp_path: Path, number: signal.Signals
) -> None:
    process, ranks = start(tmp_path)
    with process:
        while process.poll() is None:  # again and again, also when the ranks have ended
            process.send_signal(number)
            time.sleep(0.01)
        assert process.stderr
        said = process.stderr.read()
    assert (
        process.returncode == 75
        and "was the first to end, with code 75" in said
        and "Traceback" not in said
    )
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert not any(alive(rank) for rank in ranks)


def test_a_killed_rank_ends_the_other_and_counts_as_a_shell_counts_it(tmp_path: Path) -> None:
    process, ranks = start(tmp_path)
    subprocess.run(["kill", "-KILL", str(ranks[1])], check=True)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + 9 and "rank 1 was the first to end, with code 137" in said
    assert not any(alive(rank) for rank in ranks)
