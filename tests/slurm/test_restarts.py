"""Jobs that are stopped, preempted, cancelled, or lose a node: nothing that was trained is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
from cluster import Job, Lab
from conftest import REPOSITORY, make_shards
from training_runs import Run, start_parent

from namr_dist.data.shardset.manifest import Manifest
from namr_dist.run.folder import RunFolder

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

STEPS = 100
TRAIN = REPOSITORY / "slurm" / "train_sop.sh"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab


def settings() -> list[str]:
    """The SOP recipe, small; by itself it writes no checkpoint."""
    return [
        str(word)
        for name, value in {
            "data.classes_per_batch": 4,
            "data.images_per_class": 3,
            "data.image_size": 32,
            "data.workers": 1,
            "model.backbone": "conv4",
            "model.pretrained": False,
            "model.batchnorm": "train",
            "model.width": 16,
            "model.structure_hidden": 24,
            "optim.steps": STEPS,
            "optim.warmup_steps": 4,
            "train.log_every": 5,
            "train.tensorboard": False,
            "train.checkpoint_minutes": 0,
        }.items()
        for word in (f"--set.{name}", value)
    ]


def submit(
    lab: Lab,
    shards: Manifest,
    *words: str,
    options: tuple[str, ...] = (),
    run: str = "run",
    left_out: str = "preflight",
    **variables: str,
) -> Job:
    """Without preflight, which other tests are about, or without all commands of `namr` that a
    pattern of bash names."""
    inside = lab.folder / f"inside-{run}"
    inside.write_text(f'#!/bin/bash\nif [[ $2 != {left_out} ]]; then exec "$@"; fi\n')
    inside.chmod(0o755)
    return lab.submit(
        "--cpus-per-task=2",
        *options,
        TRAIN,
        *settings(),
        *words,
        NAMR_SHARDS=str(shards.folder),
        NAMR_RUN_DIR=str(lab.folder / run),
        NAMR_CONTAINER=str(inside),
        **variables,
    )


@contextmanager
def paused(run: Path) -> Iterator[None]:
    """All ranks stand still, for as long as Slurm takes; what they are asked meanwhile they hear
    afterwards."""
    ranks = f"namr_dist.launchers.train sop --run-dir {run}"
    subprocess.run(["pkill", "-STOP", "-f", ranks], check=True)
    yield
    subprocess.run(["pkill", "-CONT", "-f", ranks], check=True)


def soon(condition: Callable[[], bool], *, timeout_s: float = 300) -> None:
    """Wait for something that happens among steps of milliseconds: Slurm is not asked."""
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def loader_worker(run: Path) -> int:
    """The process number of one of a run's loader workers, which are the forks of its ranks."""
    said = subprocess.run(
        ["pgrep", "-f", f"namr train sop --run-dir {run}"], capture_output=True, check=True
    )
    ours = {int(word) for word in said.stdout.split()}
    for rank in ours:
        with contextlib.suppress(FileNotFoundError):
            children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
            if workers := ours.intersection(map(int, children)):
                return workers.pop()
    raise AssertionError(f"no loader worker among {ours}")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of 64 MiB on the folder, on which a file called filler takes what `fill` finds."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    """Take all that is free on its disk."""
    with open(folder / "filler", "ab", buffering=0) as file:
        try:
            while file.write(bytes(1 << 20)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def steps_done(run: Path) -> int:
    """Steps done, as metrics.jsonl has them."""
    path = run / "metrics.jsonl"
    lines = (
        [
            json.loads(line)
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        if path.exists()
        else []
    )
    return max((line["step"] for line in lines), default=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("shards"), classes={"train": 12, "test": 6}, size=32)


@pytest.fixture(scope="module")
def unbroken(shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happens to."""
    start_parent()
    folder = tmp_path_factory.mktemp("unbroken")
    run = Run(
        2,
        ["sop", "--run-dir", folder / "run", "--set.data.path", shards.folder, *settings()],
        folder / "said",
    )
    assert run.wait() == [0, 0], run.said()
    return folder / "run"


def weights(run: Path) -> dict[str, bytes]:
    state = safetensors.torch.load_file(run / "checkpoints" / "final.safetensors")
    return {name: value.numpy().tobytes() for name, value in state.items()}


