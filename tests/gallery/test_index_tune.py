"""`namr index tune`: what it measures, what it advises, and its page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import faiss
import numpy as np
import pytest
from made_up_items import MODES, gallery_of, rows

from namr_dist.cli.main import main
from namr_dist.errors import InputError
from namr_dist.gallery.engine import TYPES, SearchSettings
from namr_dist.gallery.gallery import Gallery
from namr_dist.gallery.tune import Measured, Plan, Tuned, recall_of, tune

ITEMS, QUERIES = 340, 12


@pytest.fixture(autouse=True)
def _two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("namr_dist.gallery.tune.ROUNDS", 2)


def _gallery(mode: str = "calibrated", items: int = ITEMS) -> Gallery:
    z_ND, s_NE = rows(items, MODES[mode], seed=3)
    return gallery_of(z_ND, s_NE, MODES[mode], mode=mode)


def test_every_type_is_measured_on_held_out_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """No query is an item of the indexes, each search runs on the threads stated, and recall is
    the share of flat's neighbours."""
    monkeypatch.setattr("namr_dist.gallery.tune._NPROBE", (1, 2))
    found, threads = {}, set()
    original = Gallery.nearest

    def watched(self, z_QD, kept_QE, k, *, settings=None):
        stored = {row.tobytes() for row in self.embeddings()[0]}
        assert len(self) == ITEMS - QUERIES
        assert not stored & {row.tobytes() for row in np.asarray(z_QD)}
        threads.add(faiss.omp_get_max_threads())
        result = original(self, z_QD, kept_QE, k, settings=settings)
        if len(z_QD) == QUERIES:
            found[self.type, settings] = result[1].tolist()
        return result

    monkeypatch.setattr(Gallery, "nearest", watched)
    before = faiss.omp_get_max_threads()
    tuned = tune(_gallery(), Plan(queries=QUERIES, threads=2, batch_size=5))
    assert threads == {2} and faiss.omp_get_max_threads() == before
    assert {one.type for one in tuned.measured} == set(TYPES)
    assert (tuned.items, tuned.queries, tuned.left_out) == (ITEMS - QUERIES, QUERIES, ())
    exact = found["flat", SearchSettings()]
    for one in tuned.measured:
        ids = found.pop((one.type, SearchSettings(**one.settings)))
        same = sum(len(set(row) & set(other)) for row, other in zip(ids, exact, strict=True))
        assert one.recall == pytest.approx(same / (10 * QUERIES))
    assert not found
    assert min(one.recall for one in tuned.measured) < 0.9


def test_figures_are_those_of_the_indexes() -> None:
    tuned = tune(_gallery(), Plan(queries=QUERIES))
    by_type = {kind: [one for one in tuned.measured if one.type == kind] for kind in TYPES}
    flat = by_type["flat"][0]
    assert flat.recall == 1 and flat.speed == 1
    for one in tuned.measured:
        assert one.queries_per_s > 0 and one.build_s > 0
        assert one.speed == pytest.approx(one.queries_per_s / flat.queries_per_s)
    # The last setting of ivf looks at all cells.
    assert [one.settings["nprobe"] for one in by_type["ivf"]] == [4, 8]
    assert by_type["ivf"][-1].recall == 1
    assert [one.settings["ef_search"] for one in by_type["hnsw"]] == [16, 32, 64, 128, 256, 512]
    width = 13  # D + 1 of the calibrated mode
    assert flat.bytes_per_item == pytest.approx(4 * width, abs=1)
    assert by_type["fp16"][0].bytes_per_item == pytest.approx(2 * width, abs=1)
    assert by_type["hnsw"][0].bytes_per_item > flat.bytes_per_item
    best = [one for one in tuned.measured if one.best]
    for one in tuned.measured:
        beaten = any(
            other.queries_per_s > one.queries_per_s and other.recall >= one.recall
            for other in tuned.measured
        )
        assert (one in best) == (not beaten)


