"""The recipes of the five benchmarks: their facts, short runs on miniatures, their page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import miniatures
import pytest
import torch
from conftest import REPOSITORY

from namr_dist import recipes
from namr_dist.data.build.build import BuildOptions, build
from namr_dist.data.build.converters import CONVERTERS
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.train.schedule import lr_factor

SETS = {
    "sop": miniatures.sop,
    "inshop": miniatures.inshop,
    "cub": miniatures.cub,
    "cars": miniatures.cars_flat,
    "vehicleid": miniatures.vehicleid,
}
NAMES = [name + suffix for name in SETS for suffix in ("", "_vit_small")]

MINIATURE = {
    "data.classes_per_batch": 4,
    "data.images_per_class": 2,
    "data.image_size": 32,
    "data.workers": 0,
    "model.backbone": "conv4",
    "model.pretrained": False,
    "model.batchnorm": "train",
    "model.width": 16,
    "model.structure_hidden": 24,
    "optim.steps": 12,
    "train.tensorboard": False,
}
"""What a miniature is trained with: a small network, batches that five classes can make. All else
is the recipe's own."""

GOLDEN = {
    "sop": "0.532952 0.543909 0.581406 0.593613 0.425548 0.488457 "
    "0.521295 0.599912 0.482296 0.541628 0.453412 0.523322",
    "inshop": "0.798939 0.712080 0.555452 0.598598 0.554497 0.725992 "
    "0.506877 0.469106 0.559452 0.509750 0.436600 0.556997",
    "cub": "0.539209 0.419727 0.467202 0.500430 0.452268 0.508404 "
    "0.426253 0.519662 0.486321 0.486327 0.646104 0.496721",
    "cars": "0.649527 0.471293 0.673755 0.523635 0.548459 0.558329 "
    "0.631609 0.632821 0.433469 0.744639 0.475265 0.529883",
    "vehicleid": "0.525264 0.534131 0.558650 0.661440 0.528267 0.695641 "
    "0.555068 0.628852 0.482364 0.609791 0.494358 0.497072",
}
"""Losses of every step, on one thread of a Xeon with AVX-512 and AMX, torch 2.13.0+cpu. With AVX2
or SSE4 alone (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA) they differ by 2e-6 at most: at the recipes'
rates the network moves little in twelve steps, so rounding is not multiplied from step to step."""


@pytest.mark.parametrize("name", SETS)
def test_twelve_steps_on_a_miniature_give_the_golden_losses(
    name: str, forked_namr: Callable, tmp_path: Path
) -> None:
    """From the original download's files to the losses of every step: converter, shards, plan,
    augmentation, network, objective, optimizer."""
    listing = CONVERTERS[name](SETS[name](tmp_path / "download"))
    build(listing, tmp_path / "shards", BuildOptions())
    words = [word for key, value in MINIATURE.items() for word in (f"--set.{key}", value)]
    run = tmp_path / "run"
    done = forked_namr(
        "train", name, "--run-dir", run, "--set.data.path", tmp_path / "shards", *words
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    golden = [float(loss) for loss in GOLDEN[name].split()]
    assert losses == pytest.approx(golden, rel=1e-4), " ".join(f"{loss:.6f}" for loss in losses)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_as_its_page_says(name: str) -> None:
    config = recipes.find(name)
    config.check()
    assert config.recipe == name
    assert config.model.width == 512 and config.model.pretrained
    assert config.data.image_size == config.test_size == 224
    assert config.data.path == f"shards/{name.removesuffix('_vit_small')}"
    # No split may choose: these sets have no validation classes.
    assert config.data.validation_split is None


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("sop", 100),
        ("sop_vit_small", 200),
        ("inshop", 40),
        ("inshop_vit_small", 400),
        ("cub", 150),
        ("cub_vit_small", 50),
        ("cars", 150),
        ("cars_vit_small", 300),
        ("vehicleid_vit_small", 200),
    ],
)
def test_steps_are_the_published_epochs_of_the_sets_that_the_converters_expect(
    name: str, epochs: int
) -> None:
    """An epoch of the ResNet-50 papers is as many batches as the images fill, one of the ViT-S/16
    paper a visit to every class."""
    config = recipes.find(name)
    expected = tool().expected(name.removesuffix("_vit_small"))
    if name.endswith("_vit_small"):
        batches = expected["train classes"] // config.data.classes_per_batch
    else:
        batches = expected["train images"] // (
            config.data.classes_per_batch * config.data.images_per_class
        )
    assert config.optim.steps == epochs * batches


