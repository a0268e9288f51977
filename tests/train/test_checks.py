"""Checks before the first step, for any number of ranks, and what they leave behind: nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import simplejpeg
from conftest import picture, small_run
from damaged_sets import with_images

from namr_dist.cluster.checks import weights
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.recipes.overrides import configure
from namr_dist.run.folder import RunFolder
from namr_dist.train.dry_run import dry_run


def run_dry(
    manifest: Manifest,
    run: Path,
    *more: object,
    ranks: int = 2,
    overwrite: bool = False,
    resume: bool = False,
) -> str:
    config = configure("homeware_conv4", [str(word) for word in (*small_run(manifest), *more)])
    return "\n".join(
        dry_run(
            config, run, ranks=ranks, overwrite=overwrite, resume=resume, words=["homeware_conv4"]
        )
    )


def test_figures(shard_set: Manifest, tmp_path: Path) -> None:
    said = run_dry(shard_set, tmp_path / "run", ranks=3)
    for words in (
        "nothing wrong found for 3 rank(s)",
        "72 images, 12 classes",
        "6 × 3 = 18 images; 6 a rank",
        "2 steps; the run's 6 are 3.0 epochs",
        "--nproc-per-node 3",
        "srun --ntasks 3 --kill-on-bad-exit=1 namr train",
    ):
        assert words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "more", "named"),
    [
        (4, [], "data.classes_per_batch is 6, which 4 ranks cannot share equally"),
        (0, [], "--ranks is 0"),
        (2, ["--set.data.classes_per_batch", 36], "the training images are of 12 classes"),
        # The validation split has 24 images.
        (25, [], "'val' of .* has fewer images than there are ranks"),
        (2, ["--set.model.backbone", "resnet50"], "known are conv4"),
        (2, ["--set.data.image_size", 50], "images are 50×50 px"),
        (
            2,
            ["--set.model.backbone", "timm:resnet18", "--set.model.weights", "/nowhere.pt"],
            "/nowhere.pt is no file",
        ),
    ],
)
def test_mistakes(
    shard_set: Manifest, tmp_path: Path, ranks: int, more: list[object], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        run_dry(shard_set, tmp_path / "run", *more, ranks=ranks)
    assert not (tmp_path / "run").exists()


def test_a_subset_of_the_training_images_is_no_test(
    own_shard_set: Manifest, tmp_path: Path
) -> None:
    replace(own_shard_set, subsets={"few": own_shard_set.index("train").keys[:30]}).save()
    with pytest.raises(
        InputError, match="train and few of .* share 5 classes; name splits that share none"
    ):
        run_dry(own_shard_set, tmp_path / "run", "--set.data.test_split", "few")


def test_validation_and_test_share_no_class(own_shard_set: Manifest, tmp_path: Path) -> None:
    keys = own_shard_set.index("test").keys
    replace(own_shard_set, subsets={"small": keys[:12], "large": keys[:24]}).save()
    with pytest.raises(InputError, match="small and large of .* share 2 classes"):
        run_dry(
            own_shard_set,
            tmp_path / "run",
            "--set.data.validation_split",
            "small",
            "--set.data.test_split",
            "large",
        )


def test_a_set_without_validation_classes(shard_set: Manifest, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="no split 'vall' to validate on; .*; set data.validation_split to None"
    ):
        run_dry(shard_set, tmp_path / "run", "--set.data.validation_split", "vall")


def test_a_split_without_pairs_measures_nothing(own_shard_set: Manifest, tmp_path: Path) -> None:
    test = own_shard_set.index("test")
    replace(own_shard_set, subsets={"lone": test.keys[::6]}).save()
    with pytest.raises(
        InputError, match="split 'lone' of .* has no query with another image of its class to find"
    ):
        run_dry(own_shard_set, tmp_path / "run", "--set.data.test_split", "lone")


def test_a_truncated_validation_image_is_seen_before(
    own_shard_set: Manifest, tmp_path: Path
) -> None:
    """data.damaged_images is about training images."""
    with_images(own_shard_set, {"012_3": simplejpeg.encode_jpeg(picture(12, 3))[:700]})
    with pytest.raises(InputError, match="012_3.jpg in .*val-0.tar is a truncated JPEG"):
        run_dry(own_shard_set, tmp_path / "run", "--set.data.damaged_images", "replace")


def test_damaged_shard(own_shard_set: Manifest, tmp_path: Path) -> None:
    (own_shard_set.folder / "train-1.tar").unlink()
    with pytest.raises(InputError, match="train-1.tar is missing"):
        run_dry(own_shard_set, tmp_path / "run")


def test_a_run_that_is_there(shard_set: Manifest, tmp_path: Path) -> None:
    config = configure("homeware_conv4", [str(word) for word in small_run(shard_set)])
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(InputError, match="already holds a run"):
        run_dry(shard_set, tmp_path)
    with pytest.raises(InputError, match="belongs to another run: train.seed is 1, there 0"):
        run_dry(shard_set, tmp_path, "--set.train.seed", 1, resume=True)
    for way in ({"overwrite": True}, {"resume": True}):
        assert "nothing wrong" in run_dry(shard_set, tmp_path, **way)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_run_that_goes_on_needs_no_initial_weights(shard_set: Manifest, tmp_path: Path) -> None:
    """They are in its checkpoint."""
    words = ("--set.model.backbone", "timm:resnet18", "--set.model.weights", "/nowhere.pt")
    config = configure("homeware_conv4", [str(word) for word in (*small_run(shard_set), *words)])
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(InputError, match="model.weights /nowhere.pt is no file"):
        run_dry(shard_set, tmp_path, *words, resume=True)
    with pytest.raises(InputError, match="model.weights /nowhere.pt is no file"):
        weights(config, tmp_path)
    checkpoint = RunFolder(tmp_path).checkpoint(4)
    checkpoint.mkdir(parents=True)
    assert "nothing wrong" in run_dry(shard_set, tmp_path, *words, resume=True)
    assert weights(config, tmp_path) == "checkpoint"


def test_a_folder_of_something_else(shard_set: Manifest, tmp_path: Path) -> None:
    """Files under a run's names, and no config.json: nobody said that they may go."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("weights")
    for resume in (False, True):
        with pytest.raises(InputError, match="checkpoints is there, but .*config.json is not"):
            run_dry(shard_set, tmp_path, resume=resume)
    assert (tmp_path / "checkpoints" / "mine.pt").read_text() == "weights"


def test_command_line(forked_namr: Callable, shard_set: Manifest, tmp_path: Path) -> None:
    """By default as many ranks as were launched, and only the first speaks."""
    words = ["train", "homeware_conv4", "--run-dir", tmp_path / "run", *small_run(shard_set)]
    launched = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    first, second = (
        forked_namr(*words, "--dry-run", env={**launched, "RANK": rank}) for rank in "01"
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "for 2 rank(s)" in first.stdout and not second.stdout
    refused = forked_namr(*words, "--ranks", 2)
    assert refused.returncode == 2 and "--ranks is 2, which goes with --dry-run" in refused.stderr
    assert not (tmp_path / "run").exists()
