"""`namr preflight` on nodes that are processes of this machine, forked from one that has imported
all."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from training_runs import start_parent

_TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun_like(rank: int, port: int) -> dict[str, str]:
    """Variables of one of two nodes."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SLURMD_NODENAME": f"node{rank + 1}",
    }


def slurm_like(rank: int, port: int, *, size: int = 2) -> dict[str, str]:
    """Variables of one of `size` nodes that srun starts a task on each of."""
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": f"node[1-{size}]",
        "SLURMD_NODENAME": f"node{rank + 1}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Node:
    """A process that runs `namr preflight` with a launcher's variables, from a folder of its
    own."""

    def __init__(self, folder: Path, variables: Mapping[str, str], *words: object) -> None:
        start_parent()
        folder.mkdir()
        self.folder = folder
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_preflight, args=(folder, dict(variables), [str(word) for word in words])
        )
        self.process.start()

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int | None, str]:
        """Exit code and stderr, once it has ended; nothing is on stdout."""
        self.process.join(_TIMEOUT_S)
        if self.process.exitcode is None:
            self.process.kill()
        assert (self.folder / "stdout").read_text() == ""
        return self.process.exitcode, (self.folder / "stderr").read_text()


def _preflight(folder: Path, variables: dict[str, str], words: list[str]) -> None:
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for name in list(os.environ):
        if name.startswith(("SLURM", "TRITON")):
            del os.environ[name]
    os.environ.update(variables)
    # Read at Python's start, which was earlier.
    sys.path[:0] = filter(None, [variables.get("PYTHONPATH")])
    from namr_dist.cli.main import main

    sys.exit(main(["preflight", *words]))