@pytest.mark.parametrize(
    ("name", "epochs", "drops"),
    [("inshop", 40, [25]), ("vehicleid", 400, [120, 200, 220, 250, 280, 300, 300])],
)
def test_rates_drop_after_the_published_epochs(name: str, epochs: int, drops: list[int]) -> None:
    optim = recipes.find(name).optim
    for epoch in range(epochs):
        middle = round((epoch + 0.5) * optim.steps / epochs)
        assert lr_factor(middle, optim) == pytest.approx(
            0.3 ** sum(epoch >= drop for drop in drops)
        )


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"inshop", "vehicleid"}))
def test_rates_of_the_others_stay(name: str) -> None:
    optim = recipes.find(name).optim
    assert {lr_factor(step, optim) for step in range(optim.steps)} == {1.0}


@pytest.mark.parametrize(("name", "features"), [("cub", 2048), ("cub_vit_small", 384)])
def test_a_backbone_builds_and_embeds(name: str, features: int) -> None:
    config = recipes.find(name)
    network = EmbeddingNetwork(
        dataclasses.replace(config.model, pretrained=False), image_size=config.data.image_size
    ).eval()
    assert network.backbone.features == features
    with torch.no_grad():
        z_1D, s_1D = network(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
    assert z_1D.shape == s_1D.shape == (1, 512)
    import timm  # once a backbone has made it importable beside a CPU build of torch

    known = timm.get_pretrained_cfg(config.model.backbone.removeprefix("timm:"))
    assert known is not None and known.has_weights
    # All recipes have one of the two.
    same = {recipes.find(other).model for other in NAMES if ("vit" in other) == ("vit" in name)}
    assert same == {config.model}


def test_the_ranks_of_the_job_scripts_can_share_a_batch() -> None:
    for name in SETS:
        script = (REPOSITORY / "slurm" / f"train_{name}.sh").read_text()
        assert recipes.find(name).data.classes_per_batch % _ranks(script) == 0, name
    sweep = _ranks((REPOSITORY / "slurm" / "sweep.sh").read_text())
    assert sweep == 4
    assert not [name for name in NAMES if recipes.find(name).data.classes_per_batch % sweep]


def _ranks(script: str) -> int:
    nodes, gpus = (
        int(match[1])
        for option in ("nodes", "gpus-per-node")
        if (match := re.search(rf"^#SBATCH --{option}=(\d+)", script, re.MULTILINE))
    )
    return nodes * gpus


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_benchmarks", REPOSITORY / "tools" / "make_benchmarks.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_recipes_and_the_published_figures() -> None:
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    made = tool()
    between = page.split(made.BEGIN)[1].split(made.END)[0]
    assert between.strip() == made.tables(), "run tools/make_benchmarks.py"
    rows = [line for line in between.splitlines() if line.endswith("| not run here |")]
    assert len(rows) == len(made.published())
    for source in made.PUBLISHED.values():
        assert source.split(" et al. ")[0] in page.split("## Published figures")[1], source


def test_recipes_name_their_sources() -> None:
    made = tool()
    assert made.SETTINGS.keys() == set(NAMES)
    docstrings = {recipe.__name__: recipe.__doc__ or "" for recipe in recipes.ALL}
    assert not [name for name, source in made.SETTINGS.items() if source not in docstrings[name]]


def test_hours_are_images_over_the_rate() -> None:
    """0.0982 h: 7,800 batches of 112 images at 2,470 a second; 448 × 2 images 5,000 times at
    2,145."""
    made = tool()
    assert made.gpu_hours(recipes.find("cub")) == pytest.approx(0.0982, abs=1e-4)
    assert made.gpu_hours(recipes.find("sop_vit_small")) == pytest.approx(0.580, abs=1e-3)
