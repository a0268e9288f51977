"""The wheel carries everything: code under its mapped names, the data set, the report's
template."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, launch

_WHERE = "from importlib.util import find_spec; print(find_spec('namr_dist.kernels').origin)"
SOURCES = (
    "namr_dist",
    "kernels",
    "launchers",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for a build leaves folders behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    out = tmp_path_factory.mktemp("wheel")
    done = launch(
        sys.executable,
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", out, copy),
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "namr_dist/kernels/reference/losses.py",
        "namr_dist/launchers/train.py",
        "namr_dist/data/build/formats/sop.py",
        "namr_dist/py.typed",
        "namr_dist/data/homeware/ATTRIBUTION.csv",
        "namr_dist/data/homeware/shards/manifest.json",
        "namr_dist/data/homeware/shards/test-000003.tar",
        "namr_dist/results/templates/report.html",
        "namr_dist/serve/templates/page.js",
    ):
        assert wanted in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"namr_dist"}, (
        "a top-level name is taken"
    )


def test_trains_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = launch(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel
    )
    assert done.returncode == 0, done.stderr
    outside = {"cwd": tmp_path, "env": {"PYTHONPATH": str(site)}}
    where = launch(sys.executable, "-c", _WHERE, **outside)
    assert where.stdout.strip() == str(site / "namr_dist" / "kernels" / "__init__.py"), where.stderr
    done = launch(
        sys.executable,
        "-m",
        "namr_dist.cli",
        "train",
        "homeware",
        "--set.optim.steps",
        2,
        "--set.optim.warmup_steps",
        1,
        "--set.data.classes_per_batch",
        4,
        "--set.data.test_size",
        32,
        "--set.data.image_size",
        32,
        "--set.data.validation_split",
        "None",
        **outside,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "homeware" / "checkpoints" / "final.safetensors").is_file()
