"""Names that others chose, as commands and pages show them: characters that a terminal obeys, or
that turn the direction of reading, are seen and do nothing."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import make_shards, picture
from pictures import saved
from PIL import Image

from namr_dist.cli.main import main
from namr_dist.config import Config
from namr_dist.data.build.progress import BuildProgress
from namr_dist.data.shardset.histogram import histogram_svg
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.statistics import statistics
from namr_dist.results.model_card import _table
from namr_dist.results.page import write_report
from namr_dist.results.tables import results_table
from namr_dist.terminal import Console, plain

EVIL = "x\x1b[2J\x07\r\nnamr: all well\n\u202eb\u2066\x9b31m[red]"
SHOWN = r"x\x1b[2J\x07\r\nnamr: all well\n\u202eb\u2066\x9b31m[red]"
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f]")


def harmless(text: str, *, shown: bool = True) -> bool:
    return (
        not OBEYED.search(text)
        and not re.search(r"^namr: all well", text, re.MULTILINE)
        and (not shown or SHOWN in text.replace("&#39;", "'"))
    )


@pytest.fixture
def evil(tmp_path: Path) -> Manifest:
    """A set of which every name that may be any text is such a one."""
    manifest = make_shards(tmp_path / "set", classes={"train": 2, "test": 2}, images=2)
    splits = {"train": EVIL, "test": f"{EVIL}2"}
    renamed = replace(
        manifest,
        name=EVIL,
        description=EVIL,
        classes=tuple(
            replace(one, name=EVIL, category=EVIL, split=splits[one.split])
            for one in manifest.classes
        ),
        shards=tuple(
            replace(
                one,
                file=f"{EVIL}{number}.tar",
                split=splits[one.split],
                keys=tuple(f"{EVIL}{key}" for key in one.keys),
            )
            for number, one in enumerate(manifest.shards)
        ),
    )
    for before, after in zip(manifest.shards, renamed.shards, strict=True):
        shutil.move(manifest.folder / before.file, manifest.folder / after.file)
    renamed.save()
    return Manifest.load(manifest.folder)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def test_statistics_and_their_picture(evil: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shards", "stats", str(evil.folder)])
    assert harmless(capsys.readouterr().out)
    assert harmless(histogram_svg(statistics(evil)))


def test_near_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_shards(tmp_path / "set", classes={"train": 2, "test": 2}, images=2)
    shards = tuple(
        replace(one, keys=tuple(f"{EVIL}{key}" for key in one.keys)) for one in manifest.shards
    )
    replace(manifest, shards=shards).save()
    main(["shards", "stats", "--near-duplicates", str(manifest.folder)])
    assert harmless(capsys.readouterr().out)


def test_verification_names_problems_a_line_each(
    evil: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys differ from the tars' members, so that every image is a problem."""
    assert main(["shards", "verify", str(evil.folder)]) == 2
    said = capsys.readouterr().err
    assert harmless(said)
    first, *problems = said.splitlines()
    assert first.startswith("namr: error: ") and " problems in " in first
    assert all(problem.startswith("  ") for problem in problems)
    for path in evil.folder.glob("*.tar"):
        path.unlink()
    (evil.folder / f"{EVIL}.tar").touch()
    main(["shards", "verify", str(evil.folder)])
    assert harmless(capsys.readouterr().err)


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "stats", str(tmp_path / EVIL.replace("/", ""))]) == 2
    said = capsys.readouterr().err
    assert harmless(said) and said.count("\n") == 1
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "x", "data": {EVIL: 1}}))
    assert main(["top", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert harmless(said, shown=False) and said.count("\n") == 1


def test_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / EVIL
    run.mkdir()
    (run / "config.json").write_text(Config(recipe=EVIL).to_json())
    lines = [
        {"step": 1, "loss": 1.0, "time_s": 1.0},
        {"step": 1, "img_per_s": 9.0, f"{EVIL}_s": 0.1, "[/red]_s": 0.1, "slowest_rank": 0},
        {"step": 1, "val": {EVIL: 1.0, "R@1": 2.0}},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in (*lines, {"no": "step"}))
    (run / "metrics.jsonl").write_text(text)
    main(["top", "--once", str(run)])
    assert harmless(capsys.readouterr().out)


def test_a_terminal_gets_no_sequence_but_those_of_rich() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=400)
    console.print(f"{EVIL} \x1b[5m", style="bold", markup=False)
    console.print(plain(EVIL))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert set(re.findall(r"\x1b\[[0-9;]*[A-Za-z]", text)) == {"\x1b[1m", "\x1b[0m"}
    assert not OBEYED.search(re.sub(r"\x1b\[[01]m", "", text)) and SHOWN in text


def test_progress_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with BuildProgress(EVIL, images=2, size=2) as progress:
        progress.read(1, 1)
        progress._tell()
    said = capsys.readouterr().err
    assert harmless(said) and said.count("\n") == 1


def test_pages_and_tables(tmp_path: Path) -> None:
    figures = {"R@1": 50.0, "MAP@R": 20.0}
    metrics = {
        "test": {"sample": figures, "mine": figures},
        "baselines": {EVIL: figures},
        "own_modes": {"mine": {"sentence": EVIL}},
        "protocol": {EVIL: EVIL},
    }
    config = json.loads(Config(recipe=EVIL).to_json())
    for name, value in (("config.json", config), ("metrics.json", metrics)):
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    z_ND = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    (tmp_path / "embeddings.safetensors").write_bytes(
        safetensors.numpy.save({"z": z_ND, "labels": np.arange(8) // 2})
    )
    jpeg = saved(Image.fromarray(picture(0, 0)), "JPEG")
    page = write_report(tmp_path, lambda image: jpeg, [EVIL] * 8, [EVIL] * 8).read_text()
    assert harmless(page) and page.count(SHOWN) > 8
    assert harmless(_table(["", EVIL], [[EVIL, "1"]]))
    console = Console(file=io.StringIO(), width=400)
    console.print(results_table(metrics))
    assert harmless(console.file.getvalue())  # type: ignore[attr-defined]
