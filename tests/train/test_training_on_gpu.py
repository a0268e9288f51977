"""Whole runs on a GPU: what they leave, how they repeat and go on, and that they are the CPU's."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from conftest import ENVIRONMENT, ON_GPU, small_run
from training_runs import entries, losses

from namr_dist.data.shardset.manifest import Manifest
from namr_dist.run.folder import RunFolder
from namr_dist.train.phases import STEP_PHASES

pytestmark = [pytest.mark.gpu, pytest.mark.dist, pytest.mark.xdist_group("training on a GPU")]
STEPS, IMAGES = 60, 18
# cuDNN's convolutions are TF32 unless the driver forbids it; then float32 is what a CPU computes.
FULL_FLOAT32 = {**ON_GPU, "NVIDIA_TF32_OVERRIDE": "0"}
Train = Callable[..., list[str]]


def words(manifest: Manifest, run: Path, *more: object, steps: int = STEPS) -> list[str]:
    """`namr train`, with a checkpoint every 4 steps."""
    return [
        str(word)
        for word in (
            "train",
            "homeware_conv4",
            "--run-dir",
            run,
            *small_run(manifest, steps=steps),
            "--set.train.checkpoint_every",
            4,
            *more,
        )
    ]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(
    precision: str, shard_set: Manifest, namr: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A finished run of one rank on a GPU, and what it said."""
    run = tmp_path_factory.mktemp("runs") / precision
    done = namr(*words(shard_set, run, "--set.train.precision", precision), env=FULL_FLOAT32)
    assert done.returncode == 0, done.stderr
    return run, done.stderr


def same(run: Path, other: Path) -> None:
    """The same losses, one for each step, and the same network, bit for bit."""
    assert losses(run) == losses(other) and list(losses(run)) == list(range(1, STEPS + 1))
    assert network(run) == network(other)


def network(run: Path) -> dict[str, bytes]:
    state = safetensors.torch.load_file(run / "checkpoints" / "final.safetensors")
    return {name: value.numpy().tobytes() for name, value in state.items()}


def test_says_what_serves_it_and_learns(trained: tuple[Path, str], precision: str) -> None:
    run, said = trained
    assert (
        "1 × NVIDIA" in said
        and f"{precision} (asked for)" in said
        and "Triton kernels for sm_" in said
    )
    values = [loss for (loss,) in losses(run).values()]
    assert len(values) == STEPS and sum(values[-6:]) < sum(values[:6])
    (validated,) = [entry["val"] for entry in entries(run) if "val" in entry]
    assert 0 < validated["R@1"] <= 100


def test_phases_add_up_to_the_step(trained: tuple[Path, str]) -> None:
    lines = [entry for entry in entries(trained[0]) if "img_per_s" in entry]
    assert len(lines) == STEPS // 10
    for line in lines:
        step_s, spent_s = IMAGES / line["img_per_s"], sum(line[f"{name}_s"] for name in STEP_PHASES)
        assert 0 < spent_s <= 1.05 * step_s
    # Of the last: the first ones compile, and write checkpoints besides.
    assert spent_s >= 0.5 * step_s


def test_the_same_seed_gives_the_same_bits(
    trained: tuple[Path, str], precision: str, shard_set: Manifest, namr: Callable, tmp_path: Path
) -> None:
    again = namr(
        *words(shard_set, tmp_path / "again", "--set.train.precision", precision), env=FULL_FLOAT32
    )
    assert again.returncode == 0, again.stderr
    same(tmp_path / "again", trained[0])


def test_a_killed_run_goes_on_bit_for_bit(
    trained: tuple[Path, str], precision: str, shard_set: Manifest, namr: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = words(shard_set, run, "--set.train.precision", precision)
    with subprocess.Popen(
        [sys.executable, "-m", "namr_dist.cli", *command],
        env=ENVIRONMENT | FULL_FLOAT32,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not RunFolder(run).checkpoints() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    reached, newest = RunFolder(run).checkpoints()[-1]
    part = safetensors.torch.load_file(newest / "rank-00000.safetensors")
    assert 0 < reached < STEPS and "rank/00000/rng_cuda" in part
    done = namr(*command, "--resume", env=FULL_FLOAT32)
    assert done.returncode == 0 and f"resumed   at step {reached} from" in done.stderr, done.stderr
    same(run, trained[0])


def test_the_first_loss_is_the_one_on_a_cpu(
    trained: tuple[Path, str],
    precision: str,
    shard_set: Manifest,
    forked_namr: Callable,
    tmp_path: Path,
) -> None:
    """Before the first update, all that differs is rounding: of the convolutions, and of the fused
    kernels."""
    done = forked_namr(
        *words(shard_set, tmp_path / "cpu", "--set.train.precision", "fp32", steps=2)
    )
    assert done.returncode == 0, done.stderr
    (on_gpu,), (on_cpu,) = losses(trained[0])[1], losses(tmp_path / "cpu")[1]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4 if precision == "fp32" else 0.05)


def test_evaluation_gives_the_figures_of_a_cpu(
    trained: tuple[Path, str], namr: Callable, forked_namr: Callable, tmp_path: Path
) -> None:
    figures = []
    for name, evaluate in (
        ("gpu", lambda run: namr("evaluate", run, "--json", env=FULL_FLOAT32)),
        ("cpu", lambda run: forked_namr("evaluate", run, "--json")),
    ):
        shutil.copytree(trained[0], tmp_path / name)
        done = evaluate(tmp_path / name)
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        figures.append(
            {
                (mode, figure): value
                for mode, part in (measured["test"] | measured["baselines"]).items()
                if isinstance(part, dict)
                for figure, value in part.items()
                if isinstance(value, float)
            }
        )
    on_gpu, on_cpu = figures
    assert len(on_cpu) > 20 and on_gpu == pytest.approx(on_cpu, abs=0.1)  # per cent
    one, other = (
        safetensors.torch.load_file(tmp_path / name / "embeddings.safetensors")
        for name in ("gpu", "cpu")
    )
    assert (one["z"] - other["z"]).abs().max() <= 1e-3 * other["z"].abs().max()