def test_recall_counts_what_is_there() -> None:
    exact_QK = np.array([[1, 2, 3], [4, 5, -1]])
    assert recall_of(np.array([[3, 2, 9], [-1, -1, 4]]), exact_QK) == 3 / 5


def _tuned(*measured: tuple[str, float, float]) -> Tuned:
    lines = tuple(
        Measured(
            type=kind,
            settings={"ef_search": 64} if kind == "hnsw" else {},
            recall=recall,
            queries_per_s=100 * speed,
            speed=speed,
            bytes_per_item=4.0,
            build_s=1.0,
        )
        for kind, recall, speed in measured
    )
    return Tuned(
        name="<photos>",
        mode="sample",
        items=100,
        queries=10,
        plan=Plan(),
        measured=lines,
        made={},
        left_out=(),
    )


@pytest.mark.parametrize(
    ("measured", "advice"),
    [
        (
            [("flat", 1, 1), ("hnsw", 0.9914, 21), ("sq8", 0.9, 50)],
            "hnsw, --ef-search 64: 99.1 % at 21× the speed of flat",
        ),
        ([("flat", 1, 1), ("hnsw", 0.99999, 3)], "99.9 % at 3×"),  # not all
        ([("flat", 1, 1), ("hnsw", 1.0, 1.05)], "flat: exact, and nothing with a recall of 99.0 %"),
        ([("flat", 1, 1), ("hnsw", 0.98, 9)], "flat: exact"),
    ],
)
def test_advice(measured: list[tuple[str, float, float]], advice: str) -> None:
    assert advice in _tuned(*measured).advice


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page fetches nothing, and shows a name as text."""
    index = _gallery("structure").save(tmp_path / "<b>photos.index")
    command = ["index", "tune", str(index), "--queries", "10"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    page = (tmp_path / "<b>photos.index.tune.html").read_text()
    assert told["advice"] in page.replace("&gt;", ">")
    assert "<b>photos" not in page and "&lt;b&gt;photos" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "default-src 'none'" in page
    assert page.count("<circle") == len(told["measured"]) == page.count("<tr>") - 1
    assert told["k"] == 10 and {"machine", "versions", "commit"} <= told["made"].keys()
    assert main([*command, "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "ivfpq" in printed and str(tmp_path / "page.html") in printed.replace("\n", "")


def test_few_items(tmp_path: Path) -> None:
    few = tune(_gallery(items=60), Plan(queries=10))
    assert few.left_out == ("ivfpq needs 256 items, 50 are left",)
    assert few.queries == 10 and "ivfpq" not in {one.type for one in few.measured}
    with pytest.raises(InputError, match="has 40 items"):
        tune(_gallery(items=40), Plan())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["INDEX", "--run", "RUN", "--vectors", "FILE"], "give an INDEX, or --run RUN"),
        ([], "give an INDEX, or --run RUN"),
        (["--run", "RUN"], "give an INDEX, or --run RUN"),
        (["INDEX", "--vectors", "FILE"], "give an INDEX, or --run RUN"),
        (["INDEX", "--mode", "sample"], "--mode is sample, which goes with --run"),
        (["INDEX", "--threads", "0"], "--threads is 0; take at least 1"),
        (["INDEX", "--queries", "9"], "--queries is 9; take at least 10"),
        (["INDEX", "--recall", "1.5"], "--recall is 1.5"),
        (["INDEX", "--html", "nowhere/page.html"], "--html nowhere/page.html"),
        (["INDEX"], "INDEX is no index"),
    ],
)
def test_what_cannot_be_tuned(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["index", "tune", *words]) == 2
    assert message in capsys.readouterr().err


def test_rerank_is_compared_with_its_own_exact_search() -> None:
    """Of as many candidates: what a setting loses is the index's doing."""
    gallery = _gallery("rerank")
    gallery.settings = dataclasses.replace(gallery.settings, candidates=40)
    tuned = tune(gallery, Plan(queries=10))
    assert tuned.measured[0].recall == 1
    assert {one.recall for one in tuned.measured if one.type == "fp16"} == {1}
    assert all(one.settings.get("candidates", 40) == 40 for one in tuned.measured)
