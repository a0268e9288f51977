"""Whole runs, on one rank and on two, and what the other commands make of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from conftest import REPOSITORY, launch, small_run
from training_runs import Run

from namr_dist.config import Config
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.train.structure_fit import GAMMAS

LAUNCHER = REPOSITORY / "launchers" / "train.py"
BIN = Path(sys.executable).parent


def curve(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def trained(
    shard_set: Manifest, forked_namr: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of ten steps on one rank."""
    run = tmp_path_factory.mktemp("runs") / "one"
    done = forked_namr("train", "homeware_conv4", "--run-dir", run, *small_run(shard_set, steps=10))
    assert done.returncode == 0, done.stderr
    return run


def test_leaves_what_the_docs_say(trained: Path) -> None:
    config = Config.load(trained / "config.json")
    assert config.recipe == "homeware_conv4" and config.optim.steps == 10
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    for line in lines[:10]:
        assert line["loss"] == pytest.approx(
            line["metric_loss"] + 2 * line["ranking_loss"], rel=1e-5
        )
    assert set(lines[-2]["val"]) >= {"R@1", "MAP@R"}
    assert lines[-1]["structure"]["gamma"] in GAMMAS
    assert list((trained / "tensorboard").iterdir())
    state = safetensors.torch.load_file(trained / "checkpoints" / "final.safetensors")
    assert state["sample_head.weight"].shape == (16, 128)
    assert len(state["centres.centres_MD"]) == lines[-1]["structure"]["centres"]


def test_learns(trained: Path) -> None:
    losses = curve(trained)
    assert sum(losses[-3:]) < sum(losses[:3])


def test_same_seed_same_curve(
    trained: Path, shard_set: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    words = ("train", "homeware_conv4", *small_run(shard_set, steps=10))
    again = forked_namr(*words, "--run-dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert curve(tmp_path / "again") == curve(trained)
    other = forked_namr(*words, "--run-dir", tmp_path / "other", "--set.train.seed", 1)
    assert other.returncode == 0, other.stderr
    assert curve(tmp_path / "other") != curve(trained)


def test_a_profile_holds_the_steps_and_changes_no_loss(
    trained: Path, shard_set: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    done = forked_namr(
        "train",
        "homeware_conv4",
        *small_run(shard_set, steps=10),
        "--run-dir",
        tmp_path / "run",
        "--set.train.profile",
        trace,
        "--set.train.profile_after",
        7,
    )
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run") == curve(trained)
    names = Counter(event["name"] for event in json.loads(trace.read_text())["traceEvents"])
    # The last three, which end with the run; each with its forward pass through four convolutions.
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#8", "ProfilerStep#9", "ProfilerStep#10"}
    assert names["aten::convolution_backward"] == 3 * 4 and names["aten::convolution"] >= 3 * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--set.train.profile", "nowhere/trace.json"],
            "train.profile nowhere/trace.json is not a file in a folder",
        ),
        (
            ["--set.train.profile", "trace.json"],
            "train.profile_after is 10, and the 3 steps behind those are recorded of "
            "optim.steps (6); set it between 0 and 3",
        ),
    ],
)
def test_a_profile_that_cannot_be_is_refused_before_the_run(
    shard_set: Manifest, forked_namr: Callable, tmp_path: Path, words: list[str], said: str
) -> None:
    for more in ([], ["--dry-run"]):
        done = forked_namr(
            "train",
            "homeware_conv4",
            *small_run(shard_set),
            "--run-dir",
            tmp_path / "run",
            *words,
            *more,
        )
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_follow_the_same_curve(
    trained: Path, shard_set: Manifest, tmp_path: Path, stage: int
) -> None:
    """By DeepSpeed's launcher, as a user starts it, and without one."""
    words = [
        "homeware_conv4",
        *("--run-dir", tmp_path / "two"),
        *small_run(shard_set, steps=10),
        *("--set.train.zero_stage", stage),
    ]
    if stage == 2:
        done = launch(
            *(BIN / "deepspeed", "--num_accelerators", 2, LAUNCHER, *words),
            cwd=tmp_path,
            env={"PATH": f"{BIN}:/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        run = Run(2, words, tmp_path / "said")
        assert run.wait() == [0, 0], run.said()
    # Sums over ranks run in another order, and training multiplies the difference tenfold from step
    # to step: batches of 18 under batch norm, Adam's first steps. tests/parity/test_parity.py
    # compares gradients.
    together, alone = curve(tmp_path / "two"), curve(trained)
    assert together[0] == pytest.approx(alone[0], rel=1e-5) and together[1] == pytest.approx(
        alone[1], rel=1e-4
    )
    assert together == pytest.approx(alone, rel=2e-2)
    one = safetensors.torch.load_file(trained / "checkpoints" / "final.safetensors")
    two = safetensors.torch.load_file(tmp_path / "two" / "checkpoints" / "final.safetensors")
    assert {name: value.shape for name, value in one.items()} == {
        name: value.shape for name, value in two.items()
    }


@pytest.mark.parametrize("metric", ["margin", "multi_similarity", "proxy_anchor"])
def test_other_losses_train(
    shard_set: Manifest, forked_namr: Callable, tmp_path: Path, metric: str
) -> None:
    done = forked_namr(
        "train",
        "homeware_conv4",
        "--run-dir",
        tmp_path / "run",
        *small_run(shard_set, steps=3),
        "--set.loss.metric",
        metric,
        "--set.train.tensorboard",
        "False",
    )
    assert done.returncode == 0, done.stderr
    assert len(curve(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_evaluate_report_embed(
    trained: Path,
    shard_set: Manifest,
    namr: Callable,
    forked_namr: Callable,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    done = forked_namr("evaluate", run)
    assert done.returncode == 0, done.stderr
    assert "raw pixels" in done.stdout and "R@1" in done.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    for mode in ("sample", "structure", "structure_shuffled", "calibrated"):
        assert set(metrics["test"][mode]) >= {"R@1", "R@2", "R@4", "R@8", "MAP@R", "R-precision"}
    assert metrics["protocol"]["test hash"] == shard_set.split_hash("test")
    assert metrics["train"]["steps"] == 10
    assert json.loads(forked_namr("evaluate", run, "--json").stdout)["test"] == metrics["test"], (
        "evaluation is not repeatable"
    )
    assert forked_namr("report", run).returncode == 0
    assert (run / "report.html").stat().st_size > 10_000

    out = tmp_path / "embedded.safetensors"
    assert forked_namr("embed", run, "--shards", shard_set.folder, "--out", out).returncode == 0
    from_shards = safetensors.torch.load_file(out)
    evaluated = safetensors.torch.load_file(run / "embeddings.safetensors")
    assert (from_shards["z"] - evaluated["z"]).abs().max() < 1e-5
    assert (from_shards["s"] - evaluated["s"]).abs().max() < 1e-4
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    index = shard_set.index("test")
    for position in range(3):
        shard = shard_set.shards[index.shard_N[position]]
        tar = (shard_set.folder / shard.file).read_bytes()
        start, length = int(index.offset_N[position]), int(index.length_N[position])
        (pictures / f"{position}.jpg").write_bytes(tar[start : start + length])
    done = namr("embed", run, "--images", pictures, "--out", out)
    assert done.returncode == 0, done.stderr
    from_files = safetensors.torch.load_file(out)
    assert from_files["z"].shape == (3, 16)
    assert (
        from_files["z"] - evaluated["z"][:3]
    ).abs().max() < 0.05  # another JPEG decoder, a bit or two apart
