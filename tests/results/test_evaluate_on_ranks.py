"""`namr evaluate` of any checkpoint, on any number of ranks: the figures of one process, bit for
bit, and one line where a rank cannot go on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from conftest import launch, make_shards, small_run
from training_runs import Run

from namr_dist.data.shardset.manifest import Manifest
from namr_dist.run.folder import RunFolder

pytestmark = pytest.mark.dist

STEP = 4
FILES = {"metrics.json", "classes.json", "embeddings.safetensors"}


@pytest.fixture(scope="module")
def many_test_images(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """300 test images: three batches, the last a short one. Some of them are a subset."""
    classes = {"train": 12, "val": 4, "test": 50}
    manifest = make_shards(tmp_path_factory.mktemp("shards"), classes=classes, size=32)
    manifest = replace(manifest, subsets={"few": manifest.index("test").keys[:30]})
    manifest.save()
    return manifest


@pytest.fixture(scope="module")
def trained(
    many_test_images: Manifest, forked_namr: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run with one training state, from before any centres were fitted."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    done = forked_namr(
        "train",
        "homeware_conv4",
        "--run-dir",
        run,
        *small_run(many_test_images),
        "--set.train.checkpoint_every",
        STEP,
        "--set.train.tensorboard",
        "False",
        "--set.evaluation.recall_at",
        1,
        60,  # beyond the lists: ranks are counted
        "--set.evaluation.reidentification_draws",
        2,
    )
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def unfinished(trained: Path, tmp_path: Path) -> Path:
    run = tmp_path / "unfinished"
    shutil.copytree(trained, run)
    RunFolder(run).final.unlink()
    return run


def on_ranks(world_size: int, said: Path, *words: object) -> tuple[list[int], str]:
    run = Run(world_size, words, said, verb="evaluate")
    return run.wait(), run.said()


def same_everywhere(metrics: dict[str, Any]) -> dict[str, Any]:
    """All that is measured; the protocol says on how many ranks, and the file's hash follows."""
    return {name: block for name, block in metrics.items() if name not in ("protocol", "sha256")}


def figures_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_any_number_of_ranks_measures_the_same(trained: Path, tmp_path: Path) -> None:
    """Of three batches, two ranks have two and one, three have one each, and one of four repeats
    the last; the parts of the gallery hold 300, 150, 100 and 75 items."""
    for world_size in (1, 2, 3, 4):
        codes, said = on_ranks(
            world_size, tmp_path / "said", trained, "--out", tmp_path / str(world_size)
        )
        assert codes == [0] * world_size, said
        assert said.count("Test retrieval") == 1 and "Traceback" not in said
        assert {path.name for path in (tmp_path / str(world_size)).iterdir()} == FILES
    alone = figures_in(tmp_path / "1")
    assert {"NMI", "R@60"} <= alone["test"]["sample"].keys() and "calibrated" in alone["test"]
    assert alone["test_counts"]["largest_R"] == 5 and alone["reidentification"]["modes"]
    embedded = safetensors.numpy.load_file(tmp_path / "1" / "embeddings.safetensors")
    for world_size in (2, 3, 4):
        many = tmp_path / str(world_size)
        others = safetensors.numpy.load_file(many / "embeddings.safetensors")
        assert {name: value.tobytes() for name, value in others.items()} == {
            name: value.tobytes() for name, value in embedded.items()
        }
        assert same_everywhere(figures_in(many)) == same_everywhere(alone)
        assert figures_in(many)["protocol"]["evaluated on"].endswith(f"fp32; {world_size} ranks")
        assert (many / "classes.json").read_bytes() == (tmp_path / "1/classes.json").read_bytes()
    assert not (trained / "metrics.json").exists()