def newest(run: Path) -> int:
    return max((step for step, _ in RunFolder(run).checkpoints()), default=0)


def test_no_step_is_lost(lab: Lab, shards: Manifest, unbroken: Path) -> None:
    """Cancelled; then, submitted again, as a job of an array: out of time, preempted, and left by a
    node. In the end, the weights of a run that none of it happened to."""
    run = lab.folder / "run"
    job = submit(lab, shards)
    job.until(lambda: steps_done(run) >= 3)
    lab.run("scancel", job.number)
    job.ends("CANCELLED", code=75)
    kept = newest(run)
    assert kept >= 3 and job.fields()["Restarts"] == "0" and "starting again" not in job.log()

    job = submit(lab, shards, "--set.train.checkpoint_every", "5", options=("--array=0",))
    job.until(lambda: steps_done(run) >= kept + 3)
    assert f"resumed   at step {kept} from" in job.log()
    with paused(run):
        # Less than the 300 s of --signal.
        lab.run("scontrol", "update", f"jobid={job.number}", "timelimit=4")
        job.until(lambda: "USR1" in job.log())
    job.until(lambda: job.fields()["JobState"] == "PENDING")
    lab.run("scontrol", "update", f"jobid={job.number}", "timelimit=60")
    kept = newest(run)
    assert kept == steps_done(run), "steps after the checkpoint"
    assert "training stopped for the time limit; starting again, from step-" in job.log()

    job.until(lambda: steps_done(run) >= kept + 3)
    assert f"resumed   at step {kept} from" in job.log() and job.fields()["Restarts"] == "1"
    with paused(run):
        urgent = lab.submit(
            "--partition=high",
            "--exclusive",
            "--nodes=2",
            "--output=%x-%j.log",
            "--wrap",
            "sleep 1",
        )
        job.until(lambda: job.log().count("USR1") > 1)
    urgent.ends("COMPLETED")
    kept = newest(run)
    assert "training made way for another job; starting again" in job.log()

    job.until(lambda: steps_done(run) >= kept + 3)
    assert f"resumed   at step {kept} from" in job.log() and job.fields()["Restarts"] == "2"
    lab.node(2, "kill")
    job.until(lambda: job.fields()["JobState"] == "PENDING")
    kept = newest(run)
    lab.node(2, "start")
    job.ends("COMPLETED")
    assert f"resumed   at step {kept} from" in job.log() and job.fields()["Restarts"] == "3"
    assert weights(run) == weights(unbroken)
    assert (run / "metrics.json").exists() and (run / "report.html").exists()


def test_trouble_that_passes_costs_no_step(lab: Lab, shards: Manifest, unbroken: Path) -> None:
    """A loader worker is killed; then the disk of the run is full until the job is queued again.
    Both ranks are on one node, and nothing is evaluated, for the time that it takes."""
    run = lab.folder / "full"
    with small_disk(run):
        job = submit(
            lab,
            shards,
            *("--set.train.checkpoint_every", "40"),
            options=("--nodes=1",),
            run=run.name,
            left_out="@(preflight|evaluate|report)",
            NAMR_LAUNCH="srun",
            NAMR_RANKS_PER_NODE="2",
        )
        soon(lambda: newest(run) == 40)
        os.kill(loader_worker(run), signal.SIGKILL)
        ended = "training ended with code 74; starting again, from step-00000040"
        job.until(lambda: ended in job.log())
        assert "a data worker process" in job.log() and "(SIGKILL)" in job.log()

        soon(lambda: "resumed   at step 40 from" in job.log())
        fill(run)
        # What an attempt gives back that failed is taken, too.
        job.until(lambda: fill(run) or job.log().count(ended) == 2)
        assert "no checkpoint at step 80: No space left on device" in job.log()
        assert f"No space left on device: {run / 'checkpoints' / 'final.safetensors'}" in job.log()
        (run / "filler").unlink()

        job.ends("COMPLETED")
        assert job.fields()["Restarts"] == "2" and job.log().count("resumed   at step 40") == 2
        assert weights(run) == weights(unbroken) and "Traceback" not in job.log()
