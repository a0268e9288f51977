"""Counts of a set that is known image by image."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree
from pathlib import Path

import pytest
import simplejpeg
from conftest import picture

from namr_dist.cli.main import main
from namr_dist.data.shardset.histogram import histogram_svg
from namr_dist.data.shardset.manifest import ImageClass, Manifest
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.data.shardset.statistics import bins_of, statistics

# Label, images, category: two training classes have one image; tests have roles.
CLASSES = [
    (0, 1, "birds", "train"),
    (1, 4, "birds", "train"),
    (2, 1, "<cars>", "train"),
    (3, 4, "<cars>", "train"),
    (4, 4, "", "train"),
    (10, 3, "birds", "test"),
    (11, 2, "birds", "test"),
    (12, 2, "<cars>", "test"),
]
ROLES = ("query", "gallery", "gallery", "query", "query", "", "gallery")
GROUPS = ("1", "1", "2", "1", "1", "1", "2")


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("varied")
    classes = {
        label: ImageClass(label=label, name=f"c{label}", category=category, split=split)
        for label, _, category, split in CLASSES
    }
    shards = []
    for split in ("train", "test"):
        samples = [
            Sample(
                key=f"{label}-{view}",
                label=label,
                jpeg=simplejpeg.encode_jpeg(picture(label, view, size=40 + label)[:32]),
            )
            for label, images, _, own in CLASSES
            if own == split
            for view in range(images)
        ]
        shards.append(write_shard(folder, f"{split}.tar", split, samples, classes))
    shards[1] = dataclasses.replace(shards[1], roles=ROLES, groups=GROUPS)
    manifest = Manifest(
        name="a < b",
        description="",
        classes=tuple(classes.values()),
        shards=tuple(shards),
        folder=folder,
        subsets={"small": ("10-0", "10-1", "12-0", "12-1")},
    )
    manifest.save()
    return manifest


def test_splits_and_subsets(varied: Manifest) -> None:
    figures = statistics(varied)
    train, test, small = (
        figures["splits"]["train"],
        figures["splits"]["test"],
        figures["subsets"]["small"],
    )
    assert (
        train["images"],
        train["classes"],
        train["images_per_class"],
        train["least"],
        train["most"],
    ) == (14, 5, 2.8, 1, 4)
    assert (train["query"], train["gallery"], train["groups"]) == (0, 0, 5)
    assert (test["images"], test["classes"], test["query"], test["gallery"], test["groups"]) == (
        7,
        3,
        3,
        3,
        5,
    )
    assert (small["images"], small["classes"], small["shards"]) == (4, 2, 1)
    assert train["mib"] * 2**20 == pytest.approx(sum(varied.shards[0].lengths))


def test_lone_classes_have_nothing_to_find(varied: Manifest) -> None:
    """One image, or queries without a gallery; a query and an image of both roles are a pair."""
    figures = statistics(varied)
    assert figures["splits"]["train"]["lone_classes"] == 2
    assert figures["splits"]["test"]["lone_classes"] == 1  # class 11: two queries


def test_image_sizes(varied: Manifest) -> None:
    row = statistics(varied, sizes=True)["splits"]["train"]
    assert row["height"] == {"least": 32, "median": 32.0, "most": 32}
    assert row["width"] == {"least": 40, "median": 43.0, "most": 44}
    assert "width" not in statistics(varied)["splits"]["train"]


def test_super_classes_come_most_numerous_first(varied: Manifest) -> None:
    categories = statistics(varied)["categories"]
    assert list(categories) == ["birds", "<cars>", ""]
    assert categories["birds"] == {"classes": 4, "images": {"train": 5, "test": 5}}
    plain = dataclasses.replace(
        varied, classes=tuple(dataclasses.replace(entry, category="") for entry in varied.classes)
    )
    assert statistics(plain)["categories"] == {}


def test_histogram_counts_every_class_once(varied: Manifest) -> None:
    histogram = statistics(varied)["histogram"]
    assert histogram["bins"] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert histogram["classes"] == {"train": [2, 0, 0, 3], "test": [0, 2, 1, 0]}


@pytest.mark.parametrize(
    ("least", "most", "first", "last", "number"),
    [
        (6, 6, (6, 6), (6, 6), 1),
        (2, 12, (2, 2), (12, 12), 11),
        (1, 16, (1, 1), (16, 16), 16),
        (1, 17, (0, 1), (16, 17), 9),
        (41, 60, (40, 41), (60, 61), 11),
        (1, 1500, (0, 99), (1500, 1599), 16),
    ],
)
def test_bins(least: int, most: int, first: tuple, last: tuple, number: int) -> None:
    bins = bins_of(least, most)
    assert (bins[0], bins[-1], len(bins)) == (first, last, number)
    assert all(after[0] == before[1] + 1 for before, after in zip(bins, bins[1:], strict=False))


def test_picture_is_svg_with_a_bar_for_each_bin(varied: Manifest) -> None:
    root = xml.etree.ElementTree.fromstring(histogram_svg(statistics(varied)))
    space = "{http://www.w3.org/2000/svg}"
    bars = [
        (float(bar.get("height", "")), panel)
        for panel, group in enumerate(root.iter(f"{space}g"))
        for bar in group.iter(f"{space}rect")
    ]
    assert [panel for _, panel in bars] == [0, 0, 1, 1]
    # Two lone classes, three of four images.
    assert bars[0][0] / bars[1][0] == pytest.approx(2 / 3, abs=1e-3)
    assert "a < b: classes by number of images" in [text.text for text in root.iter(f"{space}text")]


def test_the_command(
    varied: Manifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder, picture_file = str(varied.folder), tmp_path / "histogram.svg"
    assert (
        main(
            [
                "shards",
                "stats",
                folder,
                "--images",
                "--near-duplicates",
                "--picture",
                str(picture_file),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert picture_file.read_text() == histogram_svg(statistics(varied))
    assert "…" not in said.out and "32 / 32 / 32" in said.out and not said.err
    birds = next(line for line in said.out.splitlines() if "birds" in line)
    assert [word for word in birds.replace("│", " ").split() if word.isdigit()] == ["4", "5", "5"]
    assert main(["shards", "stats", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(statistics(varied)))
    assert main(["shards", "stats", folder, "--picture", str(tmp_path / "none" / "x.svg")]) == 2
    assert "is not a file in a folder that exists" in capsys.readouterr().err
