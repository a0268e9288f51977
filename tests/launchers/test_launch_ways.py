"""Every way to start two ranks on two "machines", both of them this one, leads to the same
training, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors
from conftest import ENVIRONMENT, REPOSITORY, launch, small_run
from standins import make_standins
from training_runs import Run, heed_signals, start_parent

from namr_dist.data.shardset.manifest import Manifest
from namr_dist.parallel.ranks import read_launch
from namr_dist.run.folder import RunFolder

pytestmark = pytest.mark.dist

BIN = Path(sys.executable).parent
PROGRAM = "namr_dist.launchers.train"
MULTI_NODE = REPOSITORY / "launchers" / "multi_node.sh"
HOSTS = "127.0.0.1 slots=1\nlocalhost slots=1  # the same machine by another name\n"


@dataclass(frozen=True)
class Place:
    """A folder with a hostfile, stand-ins on the path, and the words of a run of three steps."""

    folder: Path
    words: list[str]

    @property
    def hostfile(self) -> Path:
        return self.folder / "hosts"

    def start(
        self,
        *commands: Sequence[object],
        env: Sequence[dict[str, str]] | None = None,
        **common: str,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run the commands at the same time, each with its own variables of `env`."""
        base = {"PATH": f"{self.folder / 'bin'}:{BIN}:/usr/bin:/bin", **common}
        with ThreadPoolExecutor() as pool:
            return list(
                pool.map(
                    lambda command, own: launch(*command, cwd=self.folder, env={**base, **own}),
                    commands,
                    env or [{}] * len(commands),
                )
            )

    def losses(self, *done: subprocess.CompletedProcess[str], ranks: int = 2) -> list[float]:
        """The run's curve, if every process ended well and so many ranks wrote it together."""
        for process in done:
            assert process.returncode == 0, process.stderr[-3000:]
        with safetensors.safe_open(
            self.folder / "run" / "checkpoints" / "final.safetensors", "pt"
        ) as file:
            assert json.loads(file.metadata()["trained"])["ranks"] == ranks
        lines = [
            json.loads(line)
            for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        return [line["loss"] for line in lines if "loss" in line]


def make_place(folder: Path, shard_set: Manifest) -> Place:
    (folder / "hosts").write_text(HOSTS)
    make_standins(folder / "bin")
    words = [
        "homeware_conv4",
        "--run-dir",
        folder / "run",
        *small_run(shard_set, steps=3),
        "--set.train.tensorboard",
        "False",
    ]
    return Place(folder, [str(word) for word in words])


@pytest.fixture
def place(shard_set: Manifest, tmp_path: Path) -> Place:
    return make_place(tmp_path, shard_set)


@pytest.fixture(scope="module")
def expected(shard_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of two ranks that a test has started by itself."""
    start_parent()
    place = make_place(tmp_path_factory.mktemp("expected"), shard_set)
    run = Run(2, place.words, place.folder / "said")
    assert run.wait() == [0, 0], run.said()
    losses = place.losses()
    assert len(losses) == 3
    return losses


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_job() -> str:
    """A Slurm job whose port nothing uses."""
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
    }
    for job in range(os.getpid(), os.getpid() + 100):
        port = read_launch({**step, "SLURM_JOB_ID": str(job)}).master_port
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return str(job)
    raise AssertionError("a hundred ports are taken")


def test_deepspeed_launcher_slurm(place: Place, expected: list[float]) -> None:
    """DeepSpeed's own code makes the srun command, and a stand-in starts what it says."""
    [done] = place.start(
        [
            "deepspeed",
            "--hostfile",
            place.hostfile,
            "--launcher",
            "slurm",
            "--no_ssh_check",
            "--master_addr",
            "127.0.0.1",
            REPOSITORY / "launchers" / "train.py",
            *place.words,
        ],
        STANDIN_JOB=free_job(),
    )
    assert place.losses(done) == expected


def test_mpirun(place: Place, expected: list[float], forked_namr: Callable) -> None:
    """Open MPI's variables on one machine, where MASTER_ADDR may be left out; MASTER_PORT only
    keeps ports apart."""
    ranks = [
        {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        }
        for rank in range(2)
    ]
    port = {"MASTER_PORT": str(free_port())}
    with ThreadPoolExecutor() as pool:
        done = list(
            pool.map(lambda own: forked_namr("train", *place.words, env={**own, **port}), ranks)
        )
    assert place.losses(*done) == expected


def test_multi_node_by_ssh(place: Place, expected: list[float]) -> None:
    """A stand-in for ssh; the folder has a blank in its name, which two shells must leave alone."""
    away = place.folder / "run elsewhere"
    words = [str(away) if word == str(place.folder / "run") else word for word in place.words]
    [done] = place.start(
        [MULTI_NODE, place.hostfile, *words],
        NAMR_MASTER_PORT=str(free_port()),
        STANDIN_PIDS=str(place.folder),
    )
    away.rename(place.folder / "run")
    assert place.losses(done) == expected


def test_machines_of_different_size(place: Place, expected: list[float]) -> None:
    """One rank on the first and two on the second, each told its place in another way: the same
    batches, summed in another order."""
    place.hostfile.write_text("127.0.0.1 slots=1\nlocalhost slots=2\n")
    done = place.start(
        [MULTI_NODE, place.hostfile, *place.words],
        [MULTI_NODE, "--node-rank", 1, place.hostfile, *place.words],
        env=[{"NODE_RANK": "0"}, {}],
        NAMR_MASTER_PORT=str(free_port()),
    )
    losses = place.losses(*done, ranks=3)
    assert losses[:2] == pytest.approx(expected[:2], rel=1e-4) and losses == pytest.approx(
        expected, rel=1e-2
    )


def test_a_machine_that_fails_ends_the_others(place: Place) -> None:
    """The first waits for a second that never comes."""
    place.hostfile.write_text("127.0.0.1 slots=1\nbroken slots=1\n")
    [done] = place.start(
        [MULTI_NODE, place.hostfile, *place.words],
        NAMR_MASTER_PORT=str(free_port()),
        STANDIN_PIDS=str(place.folder),
    )
    assert done.returncode == 7 and "ended with code 7" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((place.folder / "127.0.0.1").read_text()), 0)


def test_ctrl_c_stops_the_ranks_of_every_machine(place: Place) -> None:
    """ssh passes no signal on, but what is typed. A second one after the checkpoint changes
    nothing."""
    words = [*place.words, "--set.optim.steps", "100000", "--set.train.checkpoint_minutes", "0"]
    variables = {
        **ENVIRONMENT,
        "PATH": f"{place.folder / 'bin'}:{BIN}:/usr/bin:/bin",
        "NAMR_MASTER_PORT": str(free_port()),
        "STANDIN_PIDS": str(place.folder),
    }
    metrics, output = place.folder / "run" / "metrics.jsonl", place.folder / "said"
    with output.open("wb") as said:
        process = subprocess.Popen(
            [MULTI_NODE, place.hostfile, *words],
            cwd=place.folder,
            env=variables,
            stdout=said,
            stderr=said,
            preexec_fn=heed_signals,
        )
    give_up = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < give_up, output.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    run = RunFolder(place.folder / "run")
    while "stopped after step" not in output.read_text() and process.poll() is None:
        assert time.monotonic() < give_up, output.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75, output.read_text()
    assert "Traceback" not in output.read_text()
    assert len(run.checkpoints()) == 1


def test_multi_node_dry_run(place: Place) -> None:
    [done] = place.start(
        [MULTI_NODE, "--dry-run", place.hostfile, *place.words],
        NAMR_MASTER_PORT="29600",
        NCCL_DEBUG="INFO",
    )
    assert done.returncode == 0, done.stderr
    assert "nothing wrong found for 2 rank(s)" in done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:5] for line in lines] == [
        ["ssh", "-tt", "-o", "BatchMode=yes", host] for host in ("127.0.0.1", "localhost")
    ]
    for node, line in enumerate(lines):
        there = shlex.split(line[5])
        assert there[:3] == ["cd", str(place.folder), "&&"] and "NCCL_DEBUG=INFO" in there
        start = there.index("namr_dist.launchers.torchrun") + 1
        assert there[start:] == [
            "--nnodes",
            "2",
            "--node-rank",
            str(node),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            "29600",
            "--nproc-per-node",
            "1",
            "--module",
            PROGRAM,
            *place.words,
        ]
    assert not (place.folder / "run").exists()
    [refused] = place.start(
        [MULTI_NODE, "--dry-run", place.hostfile, *place.words, "--set.data.classes_per_batch", "5"]
    )
    assert (
        refused.returncode == 2
        and "which 2 ranks cannot share" in refused.stderr
        and not refused.stdout
    )


def test_command_of_the_dry_run(place: Place, expected: list[float], forked_namr: Callable) -> None:
    """What --dry-run prints starts the run, word for word."""
    done = forked_namr("train", *place.words, "--dry-run", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    command = next(
        line.removeprefix("torchrun").strip()
        for line in done.stdout.splitlines()
        if line.startswith("torchrun")
    )
    assert not (place.folder / "run").exists()
    assert place.losses(*place.start(shlex.split(command))) == expected
