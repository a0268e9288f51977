"""A run's folder: its names stand in one place, and only what a run wrote is ever replaced."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from namr_dist.errors import InputError, TransientError
from namr_dist.run.folder import (
    CLASSES,
    EMBEDDINGS,
    METRICS,
    REPORT,
    Evaluation,
    RunFolder,
    runs_in,
    step_name,
    step_named,
)

NAMES = re.compile(
    r"config\.json|metrics[\w{}*-]*\.jsonl?|classes[\w{}*-]*\.json|"
    r"embeddings[\w{}*-]*\.safetensors|report\.html|step-[\d{}*(]|"
    r"final\.safetensors|^\.lock$|^\.writable$|log\.txt|^checkpoints$|^tensorboard$|checkpoints/|tensorboard/"
)
"""As they stand in a string; {} is where an f-string puts a value."""
ELSEWHERE = {
    ("namr_dist/data/remote/cache.py", ".lock"),
    ("namr_dist/data/staging.py", ".lock"),
    ("namr_dist/reproduce/images.py", ".lock"),
    ("namr_dist/results/export.py", "config.json"),
    ("namr_dist/results/model_card.py", "config.json"),
    ("namr_dist/results/page.py", "report.html"),
}
"""Files of the same name in other folders: locks of a cache, of a staged set and of a grid of runs,
what an exported folder holds, and the template of a report."""


def texts(tree: ast.Module) -> Iterator[str]:
    """All string constants but those that only document, which are statements by themselves."""
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documents | parts
        ):
            yield node.value


def test_each_name_stands_in_one_file() -> None:
    """Help and errors that people read are made of the folder's names as well."""
    met = {
        (str(path.relative_to(REPOSITORY)), name)
        for folder in ("namr_dist", "kernels", "launchers")
        for path in (REPOSITORY / folder).rglob("*.py")
        for text in texts(ast.parse(path.read_text()))
        for name in NAMES.findall(text)
    }
    assert {name for file, name in met if file == "namr_dist/run/folder.py"} >= {
        "config.json",
        "metrics.jsonl",
        "metrics.json",
        "classes.json",
        "embeddings.safetensors",
        "report.html",
        "final.safetensors",
        ".lock",
        ".writable",
        "log.txt",
        "checkpoints",
        "tensorboard",
    }
    assert {(file, name) for file, name in met if file != "namr_dist/run/folder.py"} == ELSEWHERE


def test_the_names_are_those_of_the_docs(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    files = [
        run.config,
        run.log,
        run.metrics,
        run.classes,
        run.embeddings,
        run.report,
        run.tensorboard,
        run.output,
        run.final,
        run.checkpoint(120),
        *(
            Evaluation(folder=tmp_path, split="test_800").path(name)
            for name in (METRICS, CLASSES, EMBEDDINGS)
        ),
        Evaluation(folder=tmp_path, step=100).path(METRICS),
        Evaluation(folder=tmp_path, split="test_800", step=100).path(REPORT),
    ]
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "config.json",
        "metrics.jsonl",
        "metrics.json",
        "classes.json",
        "embeddings.safetensors",
        "report.html",
        "tensorboard",
        "log.txt",
        "checkpoints/final.safetensors",
        "checkpoints/step-00000120",
        "metrics-test_800.json",
        "classes-test_800.json",
        "embeddings-test_800.safetensors",
        "metrics-step-100.json",
        "report-test_800-step-100.html",
    ]


def test_steps_by_their_names_and_those_that_were_evaluated(tmp_path: Path) -> None:
    assert {step_named(name) for name in (step_name(100), "100", "step-00000100")} == {100}
    for name in ("", "step-", "final", "-100", "step-1e3", "stepp-1", "١٠٠"):
        assert step_named(name) is None
    for step, split in ((100, None), (9, None), (7, "few"), (None, "few")):
        Evaluation(folder=tmp_path, split=split, step=step).path(METRICS).touch()
    run = RunFolder(tmp_path)
    assert run.evaluated_steps() == [9, 100] and run.evaluated_steps("few") == [7]
    assert run.evaluated_steps("none") == []


