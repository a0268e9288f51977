"""Evaluation with groups of images, against loops, and at every scale of embeddings."""

from __future__ import annotations

import numpy as np
import pytest
from test_retrieval_metrics import by_loops, clusters

from namr_dist.data.shardset.manifest import ROLES
from namr_dist.errors import InputError
from namr_dist.retrieval.evaluate import evaluate, evaluate_sample
from namr_dist.retrieval.reidentification import reidentify
from namr_dist.retrieval.search import search

KS = (1, 3, 40)


def without_same_group(z, labels, groups, queries, items):
    """Market-1501's protocol over a full sort in float64: the figures, and how many queries have
    any right item."""
    rows, counted = [], 0
    for query in queries:
        squares = ((z[items] - z[query]) ** 2).sum(axis=1)
        order = [
            item
            for item in items[np.argsort(squares, kind="stable")]
            if item != query
            and not (labels[item] == labels[query] and groups[item] == groups[query])
        ]
        hits = [labels[item] == labels[query] for item in order]
        relevant = sum(hits)
        if not relevant:
            continue
        counted += 1
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(relevant) if hits[i]]
        rows.append(
            [
                *(any(hits[:k]) for k in KS),
                sum(precisions) / relevant,
                sum(hits[:relevant]) / relevant,
                1 / (hits.index(True) + 1),
            ]
        )
    names = (*(f"R@{k}" for k in KS), "MAP@R", "R-precision", "MRR")
    return dict(zip(names, 100 * np.mean(rows, axis=0), strict=True)), counted


def grouped(seed):
    """On a grid around 0, which centring keeps, so that there are ties between groups and classes;
    one class lies in one group only."""
    z, labels = clusters(seed, sizes=[6, 6, 2, 4, 1, 15, 3, 5, 3, 3], width=4, noise=2.0)
    z, labels = np.concatenate([np.round(z), -np.round(z)]), np.tile(labels, 2)
    groups = np.random.default_rng(seed).integers(0, 3, len(z))
    groups[labels == labels[0]] = 1
    return z, labels, groups


@pytest.mark.parametrize("seed", [1, 2])
def test_same_class_and_group_is_left_out(seed):
    z, labels, groups = grouped(seed)
    every = np.arange(len(z))
    expected, counted = without_same_group(z, labels, groups, every, every)
    given = {"ks": KS, "also": ("MRR",), "groups_N": groups}
    assert evaluate_sample(z, labels, **given) == pytest.approx(expected, abs=1e-10)
    s = np.random.default_rng(seed).integers(8, 25, z.shape) / 16  # fp32 holds all sums
    whole = evaluate(z, s, labels, delta=0.5, candidates=len(z), clustering=False, **given)
    assert whole["test"]["sample"] == pytest.approx(expected, abs=1e-10)
    assert whole["test"]["rerank"] == pytest.approx(whole["test"]["adaptive"])
    assert whole["test"]["adaptive_s1"] == pytest.approx(expected)
    assert whole["test_counts"]["queries"] == counted < len(z) - 1
    assert whole["test_protocol"]["same_class_and_group"] == "left out"
    apart = evaluate_sample(z, labels, ks=KS, groups_N=every)  # each image a group of its own
    assert apart == evaluate_sample(z, labels, ks=KS) != expected


def test_groups_with_queries_and_a_gallery():
    z, labels, groups = grouped(3)
    z = z + 0.1 * np.random.default_rng(9).standard_normal(z.shape)  # no ties: the mean is another
    roles = np.random.default_rng(3).integers(0, len(ROLES), len(z))
    queries = np.flatnonzero(roles != ROLES.index("gallery"))
    items = np.flatnonzero(roles != ROLES.index("query"))
    expected, _ = without_same_group(z, labels, groups, queries, items)
    found = evaluate_sample(z, labels, ks=KS, also=("MRR",), groups_N=groups, roles_N=roles)
    assert found == pytest.approx(expected, abs=1e-10)


def test_groups_that_do_not_fit_are_named():
    z, labels, groups = grouped(4)
    with pytest.raises(InputError, match="groups: 96 integers"):
        evaluate_sample(z, labels, groups_N=groups[:5])


@pytest.mark.parametrize("scale", [1e-300, 1e-24, 1e-12, 1e12])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_figures_do_not_depend_on_the_scale(distance, scale):
    """Nor those of modes that add a term in squared units. By powers of two, so that not even
    rounding differs."""
    z, labels = clusters(5, sizes=[7] * 9, noise=1.5)
    z = z.astype(np.float64)
    rng = np.random.default_rng(5)
    s, rho = rng.uniform(0.5, 1.5, z.shape), rng.uniform(0, 9, len(z))
    power = 2.0 ** np.round(np.log2(scale))
    unit = power if distance == "euclidean" else 1.0
    given = {"delta": 0.5, "distance": distance, "clustering": False, "ks": (1, 2, 9)}
    # γ ρ in units of squares, where float64 and the limit of 1e17 let it be.
    bonus = unit * unit * rho if 0 < unit * unit < 1e16 else None
    expected = evaluate(z, s, labels, bonus_N=None if bonus is None else rho, **given)
    assert evaluate(power * z, s, labels, bonus_N=bonus, **given) == expected
    ranked = np.argsort(((z[:, None] - z) ** 2).sum(-1) + np.diag([np.inf] * len(z)), axis=1)
    if distance == "euclidean":
        by_hand = by_loops(ranked, labels, labels, np.arange(len(z)), (1, 2, 9))[0]
        assert expected["test"]["sample"] == pytest.approx(by_hand)
        again = reidentify(power * z, s, labels, draws=2, seed=1)
        assert again == reidentify(z, s, labels, draws=2, seed=1)


def test_collapsed_embeddings_are_evaluated_at_every_scale():
    labels = np.repeat(np.arange(5), 4)
    s = np.ones((20, 3))
    expected = evaluate(np.ones((20, 3)), s, labels, delta=0.5, clustering=False)["test"]
    for value in (0.1, 1 / 3e9, 1e-24, 1e-300, 0.0):
        collapsed = np.full((20, 3), value)
        found = evaluate(collapsed, s, labels, delta=0.5, clustering=False)["test"]
        assert found["sample"] == expected["sample"]


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_search_among_too_small_vectors_is_refused_with_a_remedy(metric):
    rows = np.random.default_rng(6).standard_normal((50, 8))
    expected = search(rows, rows, 5, metric=metric)[1]
    np.testing.assert_array_equal(search(1e-12 * rows, 1e-12 * rows, 5, metric=metric)[1], expected)
    with pytest.raises(
        InputError, match=r"too small for fp32: multiply both by 2.0\*\*\d+"
    ) as caught:
        search(1e-24 * rows, 1e-24 * rows, 5, metric=metric)
    power = float(2 ** int(str(caught.value).split("2.0**")[1].split(",")[0]))
    raised = (1e-24 * rows).astype(np.float32).astype(np.float64) * power
    np.testing.assert_array_equal(search(raised, raised, 5, metric=metric)[1], expected)
    with pytest.raises(InputError, match="fp32 holds 0 for them"):
        search(1e-60 * rows, 1e-60 * rows, 5, metric=metric)
