"""`namr index duplicates`: groups compared with a union of all pairs by brute force."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from made_up_items import CENTRES, WEIGHTS, gallery_of, rows
from PIL import Image

from namr_dist.cli.main import main
from namr_dist.errors import InputError
from namr_dist.gallery import duplicates
from namr_dist.gallery.duplicates import DEFAULT_RATIO, near_duplicates
from namr_dist.gallery.gallery import Gallery
from namr_dist.gallery.geometry import Geometry
from namr_dist.gallery.items import Source


def _brute_force(z_ND: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """Components of two or more, by joining the groups of each pair."""
    group_N = list(range(len(z_ND)))
    for one in range(len(z_ND)):
        for other in range(one):
            if np.linalg.norm(z_ND[one] - z_ND[other]) <= threshold:
                old, new = group_N[other], group_N[one]
                group_N = [new if group == old else group for group in group_N]
    every = {frozenset(np.flatnonzero(np.array(group_N) == group).tolist()) for group in group_N}
    return {group for group in every if len(group) > 1}


def _compared(z_ND: np.ndarray, geometry: Geometry) -> np.ndarray:
    wide_ND = z_ND.astype(np.float64)
    if geometry.distance == "euclidean":
        return wide_ND
    return wide_ND / np.linalg.norm(wide_ND, axis=1, keepdims=True)


def _positions(gallery: Gallery, found: duplicates.Duplicates) -> set[frozenset[int]]:
    return {frozenset(gallery.items.positions(group.ids).tolist()) for group in found.groups}


@pytest.mark.parametrize("geometry", [WEIGHTS, CENTRES], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0, 3.0])
def test_groups_are_those_of_all_pairs(geometry: Geometry, share: float) -> None:
    """Of the sample distance, in an index whose mode lessens distances; chains count."""
    z_ND, s_NE = rows(160, geometry, seed=7)
    z_ND[150:] = z_ND[:10]  # exact copies
    z_ND[140:145] = z_ND[10] + np.arange(1, 6)[:, None] * np.float32(0.01)  # a chain
    gallery = gallery_of(z_ND, s_NE, geometry, mode="calibrated")
    compared_ND = _compared(z_ND, geometry)
    distance_NN = np.linalg.norm(compared_ND[:, None] - compared_ND, axis=2)
    spacing = float(np.median(np.sort(distance_NN, axis=1)[:, 10]))  # without itself
    found = near_duplicates(gallery, ratio=share)
    assert found.spacing == pytest.approx(spacing, rel=1e-5)
    assert found.threshold == pytest.approx(share * spacing, rel=1e-5)
    groups = _positions(gallery, found)
    assert groups == _brute_force(compared_ND, found.threshold)
    if share == 0:
        assert groups == {frozenset((row, 150 + row)) for row in range(10)}
    sizes = [len(group.ids) for group in found.groups]
    assert sizes == sorted(sizes, reverse=True) and len(set(map(len, groups))) > (share == 0.6)
    for group in found.groups:
        inside = gallery.items.positions(group.ids)
        apart = distance_NN[np.ix_(inside, inside)][np.triu_indices(len(inside), 1)]
        assert group.least == pytest.approx(apart.min(), abs=1e-9)
        assert group.most == pytest.approx(apart[apart <= found.threshold].max(), abs=1e-9)


def test_a_threshold_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs at exactly the threshold count; block by block, nothing is lost."""
    z_ND, s_NE = rows(50, WEIGHTS, seed=1)
    z_ND = (10 * np.arange(50)[:, None] + np.zeros(12)).astype(np.float32)
    z_ND[::2, 0] += 7  # 0–1, 2–3, … are nearer than 1–2
    gallery = gallery_of(z_ND, s_NE, WEIGHTS, mode="sample")
    squared = 11 * 10**2 + 3**2
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    found = near_duplicates(gallery, threshold=float(np.sqrt(squared)))
    assert _positions(gallery, found) == {frozenset((row, row + 1)) for row in range(0, 50, 2)}
    assert not near_duplicates(gallery, threshold=float(np.sqrt(squared)) - 1e-3).groups