def test_torchrun_starts_it(trained: Path, tmp_path: Path) -> None:
    done = launch(
        sys.executable,
        "-m",
        "namr_dist.launchers.torchrun",
        "--standalone",
        "--nproc-per-node",
        2,
        "--module",
        "namr_dist.launchers.evaluate",
        trained,
        "--out",
        tmp_path,
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert same_everywhere(json.loads(done.stdout)) == same_everywhere(figures_in(tmp_path))
    assert figures_in(tmp_path)["protocol"]["evaluated on"].endswith("; 2 ranks")


def test_a_training_state_has_files_of_its_own(
    trained: Path, unfinished: Path, forked_namr: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert forked_namr("evaluate", run).returncode == 0
    final = {name: (run / name).read_bytes() for name in FILES}
    for name in (f"step-{STEP}", f"step-{STEP:08d}"):
        done = forked_namr("evaluate", run, "--checkpoint", name, "--json")
        assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    written = json.loads((run / f"metrics-step-{STEP}.json").read_text())
    assert written == metrics | {"sha256": written["sha256"]}
    assert {name: (run / name).read_bytes() for name in FILES} == final
    assert metrics["train"]["steps"] == STEP
    protocol, of_final = metrics["protocol"], json.loads(final["metrics.json"])["protocol"]
    assert protocol["checkpoint"] == f"step-{STEP}, after {STEP} of 6 steps"
    assert {name: protocol[name] for name in ("train images", "train hash")} == {
        name: of_final[name] for name in ("train images", "train hash")
    }
    # Centres that have no place are not searched by.
    assert "structure" not in metrics["test"] and "calibrated" in metrics["test"]
    assert metrics["test"]["sample"] != json.loads(final["metrics.json"])["test"]["sample"]

    done = forked_namr("report", run, "--checkpoint", STEP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / f"report-step-{STEP}.html")
    assert f"step-{STEP}, after {STEP} of 6 steps" in (run / f"report-step-{STEP}.html").read_text()

    # Of a run that has not finished, the newest is measured and shown.
    done = forked_namr("report", unfinished)
    assert done.returncode == 2 and "has not finished, and none of its checkpoints" in done.stderr
    codes, said = on_ranks(2, tmp_path / "said", unfinished)
    assert codes == [0, 0] and said.count(f"not finished: its checkpoint step-{STEP} is taken") == 1
    theirs = json.loads((unfinished / f"metrics-step-{STEP}.json").read_text())
    assert same_everywhere(theirs) == same_everywhere(metrics)
    assert not (unfinished / "metrics.json").exists()
    done = forked_namr("report", unfinished, "--json")
    assert done.returncode == 0 and f"figures of step-{STEP} are shown" in done.stderr
    del theirs["sha256"]
    assert json.loads(done.stdout) == theirs and (unfinished / f"report-step-{STEP}.html").exists()
    done = forked_namr("evaluate", unfinished, "--checkpoint", "final")
    assert done.returncode == 2 and "run the training's command with --resume" in done.stderr


def test_figures_and_pages_go_where_they_are_asked_to(
    trained: Path, forked_namr: Callable, tmp_path: Path
) -> None:
    before = sorted(trained.rglob("*"))
    for words in (
        ("evaluate", trained, "--out", tmp_path / "own", "--split", "few"),
        ("report", trained, "--out", tmp_path / "own", "--split", "few"),
        ("report", trained, "--out", tmp_path / "own", "--split", "few", "--json"),
    ):
        done = forked_namr(*words)
        assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "own" / "metrics-few.json").read_text())
    del metrics["sha256"]
    assert json.loads(done.stdout) == metrics and metrics["protocol"]["test split"] == "few"
    assert (tmp_path / "own" / "report-few.html").exists()
    assert sorted(trained.rglob("*")) == before
    for words, said in (
        (("evaluate", trained, "--out", tmp_path / "no" / "no"), "is not a folder in a folder"),
        (("report", trained, "--out", tmp_path / "no" / "a.html"), "is not a file in a folder"),
        (("report", trained), "metrics.json is missing: evaluate the run first"),
        (("report", trained, "--checkpoint", "newest"), "--checkpoint is newest; give final"),
    ):
        done = forked_namr(*words)
        assert done.returncode == 2 and said in done.stderr, done.stderr


TRAP = """
import os, time
from namr_dist.errors import InputError
from namr_dist.retrieval.modes import Mode
from namr_dist.retrieval.vectors import sample_vectors

def vectors(queries, items):
    if os.environ["RANK"] == {rank!r}:
        raise InputError("this rank cannot go on")
    return sample_vectors(queries.z, items.z)

TRAP = Mode(name="trap", sentence="none", vectors=vectors)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_cannot_go_on_ends_all_with_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    """While the others wait for its share of a search."""
    module = f"trap_of_rank_{rank}"
    (tmp_path / f"{module}.py").write_text(TRAP.format(rank=rank))
    monkeypatch.syspath_prepend(tmp_path)
    codes, said = on_ranks(
        3, tmp_path / "said", trained, "--out", tmp_path / "out", "--mode", f"{module}:TRAP"
    )
    assert codes == [2, 2, 2], said
    assert said.count("namr: error:") == 1 and f"cannot go on (rank {rank} on " in said, said
    assert "Traceback" not in said and not list((tmp_path / "out").iterdir())
