"""Bad input: one clear line, no traceback, exit code 2, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import simplejpeg
from conftest import picture, small_run
from damaged_sets import with_images
from training_runs import Run, start_parent

from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.recipes.overrides import configure
from namr_dist.train.dry_run import dry_run


@pytest.fixture(scope="module")
def namr(forked_namr: Callable) -> Callable:
    """None of these is about starting."""
    return forked_namr


def refused(done: subprocess.CompletedProcess[str], *named: str, code: int = 2) -> None:
    lines = [line for line in done.stderr.splitlines() if line.startswith("namr: error: ")]
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout
    assert len(lines) == 1, done.stderr
    for word in named:
        assert word in lines[0]


def train(
    namr: Callable, manifest: Manifest, run: Path, *more: object
) -> subprocess.CompletedProcess[str]:
    return namr("train", "homeware_conv4", "--run-dir", run, *small_run(manifest, steps=2), *more)


def test_unknown_recipe(namr: Callable) -> None:
    refused(namr("train", "homewear"), "unknown recipe 'homewear'", "did you mean 'homeware'")


def test_no_shard_set(namr: Callable, tmp_path: Path) -> None:
    refused(
        namr(
            "train", "homeware", "--run-dir", tmp_path / "run", "--set.data.path", tmp_path / "none"
        ),
        "no shard set at",
        "manifest.json is missing",
    )
    assert not (tmp_path / "run").exists()


def test_missing_shard(namr: Callable, own_shard_set: Manifest, tmp_path: Path) -> None:
    (own_shard_set.folder / "train-1.tar").unlink()
    refused(train(namr, own_shard_set, tmp_path / "run"), "train-1.tar is missing", "copy it")


def test_wrong_hash(namr: Callable, own_shard_set: Manifest, tmp_path: Path) -> None:
    path = own_shard_set.folder / "train-0.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    refused(train(namr, own_shard_set, tmp_path / "run"), "train-0.tar has sha256", "copy it again")


def test_truncated_jpeg(namr: Callable, own_shard_set: Manifest, tmp_path: Path) -> None:
    """A shard whose hash is right, but which was built from a part of an image."""
    with_images(own_shard_set, {"003_2": simplejpeg.encode_jpeg(picture(3, 2))[:700]})
    refused(
        train(namr, own_shard_set, tmp_path / "run"),
        "003_2.jpg in",
        "train-0.tar is a truncated JPEG",
    )
    refused(namr("shards", "verify", own_shard_set.folder), "003_2.jpg in", "is a truncated JPEG")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            ("--set.data.classes_per_batch", 13),
            "data.classes_per_batch is 13, but the training images are of 12 classes",
        ),
        (
            ("--set.data.images_per_class", 7),
            "data.images_per_class is 7, but the largest class has 6 images",
        ),
        (("--set.data.images_per_class", 1), "data.images_per_class is 1; set it to at least 2"),
        (
            ("--set.data.train_splits", "training"),
            "has no split 'training'; it has train, val, test",
        ),
        (("--set.model.backbone", "resnet50"), "model.backbone is 'resnet50'; known are"),
        (
            ("--set.model.batchnorm", "frozen"),
            "conv4 starts from scratch, so its batch norm cannot be frozen",
        ),
        (("--set.data.image_size", 50), "images are 50×50 px"),
        (("--set.optim.steps", 0), "optim.steps is 0; set it to at least 1"),
        (("--set.data.test_split", "tset"), "has no split 'tset'; it has train, val, test"),
        (
            ("--set.data.train_splits", "train", "test"),
            "split 'test' is both in data.train_splits and in data.test_split",
        ),
        (("--set.model.delta", 1.0), "model.delta is 1.0; set it between 0 and 1"),
        (
            ("--set.data.views", 2),
            "data.views is 2, which does not divide data.images_per_class (3)",
        ),
        (
            ("--set.data.sampling", "category", "--set.data.categories_per_batch", 4),
            "which does not divide",
        ),
        (
            ("--set.data.sampling", "category", "--set.data.shuffle", "shards"),
            "set data.shuffle to classes",
        ),
        (("--set.data.categories", "birds"), "data.categories names 'birds'"),
        (("--set.data.least_images", 7), "is left by data.categories"),
        (("--set.evaluation.recall_at", 0), "evaluation.recall_at is 0; set it to at least 1"),
    ],
)
def test_impossible_settings(
    shard_set: Manifest, tmp_path: Path, change: tuple, named: str
) -> None:
    config = configure("homeware_conv4", [str(word) for word in (*small_run(shard_set), *change)])
    with pytest.raises(InputError, match=re.escape(named)):
        dry_run(config, tmp_path / "run", ranks=1, overwrite=False, resume=False, words=[])


def test_an_impossible_setting_is_one_line(
    namr: Callable, shard_set: Manifest, tmp_path: Path
) -> None:
    refused(
        train(namr, shard_set, tmp_path / "run", "--set.data.classes_per_batch", 13),
        "data.classes_per_batch is 13, but the training images are of 12 classes",
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"loss.ranking.clusters": 1}, "loss.ranking.clusters is 1"),
        ({"train.seed": -1}, "train.seed is -1"),
        ({"data.crop_ratio": "0 1"}, "data.crop_ratio is"),
        ({"data.test_crop": 2.0}, "data.test_crop is 2.0"),
        ({"optim.head_lr": -1.0}, "optim.head_lr is -1.0"),
        ({"model.structure_hidden": 0}, "structure_hidden is 0"),
        ({"loss.ranking.floor": 1.5}, "loss.ranking.floor is 1.5"),
        ({"data.crop_scale": "0.9 0.2"}, "crop_scale is"),
        ({"optim.warmup_steps": 500}, "optim.warmup_steps is 500"),
    ],
)
def test_settings_out_of_range(change: dict[str, object], named: str) -> None:
    words = [
        word for name, value in change.items() for word in (f"--set.{name}", *str(value).split())
    ]
    with pytest.raises(InputError, match=named):
        configure("homeware", words).check()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "homeware", "--set.data.nothing", "1"),
        ("train", "homeware", "--set.optim.steps", "many"),
        ("train", "homeware", "--set.loss.metric", "contrastive"),
        ("train",),
        ("fly",),
        (),
        ("evaluate", "x", "--set.train.seed", "1"),
    ],
)
def test_wrong_words(namr: Callable, words: tuple[str, ...]) -> None:
    done = namr(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_run_folder_is_a_file(namr: Callable, shard_set: Manifest, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    refused(
        train(namr, shard_set, tmp_path / "run"), "run cannot be written (File exists)", "--run-dir"
    )


def test_unwritable_run_folder(namr: Callable, shard_set: Manifest) -> None:
    """/proc refuses new folders to everyone, root included."""
    refused(train(namr, shard_set, Path("/proc/run")), "/proc/run cannot be written", "--run-dir")


def test_run_that_is_there_already(namr: Callable, shard_set: Manifest, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    refused(train(namr, shard_set, tmp_path / "run"), "already holds a run", "--overwrite")
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 48 MiB, mounted by root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_too_little_room_is_said_before_training(
    namr: Callable, shard_set: Manifest, small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(40 << 20))
    refused(
        train(namr, shard_set, small_disk / "run"), "has 8 MiB free, this run needs", "--run-dir"
    )
    assert not (small_disk / "run").exists()
    old = small_disk / "run" / "checkpoints" / "final.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"weights")
    (small_disk / "run" / "config.json").write_text("{}")
    refused(train(namr, shard_set, small_disk / "run", "--overwrite"), "has 8 MiB free")
    assert old.read_bytes() == b"weights", "the old run went although no new one could begin"


def test_disk_that_fills_up_while_training(
    shard_set: Manifest, small_disk: Path, tmp_path: Path
) -> None:
    """There was room at the start; something else takes it. The line names the file and nothing
    half-written stays."""
    start_parent()
    folder = small_disk / "run"
    words = ["homeware_conv4", "--run-dir", folder, *small_run(shard_set, steps=20)]
    run = Run(1, words, tmp_path / "said")
    run.until((folder / "metrics.jsonl").exists)
    os.kill(run.pid(0), signal.SIGSTOP)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(64 << 20))
    os.kill(run.pid(0), signal.SIGCONT)
    (code,) = run.wait()
    done = subprocess.CompletedProcess(words, code, "", run.said())
    refused(done, "No space left on device", str(folder), code=74)
    assert not (folder / "checkpoints" / "final.safetensors").exists()


def test_paths_of_the_wrong_kind(namr: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(namr("evaluate", tmp_path / "file"), "Not a directory", "file")
    refused(
        namr("embed", tmp_path, "--images", tmp_path, "--out", tmp_path),
        "--out",
        "not a file in a folder",
    )


def test_shard_that_vanishes_unverified(
    namr: Callable, own_shard_set: Manifest, tmp_path: Path
) -> None:
    (own_shard_set.folder / "train-1.tar").unlink()
    refused(
        train(namr, own_shard_set, tmp_path / "run", "--set.data.verify", "False"),
        "train-1.tar cannot be read",
    )


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_not_a_run(namr: Callable, tmp_path: Path, verb: str) -> None:
    refused(namr(verb, tmp_path), "config.json is missing", "not the folder of a run")
