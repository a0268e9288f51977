"""Write the tables of docs/benchmarks.md from the recipes and
docs/results/published-benchmarks.csv.

python tools/make_benchmarks.py
"""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

from namr_dist import recipes
from namr_dist.config import Config
from namr_dist.data.build.formats import cars, cub, inshop, sop, vehicleid

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

BENCHMARKS: dict[str, tuple[str, ModuleType, str]] = {
    "sop": ("Stanford Online Products", sop, "leave one out"),
    "inshop": ("In-Shop Clothes Retrieval", inshop, "queries search the gallery"),
    "cub": ("CUB-200-2011", cub, "leave one out"),
    "cars": ("Cars196", cars, "leave one out"),
    "vehicleid": ("PKU VehicleID", vehicleid, "leave one out, and re-identification (CMC, mAP)"),
}
"""By name of the converter: title, its module, how the test images are measured."""

SETTINGS: dict[str, str] = {
    "sop": "Roth et al. 2020",
    "sop_vit_small": "Ermolov et al. 2022",
    "inshop": "Roth et al. 2019",
    "inshop_vit_small": "Ermolov et al. 2022",
    "cub": "Roth et al. 2020",
    "cub_vit_small": "Ermolov et al. 2022",
    "cars": "Roth et al. 2020",
    "cars_vit_small": "Ermolov et al. 2022",
    "vehicleid": "Brown et al. 2020",
    "vehicleid_vit_small": "Ermolov et al. 2022",
}
"""Recipe → whose settings it has, as its docstring names them."""

TRAIN_IMAGES = {"vehicleid": 113_346}
"""Where the converter expects no number, for sources differ: the one that the recipe goes by."""

RESNET50_A100 = 2_470
"""Images a second in training, 224 px, mixed precision, one A100 80 GB. Source: NVIDIA
DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md, container 21.03."""
RESNET50_3090, VIT_SMALL_3090 = 1_218.01, 1_057.92
"""The same on one RTX 3090, channels last: pytorch-image-models, results/
benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, rows resnet50 and vit_small_patch16_224."""

PUBLISHED = {
    "ermolov2022": "Ermolov et al. 2022",
    "kim2020": "Kim et al. 2020",
    "ren2024": "Ren et al. 2024",
    "roth2019": "Roth et al. 2019",
    "wang2019": "Wang et al. 2019",
    "wen2022": "Wen et al. 2022",
}
"""Keys of the CSV's column `source`."""


def main() -> None:
    """Replace what stands between the page's marks."""
    page = DOCS / "benchmarks.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{tables()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def tables() -> str:
    """All that stands between the marks: an overview, then a section a benchmark."""
    overview = [
        [
            title,
            _range(name, "ResNet-50"),
            _range(name, "ViT-S/16"),
            *(f"{gpu_hours(recipes.find(recipe)):.2f}" for recipe in (name, f"{name}_vit_small")),
        ]
        for name, (title, *_) in BENCHMARKS.items()
    ]
    heading = [
        "benchmark",
        "R@1 published (not run here), ResNet-50",
        "R@1 published (not run here), ViT-S/16",
        "A100 hours, ResNet-50",
        "A100 hours, ViT-S/16",
    ]
    sections = [_section(name) for name in BENCHMARKS]
    return "\n\n".join([_table(heading, overview, words={0}), *sections])


def published() -> list[dict[str, str]]:
    """The rows of docs/results/published-benchmarks.csv."""
    with open(DOCS / "results" / "published-benchmarks.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gpu_hours(config: Config) -> float:
    """Estimated hours of one A100 at its published rate; nothing but training steps."""
    transformer = "vit_small" in config.model.backbone
    rate = RESNET50_A100 * (VIT_SMALL_3090 / RESNET50_3090 if transformer else 1)
    return images_seen(config) / rate / 3600


def images_seen(config: Config) -> int:
    """Images that pass through the network in all steps."""
    return config.optim.steps * config.data.classes_per_batch * config.data.images_per_class


def _section(name: str) -> str:
    title, _, protocol = BENCHMARKS[name]
    rows = [
        [
            f"`{recipe}`",
            SETTINGS[recipe],
            f"{config.data.classes_per_batch} × {config.data.images_per_class}",
            f"{config.optim.steps:,}",
            f"{images_seen(config) / _train_images(name):,.0f}",
            f"{gpu_hours(config):.2f}",
        ]
        for recipe in (name, f"{name}_vit_small")
        for config in (recipes.find(recipe),)
    ]
    heading = ["recipe", "settings of", "batch", "steps", "passes over the images", "A100 hours"]
    figures = [
        [
            row["method"],
            row["backbone"],
            row["width"] or "–",
            row["recall_at_1"],
            row["map_at_r"] or "–",
            PUBLISHED[row["source"]],
            "not run here",
        ]
        for row in published()
        if row["benchmark"] == name
    ]
    columns = ["published: loss", "backbone", "width", "R@1", "MAP@R", "source", "here"]
    return "\n\n".join(
        [
            f"### {title}",
            f"{_splits(name)}; {protocol}.",
            _table(heading, rows, words={0, 1}),
            _table(columns, figures, words={0, 1, 5, 6}),
        ]
    )


def expected(name: str) -> dict[str, int]:
    """Counts that the converter of that name compares a download with."""
    counts: dict[str, int] = BENCHMARKS[name][1]._EXPECTED
    return counts


def _train_images(name: str) -> int:
    return expected(name).get("train images") or TRAIN_IMAGES[name]


def _splits(name: str) -> str:
    """Images and classes of each split, as a sentence."""
    counts = expected(name)
    parts = []
    for split in dict.fromkeys(key.rsplit(" ", 1)[0] for key in counts if " " in key):
        images, classes = (counts.get(f"{split} {what}") for what in ("images", "classes"))
        if images:
            parts.append(f"{split}: {images:,} images of {classes:,} classes")
        elif "query classes" not in counts or split != "test":
            parts.append(f"{split}: {classes:,} classes")
    return "; ".join(parts)


def _range(name: str, backbone: str) -> str:
    """Lowest and highest published R@1 of a backbone."""
    figures = sorted(
        (
            row["recall_at_1"]
            for row in published()
            if row["benchmark"] == name and row["backbone"].startswith(backbone)
        ),
        key=float,
    )
    return f"{figures[0]}–{figures[-1]}" if figures else "none found"


def _table(heading: list[str], lines: list[list[str]], *, words: set[int]) -> str:
    marks = ["---" if column in words else "---:" for column in range(len(heading))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, marks, *lines))


if __name__ == "__main__":
    main()
