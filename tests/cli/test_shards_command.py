"""`namr shards build` as a user meets it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import miniatures
import pytest

from namr_dist.cli.main import main


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines on stderr; no traceback among them."""
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr.splitlines()


def test_other_counts_than_the_full_set_are_refused_or_told(namr: Callable, tmp_path: Path) -> None:
    source, out = miniatures.sop(tmp_path / "source"), tmp_path / "out"
    refused = namr("shards", "build", "sop", source, "--out", out)
    assert refused.returncode == 2 and len(told(refused)) == 1 and not out.exists()
    assert (
        "train images: 21 found, 59,551 expected" in refused.stderr
        and "--allow-counts" in refused.stderr
    )
    built = namr(
        "shards", "build", "sop", source, "--out", out, "--allow-counts", "--workers", 1, "--json"
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING: test classes: 6 found, 11,316 expected" in told(built)
    figures = json.loads(built.stdout)
    assert {split: (row["images"], row["classes"]) for split, row in figures["splits"].items()} == {
        "train": (21, 6),
        "test": (21, 6),
    }
    assert (figures["treated"], figures["skipped"], figures["was_there"]) == (
        {"kept": 42},
        {},
        False,
    )


def test_the_summary_counts_by_split_and_by_treatment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = miniatures.user_folder(tmp_path / "source")
    words = [
        "shards",
        "build",
        "folder",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--validation",
        "0.34",
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    rows = [line.split("│") for line in said.out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[1:4]] for row in rows] == [
        ["train", "8", "2"],
        ["val", "4", "1"],
        ["test", "12", "3"],
    ]
    assert "images: 18 converted, 6 kept" in said.out and not said.err
    assert main(words) == 0
    assert "holds this very set already; nothing was done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sop", "--highres"], "--highres goes with inshop, not sop"),
        (["sop", "--size", "0"], "--size is 0; give at least 1"),
        (["sop", "--quality", "101"], "--quality is 101; give 1 to 100"),
        (["sop", "--validation", "1"], "--validation is 1.0; give a share"),
        (["sop", "--validation", "nan"], "--validation is nan; give a share"),
        (["sop", "--shard-mib", "0"], "--shard-mib is 0.0; give at least 0.001"),
        (["sop", "--workers", "0"], "--workers is 0; give at least 1"),
        (["sop", "--seed", "-1"], "--seed is -1; give at least 0"),
    ],
)
def test_options_that_no_build_can_use_are_refused(
    tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["shards", "build", words[0], str(tmp_path), "--out", str(tmp_path / "out"), *words[1:]]
        )
        == 2
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and named in said[0]
    assert not (tmp_path / "out").exists()


def test_both_trees_of_inshop_are_built_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = miniatures.inshop(tmp_path / "source", highres=True)
    descriptions = []
    for more in ([], ["--highres"]):
        assert (
            main(
                [
                    "shards",
                    "build",
                    "inshop",
                    str(source),
                    "--out",
                    str(tmp_path / f"out{len(more)}"),
                    "--allow-counts",
                    "--workers",
                    "1",
                    "--json",
                    *more,
                ]
            )
            == 0
        )
        descriptions.append(json.loads(capsys.readouterr().out)["description"])
    assert "img_highres" not in descriptions[0] and "img_highres" in descriptions[1]


@pytest.mark.parametrize(
    ("source", "out"), [("set", "set/shards"), ("set", "set"), ("set", "."), ("link", "set/x/y")]
)
def test_shards_and_images_are_not_put_together(
    tmp_path: Path, source: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(miniatures.user_folder(tmp_path / "set").rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert (
        main(["shards", "build", "folder", str(tmp_path / source), "--out", str(tmp_path / out)])
        == 2
    )
    assert "are one folder or lie one in the other" in capsys.readouterr().err
    assert sorted((tmp_path / "set").rglob("*")) == before


def test_the_folder_above_the_download_gives_the_same_bytes(tmp_path: Path) -> None:
    source = miniatures.sop(tmp_path / "unpacked" / "source")
    for name, given in (("one", source), ("two", source.parent)):
        assert (
            main(
                [
                    "shards",
                    "build",
                    "sop",
                    str(given),
                    "--out",
                    str(tmp_path / name),
                    "--allow-counts",
                    "--workers",
                    "1",
                ]
            )
            == 0
        )
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_names_that_look_like_markup_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress bar, which only a terminal gets, and the table."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")  # one on which a line can be erased
    monkeypatch.chdir(tmp_path)
    source = miniatures.user_folder(Path("a[") / "b]{set}[red]")
    (source / "bench" / "photo.heic").write_bytes(b"")
    Path("x[").mkdir()
    assert main(["shards", "build", "folder", str(source), "--out", "x[/b]", "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert (
        "b]{set}[red]: x[/b]" in " ".join(said.out.split()) and "\x1b[2Kb]{set}[red] " in said.err
    )
    assert f"WARNING: 1 .heic files in {source} are not read" in said.err
