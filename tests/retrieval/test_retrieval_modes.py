"""Every mode's served vectors against the mode's own distance in float64, and the re-ranking
proof."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import REPOSITORY

from namr_dist.errors import InputError
from namr_dist.retrieval.evaluate import evaluate, evaluate_sample
from namr_dist.retrieval.modes import MODES, row_names
from namr_dist.retrieval.rerank import rerank
from namr_dist.retrieval.search import search, search_excluding_self
from namr_dist.retrieval.vectors import (
    adaptive_vectors,
    calibrated_vectors,
    local_density,
    sample_vectors,
    symmetric_vectors,
)

DELTA = 0.5


def embeddings(
    seed: int, count: int, width: int = 16, *, mean: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """z around a point far from the origin, s anywhere in (1 − δ, 1 + δ)."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((count, width)) + mean
    return z.astype(np.float32), rng.uniform(1 - DELTA, 1 + DELTA, (count, width)).astype(
        np.float32
    )


def squared(mode: str, zq, sq, z, s, rho=None):
    """(Q, N) float64: the definitions of docs/algorithm.md, "Retrieval", pair by pair."""
    zq, sq, z, s = (a.astype(np.float64) for a in (zq, sq, z, s))
    difference = (zq[:, None] - z[None]) ** 2
    if mode == "sample":
        return difference.sum(-1)
    if mode == "cosine":
        cosine = zq @ z.T / np.linalg.norm(zq, axis=1)[:, None] / np.linalg.norm(z, axis=1)
        return 2 - 2 * cosine
    if mode == "adaptive":
        return (sq[:, None] * difference).sum(-1)
    if mode == "symmetric":
        return ((sq[:, None] + s[None]) * difference).sum(-1)
    return difference.sum(-1) - 0.5 * rho


def served(mode, zq, sq, z, s, rho):
    return {
        "sample": lambda: sample_vectors(zq, z),
        "cosine": lambda: sample_vectors(zq, z, cosine=True),
        "adaptive": lambda: adaptive_vectors(zq, sq, z),
        "symmetric": lambda: symmetric_vectors(zq, sq, z, s),
        "calibrated": lambda: calibrated_vectors(zq, z, rho),
    }[mode]()


@pytest.mark.parametrize("mode", ["sample", "cosine", "adaptive", "symmetric", "calibrated"])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_served_vectors_give_the_modes_own_distance(mode, mean):
    (zq, sq), (z, s) = embeddings(1, 25, mean=mean), embeddings(2, 120, mean=mean)
    z[7] = zq[3]  # a duplicate of a query, and two equal items
    z[50], s[50] = z[20], s[20]
    rho = local_density(z)
    vectors = served(mode, zq, sq, z, s, rho)
    wide = {"sample": 16, "cosine": 16, "adaptive": 32, "symmetric": 65, "calibrated": 17}[mode]
    assert vectors.items_NV.shape == (120, wide) and vectors.items_NV.dtype == np.float32
    values, ids = search(vectors.queries_QV, vectors.items_NV, 120, metric=vectors.metric)
    truth = squared(mode, zq, sq, z, s, rho)
    # Rounding z to fp32 after centring costs 1e-7 of the squares that are added up.
    close = 2e-5 if mean == 0 or mode == "cosine" else 1e-4
    ordered = np.take_along_axis(truth, ids, 1)
    np.testing.assert_allclose(vectors.squared_distances(values), ordered, atol=close)
    assert (np.diff(ordered, axis=1) > -2 * close).all()
    assert (np.argmax(ids == 20, axis=1) < np.argmax(ids == 50, axis=1)).all()


def test_density_is_the_mean_over_the_ten_nearest_others():
    z, _ = embeddings(3, 60)
    z[11] = z[10]
    truth = np.sort(
        squared("sample", z, z, z, z) + np.where(np.eye(60, dtype=bool), np.inf, 0), axis=1
    )
    np.testing.assert_allclose(local_density(z), truth[:, :10].mean(1), rtol=1e-5)
    few = z[:4]
    others = squared("sample", few, few, few, few).sum(axis=1) / 3  # only three others exist
    np.testing.assert_allclose(local_density(few), others, rtol=1e-5)
    assert local_density(z[:1]).tolist() == [0.0]


def test_weights_of_one_change_nothing():
    z, _ = embeddings(4, 300)
    ones = np.ones_like(z)
    plain = search_excluding_self(*_vectors(sample_vectors(z, z)), 20)[1]
    for vectors in (adaptive_vectors(z, ones, z), symmetric_vectors(z, ones, z, ones)):
        ids = search_excluding_self(*_vectors(vectors), 20, metric=vectors.metric)[1]
        np.testing.assert_array_equal(ids, plain)
    result = rerank(z, ones, z, k=20, delta=DELTA, candidates=60)
    np.testing.assert_array_equal(result.ids_QK, plain)


def _vectors(vectors):
    return vectors.queries_QV, vectors.items_NV


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [2, 16])
def test_certificate_is_truthful(seed, width):
    """A certified list is the full order, with weights up to their very bounds and duplicates
    around."""
    z, s = embeddings(seed, 400, width, mean=0.0)
    rng = np.random.default_rng(seed)
    s[::3] = rng.choice([1 - DELTA, 1 + DELTA], (len(s[::3]), width))
    z[200:260] = z[:60]
    z[260:300] = z[:40] + 1e-4 * rng.standard_normal((40, width))
    truth = squared("adaptive", z, s, z, s)
    np.fill_diagonal(truth, np.inf)
    full = np.argsort(truth.astype(np.float32), axis=1, kind="stable")
    shares = []
    for candidates in (5, 20, 80, 399, 400):
        result = rerank(z, s, z, k=5, delta=DELTA, candidates=candidates)
        np.testing.assert_array_equal(
            result.ids_QK[result.certified_Q], full[result.certified_Q][:, :5]
        )
        shares.append(result.certified_percent)
    assert shares == sorted(shares) and shares[-1] == 100
    if width == 2:
        assert shares[2] > 50  # the proof is of use where neighbours thin out fast
    np.testing.assert_array_equal(result.ids_QK, full[:, :5])


