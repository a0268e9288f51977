"""Recipes, overrides, and what the command line says of itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from namr_dist import recipes
from namr_dist.config import Config
from namr_dist.errors import InputError
from namr_dist.recipes.overrides import configure


def test_overrides_reach_their_fields() -> None:
    config = configure(
        "homeware",
        [
            "--set.loss.metric",
            "margin",
            "--set.data.crop_scale",
            "0.3",
            "0.9",
            "--set.data.path",
            "/data/sop",
            "--set.train.tensorboard",
            "False",
            "--set.data.test_size",
            "None",
        ],
    )
    base = recipes.find("homeware")
    assert (config.loss.metric, config.data.crop_scale, config.data.path) == (
        "margin",
        (0.3, 0.9),
        "/data/sop",
    )
    assert config.train.tensorboard is False and config.test_size == config.data.image_size == 96
    assert base.test_size == 128
    assert dataclasses.replace(config, data=base.data, loss=base.loss, train=base.train) == base


@pytest.mark.parametrize("recipe", recipes.ALL, ids=lambda recipe: recipe.__name__)
def test_a_run_file_brings_the_configuration_back(
    recipe: Callable[[], Config], tmp_path: Path
) -> None:
    config = dataclasses.replace(
        recipe(), data=dataclasses.replace(recipe().data, path="x", test_size=None)
    )
    config.check()
    (tmp_path / "config.json").write_text(config.to_json())
    assert Config.load(tmp_path / "config.json") == config
    assert config.recipe == recipe.__name__


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda body: body["data"].update(colour=1), "unknown field 'colour'"),
        (lambda body: body["optim"].update(steps="many"), "steps is 'many', expected a int"),
        (lambda body: body["data"].update(sampling="random"), "'random', not one of uniform"),
        (lambda body: body.pop("recipe"), "is incomplete"),
    ],
)
def test_foreign_run_files_are_refused(tmp_path: Path, change: Callable, named: str) -> None:
    body = json.loads(recipes.find("homeware").to_json())
    change(body)
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=named):
        Config.load(tmp_path / "config.json")


def test_settings_explain_every_field(namr: Callable) -> None:
    done = namr("train", "homeware", "--settings")
    assert done.returncode == 0
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            for entry in dataclasses.fields(section.type):
                assert f"--set.{section.name}.{entry.name.replace('_', '-')}" in done.stdout
    assert "classes in the global batch" in " ".join(done.stdout.split())


def test_doctor(namr: Callable) -> None:
    findings = json.loads(namr("doctor", "--json").stdout)
    by_name = {finding["what"]: finding for finding in findings}
    assert by_name["homeware"]["status"] == "ok" and by_name["homeware"]["found"].startswith(
        "4920 images"
    )
    assert by_name["torch"]["status"] == "ok" and "ptxas" in by_name["compilers"]["found"]
    assert all(finding["status"] in ("ok", "slow", "missing") for finding in findings)
    assert not [finding for finding in findings if finding["status"] == "missing"]


def test_stats(forked_namr: Callable) -> None:
    figures = json.loads(forked_namr("shards", "stats", "--json").stdout)
    assert figures["splits"]["test"]["images"] == 2448
    assert "4920 images in 9 shards" in forked_namr("shards", "verify").stdout
