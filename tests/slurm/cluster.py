"""A lab cluster for tests: real slurmctld and slurmd, jobs by sbatch, and what becomes of them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY

_SCRIPT = REPOSITORY / "slurm" / "lab" / "lab.sh"
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")


class Lab:
    """Two nodes, node1 and node2; within its `with`, they run. Jobs write into `folder`."""

    def __init__(self, folder: Path) -> None:
        if missing := [name for name in _PROGRAMS if not shutil.which(name)]:
            pytest.skip(
                f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
            )
        if os.geteuid():
            pytest.skip("a cluster of one's own needs root")
        self.folder = folder
        self._lab = folder / "lab"
        # The machine is busy with other tests.
        self._environment = {
            **ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LAB": str(self._lab),
            "LAB_PORT": str(_three_ports()),
            "SLURM_CONF": str(self._lab / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
            "NAMR_HOME": str(REPOSITORY),
            "SBATCH_GPUS_PER_NODE": "0",
            "NAMR_PREFLIGHT_SECONDS": "120",
        }

    def __enter__(self) -> Lab:
        self.run(_SCRIPT, "start")
        return self

    def __exit__(self, *_: object) -> None:
        self.run(_SCRIPT, "stop")

    def run(self, *words: object, **variables: str) -> str:
        """What a command says on stdout, run as a user of the cluster would."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.folder,
            env={**self._environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def node(self, number: int, action: str) -> None:
        """`kill` a node's daemon, or `start` it."""
        self.run(_SCRIPT, "node", number, action)

    def submit(self, *words: object, **variables: str) -> Job:
        """sbatch with these words and environment variables."""
        return Job(self, self.run("sbatch", "--parsable", *words, **variables))


class Job:
    """A job of the lab."""

    def __init__(self, lab: Lab, number: str) -> None:
        self.number = number
        self._lab = lab

    def fields(self) -> Mapping[str, str]:
        """What Slurm knows of it: JobState, ExitCode, Restarts …"""
        shown = self._lab.run("scontrol", "show", "job", "-o", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def log(self) -> str:
        """What it and its ranks said, in all its starts."""
        return "\n".join(path.read_text() for path in self._lab.folder.glob(f"*-{self.number}.log"))

    def until(self, condition: Callable[[], bool], *, timeout_s: float = 600) -> None:
        """Wait for something that the job does."""
        give_up = time.monotonic() + timeout_s
        while not condition():
            ended = self.fields()["JobState"] in _ENDS
            assert condition() or not ended and time.monotonic() < give_up, (
                f"{self.fields()}\n{self.log()}"
            )
            time.sleep(0.2)

    def starts(self, restarts: int) -> None:
        """Wait until it has been started again so often."""
        self.until(
            lambda: (
                (fields := self.fields())["JobState"] == "RUNNING"
                and int(fields["Restarts"]) == restarts
            )
        )

    def ends(self, state: str, *, code: int = 0) -> None:
        """Wait for its end, and see that Slurm calls it that."""
        self.until(lambda: self.fields()["JobState"] in _ENDS)
        fields = self.fields()
        assert (fields["JobState"], fields["ExitCode"].split(":")[0]) == (state, str(code)), (
            f"{fields}\n{self.log()}"
        )


def _three_ports() -> int:
    """The first of three that nothing listens at, below those that Linux hands out, and not those
    of another test."""
    for first in range(21_000 + os.getpid() % 1000 * 3, 32_000, 3):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, probe in enumerate((one, two, three)):
                    probe.bind(("127.0.0.1", first + offset))
            except OSError:
                continue
            return first
    raise AssertionError("no three free ports")