def test_rerank_with_queries_of_their_own():
    (zq, sq), (z, s) = embeddings(7, 12), embeddings(8, 90)
    result = rerank(zq, sq, z, k=4, delta=DELTA, candidates=90, query_ids_Q=np.full(12, -1))
    truth = squared("adaptive", zq, sq, z, s)
    np.testing.assert_array_equal(result.ids_QK, np.argsort(truth, axis=1)[:, :4])
    np.testing.assert_allclose(result.squared_QK, np.sort(truth, axis=1)[:, :4], rtol=1e-5)
    assert result.certified_Q.all()


def test_evaluate_measures_every_mode_and_control():
    rng = np.random.default_rng(9)
    labels = np.repeat(np.arange(40), 5)
    labels[-1] = 99
    z = (rng.standard_normal((100, 16))[labels] + rng.standard_normal((200, 16))).astype(np.float32)
    s = rng.uniform(0.5, 1.5, z.shape).astype(np.float32)
    bonus = rng.random(200)
    result = evaluate(z, s, labels, delta=DELTA, candidates=200, bonus_N=bonus)
    test = result["test"]
    assert list(test) == row_names(MODES) and len(test) == 12
    assert result["test_protocol"]["looks_at_gallery"] == ["calibrated"]
    names = {"R@1", "R@2", "R@4", "R@8", "MAP@R", "R-precision"}
    assert set(test["sample"]) == names | {"NMI", "AMI"} and set(test["rerank"]) == names
    assert all(0 <= value <= 100 for figures in test.values() for value in figures.values())
    assert result["test_counts"] == {
        "queries": 199,
        "left_out": 1,
        "items": 200,
        "classes": 41,
        "largest_R": 4,
        "rerank_candidates": 200,
        "rerank_certified_percent": 100.0,
    }
    # All candidates re-scored is the adaptive mode; weights of one are the sample mode.
    assert test["rerank"] == pytest.approx(test["adaptive"])
    assert test["rerank_shuffled"] == pytest.approx(test["adaptive_shuffled"])
    plain = {name: test["sample"][name] for name in names}
    assert test["adaptive_s1"] == pytest.approx(plain) and test["symmetric_s1"] == pytest.approx(
        plain
    )
    assert (
        test["adaptive"] != test["adaptive_shuffled"]
        and test["symmetric"] != test["symmetric_shuffled"]
    )
    assert evaluate_sample(z, labels) == pytest.approx(plain)
    again = evaluate(z, s, labels, delta=DELTA, candidates=200, bonus_N=bonus)
    assert again == result
    moved = evaluate(z, s, labels, delta=DELTA, candidates=200, bonus_N=bonus, seed=1)["test"]
    assert (
        moved["adaptive"] == test["adaptive"]
        and moved["adaptive_shuffled"] != test["adaptive_shuffled"]
    )


def test_the_documented_modes_are_those_that_there_are():
    section = (
        (REPOSITORY / "docs" / "algorithm.md")
        .read_text(encoding="utf-8")
        .split("## Retrieval\n\n")[1]
    )
    table = section.split("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == [
        "mode",
        *(mode.name for mode in MODES),
    ]


def test_evaluate_without_structure_and_by_cosine():
    rng = np.random.default_rng(10)
    labels = np.repeat(np.arange(20), 4)
    z = rng.standard_normal((20, 8))[labels] + rng.standard_normal((80, 8)) + 1
    result = evaluate(z, None, labels, delta=DELTA, ks=(1, 3), distance="cosine")
    assert set(result["test"]) == {"sample", "calibrated"}
    lengths = rng.uniform(0.1, 10, (80, 1))
    scaled = evaluate(z * lengths, None, labels, delta=DELTA, ks=(1, 3), distance="cosine")
    assert scaled["test"]["sample"]["MAP@R"] == pytest.approx(result["test"]["sample"]["MAP@R"])
    assert evaluate_sample(z * lengths, labels) != evaluate_sample(z, labels)


def test_bad_evaluations_are_named():
    z, s = embeddings(12, 10)
    labels = np.arange(10) // 2
    with pytest.raises(InputError, match="outside 1 ± 0.1"):
        evaluate(z, s, labels, delta=0.1)
    with pytest.raises(InputError, match="weights must be positive"):
        evaluate(z, s - 1, labels, delta=DELTA)
    with pytest.raises(InputError, match="does not fit z"):
        evaluate(z, s[:5], labels, delta=DELTA)
    with pytest.raises(InputError, match="10 integers"):
        evaluate(z, s, labels[:5], delta=DELTA)
    with pytest.raises(InputError, match="at least one cut-off"):
        evaluate(z, s, labels, delta=DELTA, ks=())
    with pytest.raises(InputError, match="candidates = 3, k = 5"):
        rerank(z, s, z, k=5, delta=DELTA, candidates=3)
    with pytest.raises(InputError, match="delta = 1"):
        rerank(z, s, z, k=5, delta=1, candidates=9)
