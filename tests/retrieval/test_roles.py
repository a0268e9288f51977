"""Queries and galleries, and cut-offs beyond the lists, against the definitions over a full sort in
float64."""

from __future__ import annotations

import numpy as np
import pytest
from test_retrieval_metrics import by_loops, clusters

from namr_dist.errors import InputError
from namr_dist.retrieval.evaluate import evaluate, evaluate_sample
from namr_dist.retrieval.roles import divide
from namr_dist.retrieval.search import ranks_of

BOTH, QUERY, GALLERY = 0, 1, 2
SERVED = ("sample", "adaptive", "symmetric", "calibrated")


def brute_force(z, s, labels, roles, ks):
    """Every served mode's figures: all pairs in float64, every query's whole order, plain loops
    over the ranks."""
    queries, items = np.flatnonzero(roles != GALLERY), np.flatnonzero(roles != QUERY)
    own = np.array([list(items).index(query) if query in items else -1 for query in queries])
    z, s = z.astype(np.float64), s.astype(np.float64)
    squares = (z[queries][:, None] - z[items][None]) ** 2
    gallery = ((z[items][:, None] - z[items][None]) ** 2).sum(-1)
    np.fill_diagonal(gallery, np.inf)
    density = np.sort(gallery, axis=1)[:, :10].mean(axis=1)
    distances = {
        "sample": squares.sum(-1),
        "adaptive": (s[queries][:, None] * squares).sum(-1),
        "symmetric": ((s[queries][:, None] + s[items][None]) * squares).sum(-1),
        "calibrated": squares.sum(-1) - 0.5 * density,
    }
    figures = {}
    for mode, distance in distances.items():
        ranked = np.argsort(distance, axis=1, kind="stable")
        ranked = np.array(
            [
                [item for item in row if item != itself] + [-1] * int(itself >= 0)
                for row, itself in zip(ranked, own, strict=True)
            ]
        )
        figures[mode], counted = by_loops(ranked, labels[queries], labels[items], own, ks)
    return figures, counted, len(queries), len(items)


@pytest.fixture
def mixed():
    """150 images of 25 classes: some both, some queries, some gallery; two classes without any
    gallery image."""
    z, labels = clusters(20, sizes=[6] * 25, noise=1.6)
    roles = np.random.default_rng(20).choice([BOTH, QUERY, GALLERY], 150, p=[0.2, 0.4, 0.4])
    roles[np.isin(labels, [5, 8])] = QUERY
    s = np.random.default_rng(21).uniform(0.5, 1.5, z.shape).astype(np.float32)
    return z, s, labels, roles.astype(np.int8)


def test_queries_that_are_partly_items_equal_the_definitions(mixed):
    z, s, labels, roles = mixed
    ks = (1, 5, 10)
    expected, counted, queries, items = brute_force(*mixed, ks)
    result = evaluate(z, s, labels, delta=0.5, ks=ks, roles_N=roles)
    for mode in SERVED:
        measured = {name: result["test"][mode][name] for name in expected[mode]}
        assert measured == pytest.approx(expected[mode], abs=1e-9), mode
    assert result["test_counts"]["queries"] == counted and result["test_counts"]["items"] == items
    assert result["test_counts"]["left_out"] == queries - counted >= 12
    sample = evaluate_sample(z, labels, ks=ks, roles_N=roles)
    assert sample == pytest.approx(expected["sample"], abs=1e-9)


def test_no_roles_are_leave_one_out(mixed):
    z, s, labels, _ = mixed
    assert evaluate(z, s, labels, delta=0.5, roles_N=np.zeros(150, np.int8)) == evaluate(
        z, s, labels, delta=0.5
    )


@pytest.mark.parametrize("roles", ["none", "mixed"])
def test_cut_offs_beyond_the_lists_equal_the_definitions(roles):
    """Hardly any structure, so that many first right items lie beyond 32 neighbours, and beyond 100
    candidates."""
    rng = np.random.default_rng(22)
    labels = rng.permutation(np.repeat(np.arange(75), 4))
    z = (0.4 * rng.standard_normal((75, 6))[labels] + rng.standard_normal((300, 6))).astype(
        np.float32
    )
    z[100:120] = z[0]  # ties, which go by index
    s = rng.uniform(0.5, 1.5, z.shape).astype(np.float32)
    s[100:120] = s[0]
    role_N = np.zeros(300, np.int8) if roles == "none" else rng.integers(0, 3, 300).astype(np.int8)
    ks = (1, 40, 120, 200, 1000)
    expected, counted, _, items = brute_force(z, s, labels, role_N, ks)
    result = evaluate(z, s, labels, delta=0.5, ks=ks, roles_N=role_N)
    for mode in SERVED:
        assert 40 < expected[mode]["R@120"] < expected[mode]["R@200"] <= 100
        assert expected[mode]["R@120"] < 99  # some have theirs beyond the candidates
        measured = {name: result["test"][mode][name] for name in expected[mode]}
        assert measured == pytest.approx(
            expected[mode], abs=100.5 / counted if mode == "calibrated" else 1e-9
        ), mode
        assert result["test"][mode]["R@1000"] == 100 and items < 1000
    rerank = result["test"]["rerank"]
    assert rerank["R@40"] == pytest.approx(expected["adaptive"]["R@40"], abs=2)
    for name in ("R@120", "R@200"):  # beyond its 100 candidates the plain order goes on
        assert rerank[name] == result["test"]["sample"][name]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["random", "grid", "collapsed"])
def test_ranks_equal_positions_in_a_full_sort(metric, kind):
    rng = np.random.default_rng(23)
    items = (
        rng.standard_normal((200, 5))
        if kind == "random"
        else rng.integers(0, 2, (200, 5)) * float(kind == "grid")
    )
    queries = np.concatenate([items[:40], rng.standard_normal((10, 5)), items[[7, 7]]])
    own = np.r_[np.arange(40), np.full(10, -1), -1, 7]
    wanted = (own + 1 + rng.integers(0, 198, len(queries))) % 200
    z, x = (
        queries.astype(np.float32).astype(np.float64),
        items.astype(np.float32).astype(np.float64),
    )
    keys = ((z[:, None] - x) ** 2).sum(-1) if metric == "l2" else -(z[:, None] * x).sum(-1)
    order = np.argsort(keys.astype(np.float32), axis=1, kind="stable")
    expected = [
        [item for item in row if item != itself].index(item_wanted) + 1
        for row, itself, item_wanted in zip(order.tolist(), own, wanted, strict=True)
    ]
    assert ranks_of(queries, items, wanted, query_ids_Q=own, metric=metric).tolist() == expected


@pytest.mark.parametrize(
    ("role", "words"),
    [
        (QUERY, "has query images only.* its gallery images"),
        (GALLERY, "has gallery images only.* its query images"),
    ],
)
def test_a_split_of_one_side_is_named(role, words):
    with pytest.raises(InputError, match=f"split 'test' {words}"):
        divide(np.full(5, role, np.int8), 5, "split 'test'")


def test_images_that_are_both_are_enough():
    assert divide(np.array([BOTH, BOTH, GALLERY]), 3).query_Q.tolist() == [0, 1]
    sides = divide(np.array([QUERY, BOTH, QUERY]), 3)
    assert (
        sides.item_G.tolist() == [1]
        and sides.own_Q.tolist() == [-1, 0, -1]
        and not sides.leave_one_out
    )
    assert "3 queries search 1 gallery images; 1 images are both" in str(sides)
    with pytest.raises(InputError, match="leaves 0..2"):
        divide(np.array([0, 3]), 2)
