"""A run whose configuration names code: used where the command line names it too, refused untouched
where not."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.numpy
from conftest import REPOSITORY, small_run

from namr_dist import named_code
from namr_dist.cli.main import main
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.results.comparison import compare
from namr_dist.results.comparison_page import grids
from namr_dist.results.export import load

DOCUMENTED = re.findall(
    r"```python\n(.*?)```",
    (REPOSITORY / "docs" / "algorithm.md").read_text(encoding="utf-8"),
    re.DOTALL,
)
PLANTED = """
from pathlib import Path
Path("mark").touch()
"""


def documented(part: str) -> str:
    """The code in docs/algorithm.md that has this in it."""
    (code,) = (code for code in DOCUMENTED if part in code)
    return code


@pytest.fixture(scope="module")
def trained(
    shard_set: Manifest, forked_namr: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A working folder with own_nets.py and a finished run of its network, `run`. Not to be
    changed."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_nets.py").write_text(documented("class Small"))
    done = forked_namr(
        "train",
        "homeware_conv4",
        "--run-dir",
        "run",
        *small_run(shard_set, steps=2),
        "--set.model.backbone",
        "own_nets:Small",
        "--set.structure.form",
        "weights",
        "--set.evaluation.reidentification_draws",
        2,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it as the working folder, with nothing imported or allowed yet."""
    monkeypatch.setattr(named_code, "_allowed", set())
    shutil.copytree(trained, tmp_path / "work", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "work"
    for name in ("own_nets", "planted", "orders"):
        sys.modules.pop(name, None)


def commands(shard_set: Manifest) -> dict[str, list[str]]:
    return {
        "evaluate": ["evaluate", "run"],
        "report": ["report", "run"],
        "embed": ["embed", "run", "--shards", str(shard_set.folder), "--out", "out.safetensors"],
        "export": ["export", "run", "--out", "out", "--formats", "safetensors"],
    }


def rewrite(field: str, value: str) -> None:
    section, name = field.split(".")
    config = json.loads(Path("run/config.json").read_text())
    config[section][name] = value
    Path("run/config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("field", ["model.backbone", "loss.metric"])
@pytest.mark.parametrize("verb", ["evaluate", "report", "embed", "export"])
def test_planted_code_is_not_imported(
    work: Path, shard_set: Manifest, verb: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite("model.backbone", "conv4")
    rewrite(field, "planted:Thing")
    Path("planted.py").write_text(PLANTED)
    assert main(commands(shard_set)[verb]) == 2
    said = capsys.readouterr().err
    assert (
        "run/config.json names code to be imported: " in said
        and f"{field} is planted:Thing" in said
    )
    assert "--allow-code planted:Thing" in said and len(said.splitlines()) == 1
    assert main([*commands(shard_set)[verb], "--allow-code", "own_nets:Small"]) == 2
    assert (
        not Path("mark").exists()
        and not Path("out").exists()
        and not Path("out.safetensors").exists()
    )


def test_a_run_with_a_backbone_of_ones_own(
    work: Path, shard_set: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in commands(shard_set).values():
        assert main([*words, "--allow-code", "own_nets:Small"]) == 0, capsys.readouterr().err
    state = safetensors.numpy.load_file("run/checkpoints/final.safetensors")
    assert state["sample_head.weight"].shape == (16, 64)
    evaluated, embedded = (
        safetensors.numpy.load_file(path)
        for path in ("run/embeddings.safetensors", "out.safetensors")
    )
    assert evaluated["z"].shape == (36, 16) and (evaluated["z"] == embedded["z"]).all()
    assert "The network own_nets:Small was trained" in Path("run/report.html").read_text()
    assert 'named_code.allow(["own_nets:Small"])' in Path("out/README.md").read_text()
    assert load("out").backbone.mean_3.flatten().tolist() == [0.5] * 3


def test_an_exported_folder_imports_nothing_by_itself(
    work: Path, shard_set: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*commands(shard_set)["export"], "--allow-code", "own_nets:Small"]) == 0
    about = json.loads(Path("out/config.json").read_text())
    del about["sha256"]
    about["config"]["model"]["backbone"] = "planted:Backbone"
    Path("out/config.json").write_text(json.dumps(about))
    Path("planted.py").write_text(PLANTED)
    with pytest.raises(InputError, match="out/config.json names code .* planted:Backbone"):
        load("out")
    assert not Path("mark").exists()


def test_a_mode_of_ones_own_is_measured_and_shown(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("orders.py").write_text(documented("SQUARED"))
    assert (
        main(["evaluate", "run", "--allow-code", "own_nets:Small", "--mode", "orders:SQUARED"]) == 0
    )
    said = capsys.readouterr().out
    assert said.count("trained, squared ") == 2, "test split and re-identification"
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert {"squared", "squared_s1", "squared_shuffled"} <= metrics["test"].keys()
    assert metrics["test"]["squared_s1"] == metrics["test"]["adaptive_s1"]
    assert {"squared", "squared_s1", "squared_shuffled"} <= metrics["reidentification"][
        "modes"
    ].keys()
    assert metrics["protocol"]["own modes"] == "orders:SQUARED"
    Path("orders.py").unlink()  # neither the report nor a comparison needs it
    assert main(["report", "run", "--allow-code", "own_nets:Small"]) == 0
    assert (
        "distance with the squares of the query&#39;s weights"
        in Path("run/report.html").read_text()
    )
    comparison = compare([Path("run")])
    assert (
        comparison.settings[0].figures["squared"]["R@1"].mean == metrics["test"]["squared"]["R@1"]
    )
    assert grids(comparison)[1].figures == [
        "sample",
        "rerank",
        "adaptive",
        "symmetric",
        "calibrated",
        "squared",
    ]


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("orders:NUMBER", "7 is no retrieval mode"),
        ("orders:A", "orders has no A"),
        ("squared", "--mode is 'squared'"),
        ("nowhere:A", "cannot be imported"),
    ],
)
def test_modes_that_do_not_serve(
    work: Path, mode: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("orders.py").write_text("NUMBER = 7\n")
    assert main(["evaluate", "run", "--allow-code", "own_nets:Small", "--mode", mode]) == 2
    said = capsys.readouterr().err
    assert told in said and len(said.splitlines()) == 1 and not Path("run/metrics.json").exists()


def test_one_table_over_many_runs_imports_nothing(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["report", "run", "run", "--out", "table.html", "--allow-code", "own_nets:Small"]) == 2
    )
    assert "--allow-code is own_nets:Small, which goes with one run" in capsys.readouterr().err
