"""sbatch on two real nodes: every launch way, staging, what preflight refuses, and an array of
runs."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import miniatures
import pytest
import safetensors.torch
from cluster import Job, Lab
from conftest import REPOSITORY

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

TRAIN, SWEEP = REPOSITORY / "slurm" / "train_sop.sh", REPOSITORY / "slurm" / "sweep.sh"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab


@pytest.fixture(scope="module")
def sop(tmp_path_factory: pytest.TempPathFactory, namr: Callable) -> Path:
    """Stanford Online Products in small, as shards made from the download's own files."""
    folder = tmp_path_factory.mktemp("sop")
    done = namr(
        "shards",
        "build",
        "sop",
        miniatures.sop(folder / "download", classes=16),
        "--out",
        folder / "shards",
        "--allow-counts",
    )
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def settings(steps: int) -> list[str]:
    """The recipe's own losses and learning rates; a small network, small images."""
    return [
        str(word)
        for name, value in {
            "data.classes_per_batch": 8,
            "data.image_size": 32,
            "data.workers": 0,
            "model.backbone": "conv4",
            "model.pretrained": False,
            "model.batchnorm": "train",
            "model.width": 16,
            "model.structure_hidden": 24,
            "optim.steps": steps,
            "optim.warmup_steps": 2,
            "train.log_every": 4,
            "train.tensorboard": False,
        }.items()
        for word in (f"--set.{name}", value)
    ]


def submit(lab: Lab, sop: Path, run: Path, *options: str, **variables: str) -> Job:
    return lab.submit(
        "--cpus-per-task=2",
        *options,
        TRAIN,
        *settings(12),
        NAMR_SHARDS=str(sop),
        NAMR_RUN_DIR=str(run),
        **{"NAMR_RANKS_PER_NODE": "2", **variables},
    )


def figures(value: Any, path: str = "") -> dict[str, float]:
    """Every number of what metrics.json says of the test images, by its place."""
    if isinstance(value, dict):
        return {
            name: number
            for key, inner in value.items()
            for name, number in figures(inner, f"{path}.{key}").items()
        }
    return {path: value} if isinstance(value, (int, float)) else {}


def measured(run: Path) -> dict[str, float]:
    metrics = json.loads((run / "metrics.json").read_text())
    return figures(metrics["test"]) | figures(metrics["baselines"])


def test_four_ranks_on_two_nodes_by_every_launch_way(
    lab: Lab, sop: Path, forked_namr: Callable
) -> None:
    """The figures of one process, and the same network, bit for bit, whatever starts the ranks."""
    ways = {"torchrun": {}, "srun": {"NAMR_STAGE": str(lab.folder / "disk")}, "deepspeed": {}}
    jobs = {
        way: submit(lab, sop, lab.folder / way, NAMR_LAUNCH=way, **more)
        for way, more in ways.items()
    }
    alone = lab.folder / "alone"
    for words in (
        ["train", "sop", "--run-dir", alone, "--set.data.path", sop, *settings(12)],
        ["evaluate", alone],
    ):
        done = forked_namr(*words)
        assert done.returncode == 0, done.stderr
    expected, weights = measured(alone), {}
    for way, job in jobs.items():
        job.ends("COMPLETED")
        assert (
            f"device    4 × CPU, 1 threads a rank; ZeRO 1; fp32 (CPU); started by {way}"
            in job.log()
        )
        assert measured(lab.folder / way) == pytest.approx(expected, abs=1e-6)
        metrics = json.loads((lab.folder / way / "metrics.json").read_text())
        assert metrics["protocol"]["evaluated on"].endswith("; fp32; 4 ranks")
        assert (lab.folder / way / "report.html").exists()
        state = safetensors.torch.load_file(lab.folder / way / "checkpoints" / "final.safetensors")
        weights[way] = {name: value.numpy().tobytes() for name, value in state.items()}
        assert weights[way] == weights["torchrun"]
    # NAMR as a whole: trained with the ranking loss, searched with ρ, and with its two controls,
    # s = 1 (the sample row) and ρ shuffled between images.
    assert json.loads((alone / "config.json").read_text())["loss"]["ranking"]["weight"] > 0
    assert {
        f".{row}.{figure}"
        for row in ("sample", "structure", "structure_shuffled")
        for figure in ("R@1", "MAP@R")
    } <= expected.keys()
    (staged,) = (lab.folder / "disk").glob("sop-*")
    assert json.loads((lab.folder / "srun" / "config.json").read_text())["data"]["path"] == str(
        staged
    )
    assert (staged / "manifest.json").read_bytes() == (sop / "manifest.json").read_bytes()


