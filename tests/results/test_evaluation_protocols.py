"""Whole runs measured otherwise than leave one out: a gallery apart from the queries, and
re-identification."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from conftest import make_shards, small_run

from namr_dist import verified_json
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.results.evaluate_run import evaluate_run, report_run
from namr_dist.results.export import export_run
from namr_dist.results.record import trained_config

KS = (1, 3, 40)


@pytest.fixture(scope="module")
def queries_and_gallery(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of each of 6 test classes' six images two query, three are searched, and the last is both.
    The first three are of one group, the others of another."""
    manifest = make_shards(tmp_path_factory.mktemp("shards"), classes={"train": 12, "test": 6})
    role_of_view = ("query", "gallery", "gallery", "query", "gallery", "")
    shards = tuple(
        dataclasses.replace(
            shard,
            roles=tuple(role_of_view[int(key[-1])] for key in shard.keys),
            groups=tuple("first" if int(key[-1]) < 3 else "second" for key in shard.keys),
        )
        if shard.split == "test"
        else shard
        for shard in manifest.shards
    )
    manifest = dataclasses.replace(manifest, shards=shards)
    manifest.save()
    return manifest


@pytest.fixture(scope="module")
def evaluated(
    queries_and_gallery: Manifest, forked_namr: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("runs") / "roles"
    for words in (
        (
            "train",
            "homeware_conv4",
            "--run-dir",
            run,
            *small_run(queries_and_gallery, steps=3),
            "--set.data.validation_split",
            "None",
            "--set.evaluation.recall_at",
            *KS,
            "--set.evaluation.reidentification_draws",
            3,
            "--set.train.tensorboard",
            "False",
        ),
        ("evaluate", run),
    ):
        done = forked_namr(*words)
        assert done.returncode == 0, done.stderr
    assert "18 queries, 0 left out, 24 images searched" in done.stdout and "CMC@5" in done.stdout
    return run


def test_figures_follow_from_the_embeddings(evaluated: Path, queries_and_gallery: Manifest) -> None:
    tensors = safetensors.numpy.load_file(evaluated / "embeddings.safetensors")
    z, labels, roles = tensors["z"].astype(np.float64), tensors["labels"], tensors["roles"]
    assert roles.dtype == np.int8 and np.bincount(roles).tolist() == [6, 12, 18]
    queries, items = np.flatnonzero(roles != 2), np.flatnonzero(roles != 1)
    expected = {f"R@{k}": 0.0 for k in KS} | {"R-precision": 0.0}
    for query in queries:
        others = items[items != query]
        ranked = labels[others[np.argsort(((z[query] - z[others]) ** 2).sum(1), kind="stable")]]
        relevant = int((labels[others] == labels[query]).sum())
        assert relevant == (3 if roles[query] == 0 else 4)
        for k in KS:
            expected[f"R@{k}"] += 100 / len(queries) * bool((ranked[:k] == labels[query]).any())
        expected["R-precision"] += 100 / len(queries) * (ranked[:relevant] == labels[query]).mean()
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert {name: metrics["test"]["sample"][name] for name in expected} == pytest.approx(expected)
    assert metrics["test"]["sample"]["R@40"] == 100
    counts = metrics["test_counts"]
    assert (counts["queries"], counts["left_out"], counts["items"]) == (18, 0, 24)
    for row in (*metrics["test"].values(), *metrics["baselines"].values()):
        assert [name for name in row if name.startswith("R@")] == ["R@1", "R@3", "R@40"]
    assert metrics["protocol"]["query"] == (
        "18 queries search 24 gallery images; 6 images are both, and of those the "
        "own index is left out"
    )


def test_other_metrics_and_results_of_other_groups_alone(
    evaluated: Path, queries_and_gallery: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "other"
    also = ("mAP@3", "precision@3", "MRR")
    evaluate = ("evaluate", evaluated, "--out", out, "--recall-at", 1, 40, "--also", *also)
    done = forked_namr(*evaluate, "--without-own-group", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    tensors = safetensors.numpy.load_file(out / "embeddings.safetensors")
    z, labels, roles = tensors["z"].astype(np.float64), tensors["labels"], tensors["roles"]
    groups = queries_and_gallery.index("test").group_N
    queries, items = np.flatnonzero(roles != 2), np.flatnonzero(roles != 1)
    expected = dict.fromkeys(("R@1", "MAP@R", *also), 0.0)
    for query in queries:
        own = (labels[items] == labels[query]) & (groups[items] == groups[query])
        others = items[~own]
        ranked = others[np.argsort(((z[query] - z[others]) ** 2).sum(1), kind="stable")]
        right = labels[ranked] == labels[query]
        relevant = int(right.sum())
        assert relevant == 2
        precision = np.cumsum(right) / np.arange(1, len(right) + 1)
        share = 100 / len(queries)
        expected["R@1"] += share * right[0]
        expected["MAP@R"] += share * (precision * right)[:relevant].sum() / relevant
        expected["mAP@3"] += share * (precision * right)[:3].sum() / max(1, right[:3].sum())
        expected["precision@3"] += share * right[:3].sum() / min(3, relevant)
        expected["MRR"] += share / (1 + right.argmax())
    sample = told["test"]["sample"]
    assert {name: sample[name] for name in expected} == pytest.approx(expected)
    assert told["test_protocol"]["same_class_and_group"] == "left out"
    assert set(also) <= told["baselines"]["raw pixels"].keys()
    done = forked_namr("evaluate", evaluated, "--also", "F1")
    assert done.returncode == 2 and "'F1' is no further metric" in done.stderr


def test_re_identification_stands_beside(evaluated: Path) -> None:
    block = json.loads((evaluated / "metrics.json").read_text())["reidentification"]
    assert (block["draws"], block["gallery"], block["queries"]) == (3, 6, 30)
    for figures in block["modes"].values():
        assert (
            0 <= figures["CMC@1"] <= figures["mAP"] <= 100
            and figures["CMC@1"] <= figures["CMC@5"] <= 100
        )


def test_the_report_tells_the_protocol(evaluated: Path) -> None:
    page = report_run(evaluated).read_text()
    for words in (
        "Each of 18 test images then searched a gallery of 24",
        "of its class in the gallery",
        "18 queries search 24 gallery images",
        "Re-identification",
        '<th scope="col">CMC@1</th>',
        '<th scope="col">R@40</th>',
    ):
        assert words in page, words
    assert "searched all the others" not in page


def test_embed_keeps_the_roles(
    evaluated: Path, queries_and_gallery: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "test.safetensors"
    done = forked_namr("embed", evaluated, "--shards", queries_and_gallery.folder, "--out", out)
    assert done.returncode == 0, done.stderr
    assert (
        safetensors.numpy.load_file(out)["roles"].tolist()
        == queries_and_gallery.index("test").role_N.tolist()
    )


def test_a_split_without_a_gallery_is_named(evaluated: Path, queries_and_gallery: Manifest) -> None:
    shards = tuple(
        dataclasses.replace(shard, roles=("query",) * len(shard.keys))
        if shard.split == "test"
        else shard
        for shard in queries_and_gallery.shards
    )
    dataclasses.replace(queries_and_gallery, shards=shards).save()
    try:
        with pytest.raises(
            InputError, match="split 'test' of .* has query images only; .* its gallery images"
        ):
            evaluate_run(evaluated)
    finally:
        queries_and_gallery.save()


def test_another_part_of_the_set_at_another_place(
    evaluated: Path, queries_and_gallery: Manifest, tmp_path: Path
) -> None:
    """As VehicleID's three lists are measured from one run."""
    moved = tmp_path / "moved"
    shutil.copytree(queries_and_gallery.folder, moved)
    whole = Manifest.load(moved)
    keys = tuple(key for key in whole.index("test").keys if key[:3] in ("012", "015"))
    dataclasses.replace(whole, subsets={"few": keys, "seen": whole.index("train").keys}).save()
    before = (evaluated / "metrics.json").read_bytes()
    few = evaluate_run(evaluated, shards=str(moved), split="few", recall_at=(2,))
    assert few["test_counts"]["queries"] == 6 and few["protocol"]["test split"] == "few"
    assert "R@2" in few["test"]["sample"] and "R@3" not in few["test"]["sample"]
    written = (evaluated / "metrics-few.json").read_bytes()
    assert verified_json.loads(written, "metrics-few.json", "") == few
    assert (
        len(safetensors.numpy.load_file(evaluated / "embeddings-few.safetensors")["labels"]) == 12
    )
    assert (evaluated / "metrics.json").read_bytes() == before
    with pytest.raises(
        InputError, match="12 classes of 'seen' .* are of the splits that were trained on"
    ):
        evaluate_run(evaluated, shards=str(moved), split="seen")


def test_nothing_that_a_runs_file_names_is_run_imported_or_written(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command; a scheme for which fsspec would import a module, alone and behind another; a cache
    that is none."""
    (tmp_path / "trap_of_a_run.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    fsspec.register_implementation("trap", "trap_of_a_run.Store", clobber=True)
    run = tmp_path / "foreign"
    shutil.copytree(evaluated, run)
    config = json.loads((run / "config.json").read_text())
    for location, said in (
        (
            f"pipe:touch {tmp_path}/ran; cat {{}}",
            "reads its shards by a command .*; .* give it with --shards",
        ),
        ("trap://set", "^trap://… cannot be read: nothing here reads such URLs; give one of http"),
        ("reference://::trap://set", "^reference://… cannot be read: nothing here reads such"),
        ("s3://bucket/set::trap://set", "^s3://… cannot be read: nothing here reads such"),
    ):
        config["data"]["path"] = location
        config["data"]["remote"]["cache"] = str(tmp_path / "elsewhere")
        (run / "config.json").write_text(json.dumps(config))
        for use in (evaluate_run, report_run, lambda run: export_run(run, tmp_path / "exported")):
            with pytest.raises(InputError, match=said):
                use(run)
        assert not (tmp_path / "ran").exists() and not (tmp_path / "exported").exists()
    assert trained_config(run).data.remote.cache is None
    for name in ("manifests", "shards"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
    assert trained_config(run).data.remote.cache == tmp_path / "elsewhere"