def test_items_that_are_all_the_same_are_one_group() -> None:
    """Spacing, threshold and rounding are 0, and so are all distances."""
    z_ND, s_NE = (np.repeat(one, 5, axis=0) for one in rows(1, WEIGHTS, seed=1))
    found = near_duplicates(gallery_of(np.zeros_like(z_ND), s_NE, WEIGHTS, mode="sample"))
    assert found.threshold == 0
    assert [len(group.ids) for group in found.groups] == [5]


def test_the_default_finds_copies_and_few_others() -> None:
    """Copies that moved a little are with their originals; hardly any other of 300 items is."""
    z_ND, s_NE = rows(300, WEIGHTS, seed=11)
    copies_ND = z_ND[:20] + np.float32(0.01)
    gallery = gallery_of(
        np.concatenate([z_ND, copies_ND]),
        np.concatenate([s_NE, s_NE[:20]]),
        WEIGHTS,
        mode="adaptive",
    )
    found = near_duplicates(gallery)
    assert found.threshold == pytest.approx(DEFAULT_RATIO * found.spacing)
    groups = _positions(gallery, found)
    assert all(any({row, 300 + row} <= group for group in groups) for row in range(20))
    assert sum(map(len, groups)) <= 43


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    z_ND, s_NE = rows(40, WEIGHTS, seed=2)
    gallery = gallery_of(z_ND, s_NE, WEIGHTS, mode="sample")
    with pytest.raises(InputError, match="--threshold is -1"):
        near_duplicates(gallery, threshold=-1)
    with pytest.raises(InputError, match="--ratio is nan"):
        near_duplicates(gallery, ratio=float("nan"))
    with pytest.raises(InputError, match="both given"):
        near_duplicates(gallery, ratio=1, threshold=1)
    # However far the threshold reaches, a block finds few pairs before they are counted.
    monkeypatch.setattr(duplicates, "_MOST_PAIRS", 100)
    monkeypatch.setattr(duplicates, "_BLOCK_PAIRS", 130)
    found, original = [], faiss.IndexFlatL2.range_search

    def watched(self, x, thresh, **options):
        limits, squared_P, others_P = original(self, x, thresh, **options)
        found.append(len(others_P))
        return limits, squared_P, others_P

    monkeypatch.setattr(faiss.IndexFlatL2, "range_search", watched)
    for threshold in (50, 1e200):
        found.clear()
        with pytest.raises(InputError, match="more than 100 pairs lie within"):
            near_duplicates(gallery, threshold=threshold)
        assert found == [3 * 40]
    with pytest.raises(InputError, match="has 1 items"):
        near_duplicates(gallery_of(z_ND[:1], s_NE[:1], WEIGHTS, mode="sample"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON, table and contact sheet; of three pictures, one is no more there."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    z_ND, s_NE = rows(30, WEIGHTS, seed=4)
    z_ND[10] = z_ND[20] = z_ND[3]
    gallery = gallery_of(
        z_ND, s_NE, WEIGHTS, mode="sample", source=Source(kind="folder", place=str(pictures))
    )
    for number in (3, 20):
        Image.new("RGB", (9, 7), "red").save(pictures / f"{number:05d}.jpg")
    index = gallery.save(tmp_path / "photos.index")
    command = ["index", "duplicates", str(index), "--threshold", "0"]
    page = tmp_path / "page.html"
    assert main([*command, "--json", "--html", str(page)]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert group["ids"] == ["00003.jpg", "00010.jpg", "00020.jpg"]
    assert group["labels"] == ["label 3", "label 3", "label 6"]
    assert group["paths"][0] == str(pictures / "00003.jpg")
    html = page.read_text()
    assert html.count('<img src="data:image/jpeg') == 2 and html.count('class="gone"') == 1
    assert "3 items" in html and "2 labels" in html
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 groups with 3 of 30 items" in " ".join(printed.split())
    assert dataclasses.asdict(near_duplicates(gallery, threshold=0))["groups"][0]["least"] == 0