def test_runs_of_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "empty").mkdir()
    assert runs_in(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_checkpoints_are_listed_by_step_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.checkpoints() == []
    run.checkpoint_folder.mkdir()
    for step in (100_000_000, 8, 12):
        run.checkpoint(step).mkdir()
    (run.checkpoint(8) / "rank-00000.safetensors").write_bytes(b"12345")
    for name in ("step-x", ".step-00000016.tmp"):
        (run.checkpoint_folder / name).mkdir()
        (run.checkpoint_folder / name / "rank-00000.safetensors").touch()
    for name in (
        "step-00000004.safetensors",
        ".final.safetensors.0123456789ab.tmp",
        "final.safetensors",
    ):
        (run.checkpoint_folder / name).touch()
    assert run.checkpoints() == [(step, run.checkpoint(step)) for step in (8, 12, 100_000_000)]
    (run.checkpoint(12) / "removed meanwhile").symlink_to("nothing")
    assert run.checkpoint_bytes() == 5
    assert run.older_checkpoints() == [run.checkpoint_folder / "step-00000004.safetensors"]
    run.remove_unfinished()
    assert not list(tmp_path.rglob("*.tmp")) and len(list(run.checkpoint_folder.iterdir())) == 6


def test_a_damaged_file_is_not_one_of_those_kept(tmp_path: Path) -> None:
    """After a run went on from 52, what is newer was damaged: it must not push the one just written
    out."""
    run = RunFolder(tmp_path)
    run.checkpoint_folder.mkdir()
    for step in (48, 52, 54, 56):
        run.checkpoint(step).mkdir()
    run.remove_old_checkpoints(newest=54, keep=1)
    assert [step for step, _ in run.checkpoints()] == [54, 56]
    run.remove_old_checkpoints(newest=56, keep=2)
    assert [step for step, _ in run.checkpoints()] == [54, 56]


def test_overwriting_leaves_no_figures_of_the_old_network(tmp_path: Path) -> None:
    """Those of other splits have the splits' names."""
    for name in (
        "config.json",
        "metrics.json",
        "metrics-test_800.json",
        "classes.json",
        "classes-test_800.json",
        "embeddings-test_800.safetensors",
        "metrics-step-100.json",
        "report.html",
        "report-test_800-step-100.html",
        "mine.txt",
    ):
        (tmp_path / name).write_text("{}")
    RunFolder(tmp_path).claim(overwrite=True, goes_on=False, need_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "mine.txt"}


def test_what_another_program_left_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("weights")
    with pytest.raises(InputError, match="checkpoints is there, but .*config.json is not"):
        run.claim(overwrite=False, goes_on=False, need_bytes=0)
    assert (tmp_path / "checkpoints" / "mine.pt").read_text() == "weights"
    run.claim(overwrite=True, goes_on=False, need_bytes=0)
    assert not (tmp_path / "checkpoints").exists()


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "run", "Not a directory"),
    ):
        for check in (RunFolder(run).check, RunFolder(run).claim):
            with pytest.raises(InputError, match=f"cannot be written \\({reason}\\)"):
                check(overwrite=False, goes_on=False, need_bytes=0)
    with pytest.raises(TransientError, match="MiB free, this run needs"):
        RunFolder(tmp_path / "run").check(overwrite=False, goes_on=True, need_bytes=1 << 60)
    with pytest.raises(InputError, match="MiB free, this run needs"):
        RunFolder(tmp_path / "run").claim(overwrite=False, goes_on=False, need_bytes=1 << 60)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_claimed_folder_keeps_what_no_run_wrote(tmp_path: Path) -> None:
    for name in ("config.json", "metrics.jsonl", "report.html", "notes.txt"):
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoints").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    RunFolder(tmp_path).claim(overwrite=False, goes_on=True, need_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == before
    RunFolder(tmp_path).claim(overwrite=True, goes_on=False, need_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes.txt"}
    RunFolder(tmp_path / "a" / "b").claim(overwrite=False, goes_on=False, need_bytes=0)
    assert not list((tmp_path / "a" / "b").iterdir())
