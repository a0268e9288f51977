"""Our torchrun: what it passes on to its ranks, and with which code it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, alive, launch
from training_runs import heed_signals

from namr_dist.train.signals import STOP_SIGNALS

pytestmark = pytest.mark.dist

TORCHRUN = [sys.executable, "-m", "namr_dist.launchers.torchrun"]
_RANK = """
import os, signal, sys, time
from pathlib import Path
heard = []
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, frame: heard.append(number))
Path(f"up-{os.environ['RANK']}").write_text(str(os.getpid()))
while not heard:
    time.sleep(0.05)
Path(f"heard-{os.environ['RANK']}").write_text(str(int(heard[0])))
os._exit(75)
"""


def start(folder: Path, *before: str) -> tuple[subprocess.Popen[str], list[int]]:
    """torchrun, after the words `before`, and the ids of its two ranks, once they listen for
    signals."""
    (folder / "rank.py").write_text(_RANK)
    process = subprocess.Popen(
        [*before, *TORCHRUN, "--standalone", "--nproc-per-node", "2", "rank.py"],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,
    )
    give_up = time.monotonic() + 180
    files = [folder / f"up-{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        if process.poll() is not None or time.monotonic() > give_up:
            process.terminate()
            raise AssertionError("the ranks do not begin")
        time.sleep(0.05)
    return process, [int(file.read_text()) for file in files]


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda one: one.name)
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
    assert process.returncode == 75 and "Traceback" not in said, said
    assert "was the first to end, with code 75" in said
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert not any(alive(rank) for rank in ranks)


def test_nohup_holds(tmp_path: Path) -> None:
    process, ranks = start(tmp_path, "nohup")
    with process:
        process.send_signal(signal.SIGHUP)
        for rank in ranks:  # as a closing terminal does, to all its programs
            os.kill(rank, signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None and all(map(alive, ranks))
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert (tmp_path / "heard-0").read_text() == str(int(signal.SIGTERM))


def test_a_port_in_use_is_named_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["--nproc-per-node", "1", "--nnodes", "1", f"--master-port={port}", "rank.py"]
        done = launch(*TORCHRUN, *words, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("torchrun: error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and f"port {port}" in lines[0] and "NAMR_MASTER_PORT" in lines[0]
    assert not list(tmp_path.glob("up-*"))


def test_a_killed_rank_ends_the_other_and_counts_as_a_shell_counts_it(tmp_path: Path) -> None:
    process, ranks = start(tmp_path)
    subprocess.run(["kill", "-KILL", str(ranks[1])], check=True)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + 9 and "rank 1 was the first to end, with code 137" in said
    assert not any(alive(rank) for rank in ranks)
