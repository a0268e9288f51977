"""`namr bench data`, end to end on few images. What it says of speed is not tested: machines
differ."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from namr_dist.bench.data_providers import (
    STAGES,
    LapClock,
    Work,
    image_folder,
    namr,
    plain_webdataset,
    webdataset_torchvision,
)
from namr_dist.bench.example_set import make_example_set
from namr_dist.cli.main import main
from namr_dist.config import DataConfig
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import jpeg_size, verify_shards
from namr_dist.model.torchvision_shim import make_torchvision_importable


def test_all_ways_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.csv"
    words = [
        "bench",
        "data",
        "--images",
        "24",
        "--size",
        "64",
        "--repeats",
        "1",
        "--json",
        "--csv",
        str(path),
    ]
    assert main(words) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["images"] == 24 and output["size"] == 64 and output["left_out"] == ""
    assert [row["provider"] for row in output["rows"]] == [
        "namr",
        "WebDataset",
        "WebDataset, torchvision",
        "ImageFolder, torchvision",
    ]
    ours = output["rows"][0]
    assert ours["ratio"] == 1
    for row in output["rows"]:
        stages_us = sum(row[f"{stage}_us"] for stage in STAGES)
        assert stages_us == pytest.approx(1e6 / row["images_per_s"], rel=0.1), "a stage is missing"
        assert row["ratio"] == pytest.approx(ours["images_per_s"] / row["images_per_s"])
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [row["provider"] for row in output["rows"]]
    assert all(
        line["machine"] and line["commit"] and "Pillow" in line["libraries"] for line in lines
    )


def test_every_way_makes_every_image_once(shard_set: Manifest, tmp_path: Path) -> None:
    make_torchvision_importable()
    index = shard_set.index("train").only(np.arange(48))
    work = Work(manifest=shard_set, index=index, batch=16, size=32, data=DataConfig())
    for way in (
        namr(work),
        plain_webdataset(work),
        webdataset_torchvision(work),
        image_folder(work, tmp_path),
    ):
        clock = LapClock()
        assert list(way(clock)) == [16, 16, 16]
        assert all(clock.seconds[stage] > 0 for stage in STAGES)


def test_the_example_set_is_a_shard_set(tmp_path: Path) -> None:
    manifest = make_example_set(tmp_path, images=9)
    # Whole classes of four.
    assert verify_shards(Manifest.load(tmp_path), ["train"], decode=True) == 12
    index = manifest.index("train")
    images = ShardImages(
        manifest,
        index,
        Work(manifest=manifest, index=index, batch=4, size=64, data=DataConfig()).transform(),
    )
    sizes = [jpeg_size(images.jpeg(position), "x") for position in range(12)]
    assert all(320 <= side <= 500 for size in sizes for side in size) and len(set(sizes)) == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "0"], "--images is 0; set it to at least 1"),
        (
            ["--csv", "nowhere/figures.csv"],
            "--csv nowhere/figures.csv is not a file in a folder that exists; give one",
        ),
        (["nowhere"], "no shard set at nowhere"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "data", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