def test_preflight_names_what_is_wrong_and_on_which_node(
    lab: Lab, sop: Path, tmp_path: Path
) -> None:
    """A shard that is missing, another version on node2, a run folder that cannot be, GPUs that
    Slurm alone knows."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in sop.iterdir():
        if not file.name.startswith("test"):
            (copy / file.name).symlink_to(file)
    other = tmp_path / "site" / "timm-0.0.7.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.7\n")
    inside = tmp_path / "inside"
    inside.write_text(
        f"#!/bin/bash\nif [[ $SLURMD_NODENAME == node2 ]]; then export PYTHONPATH={other.parent}; fi\n"
        'exec "$@"\n'
    )
    inside.chmod(0o755)
    job = submit(lab, copy, Path("/proc/run"), "--gpus-per-node=2", NAMR_CONTAINER=str(inside))
    job.ends("FAILED", code=2)
    said = job.log()
    for text in (
        "all nodes: shard ",
        "test-",
        "node2: timm is 0.0.7, on node1 ",
        "all nodes: Slurm gave 2 GPUs, torch opens 0 of 2",
        "run folder /proc/run cannot be written",
    ):
        assert text in said
    assert (
        "preflight refused to go on" in said
        and "device " not in said
        and job.fields()["Restarts"] == "0"
    )


def test_preflight_finds_a_port_that_is_taken(lab: Lab, sop: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        # Node2 waits for most of the limit: whoever listens there might still be the first node.
        job = submit(lab, sop, tmp_path / "run", NAMR_PORT=str(port), NAMR_PREFLIGHT_SECONDS="45")
        job.ends("FAILED", code=2)
    assert f"port {port} of node1 is taken" in job.log() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("seeds", ["0", pytest.param("0 1", marks=pytest.mark.whole)])
def test_an_array_of_runs_makes_one_table(lab: Lab, sop: Path, seeds: str) -> None:
    folder = lab.folder / f"sweep-{len(seeds)}"
    said = lab.run(
        SWEEP,
        "sop",
        *settings(4),
        LOSSES="triplet margin",
        WEIGHTS="0 2",
        SEEDS=seeds,
        NAMR_SWEEP_DIR=str(folder),
        NAMR_SHARDS=str(sop),
        NAMR_RANKS_PER_NODE="1",
        NAMR_LAUNCH="srun",
        NAMR_SBATCH="--cpus-per-task=1",
    )
    table = Job(lab, said.split("table: job ")[1].split()[0])
    table.ends("COMPLETED")
    assert (folder / "report.html").exists() and "What multi-cluster ranking adds" in table.log()
    rows = [
        line.split()
        for line in table.log().split("What multi")[0].splitlines()
        if line.split()[:1] in (["triplet"], ["margin"])
    ]
    count = str(len(seeds.split()))
    assert [row[:3] for row in rows] == [
        [loss, weight, count] for loss in ("margin", "triplet") for weight in "02"
    ]
    for loss, weight, _, first, *_ in rows:
        measured = [
            json.loads((folder / f"{loss}-{weight}-{seed}" / "metrics.json").read_text())["test"][
                "sample"
            ]
            for seed in seeds.split()
        ]
        assert float(first) == pytest.approx(
            sum(one["R@1"] for one in measured) / len(measured), abs=0.006
        )
