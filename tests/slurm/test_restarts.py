"""Jobs that are stopped, preempted, cancelled, or lose a node: nothing that was trained is lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
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


def submit(lab: Lab, shards: Manifest, *words: str, options: tuple[str, ...] = ()) -> Job:
    """Without preflight, which other tests are about."""
    inside = lab.folder / "inside"
    inside.write_text('#!/bin/bash\nif [[ $* != *preflight* ]]; then exec "$@"; fi\n')
    inside.chmod(0o755)
    return lab.submit(
        "--cpus-per-task=2",
        *options,
        TRAIN,
        *settings(),
        *words,
        NAMR_SHARDS=str(shards.folder),
        NAMR_RUN_DIR=str(lab.folder / "run"),
        NAMR_CONTAINER=str(inside),
    )


@contextmanager
def paused(run: Path) -> Iterator[None]:
    """All ranks stand still, for as long as Slurm takes; what they are asked meanwhile they hear
    afterwards."""
    ranks = f"namr_dist.launchers.train sop --run-dir {run}"
    subprocess.run(["pkill", "-STOP", "-f", ranks], check=True)
    yield
    subprocess.run(["pkill", "-CONT", "-f", ranks], check=True)


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
