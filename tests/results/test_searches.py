"""Confused pairs, hubs and worst classes of points that are placed by hand, and against loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from namr_dist.data.shardset.manifest import ROLES
from namr_dist.results.class_tables import category_rows, class_rows
from namr_dist.results.searches import (
    NEIGHBOURS,
    ConfusedPair,
    Searches,
    confused_pairs,
    hubs,
    sample_figures,
    search_all,
    taken_for,
    worst_classes,
)
from namr_dist.retrieval.roles import divide

PLACES = {
    10: [0.0, 0.25, 0.5],
    20: [10.0, 12.0, 14.0],  # between those of 30, as near to one as to the other
    30: [11.0, 13.0, 15.0],
    40: [100.0, 101.0],
    60: [200.0, 205.0],
    70: [201.0, 300.0, 301.0],
    80: [400.0],  # no other of its class: its wrong first neighbour is not its fault
}


def searched(places: dict[int, list[float]]) -> Searches:
    labels = np.repeat(list(places), [len(of_class) for of_class in places.values()])
    z_N1 = np.concatenate(list(places.values()))[:, None]
    return search_all(z_N1, labels, divide(None, len(labels)), cosine=False)


def test_pairs_and_worst_classes_are_those_that_were_placed() -> None:
    searches = searched(PLACES)
    pairs = confused_pairs(searches, 9)
    assert [(pair.labels, len(pair.wrong), pair.queries) for pair in pairs] == [
        ((20, 30), 6, 6),
        ((60, 70), 3, 5),
    ]
    # 200 and 201 find each other at 1; 205 finds 201 at 4.
    assert pairs[1] == ConfusedPair(labels=(60, 70), wrong=(11, 13, 12), queries=5)
    assert confused_pairs(searches, 1) == pairs[:1]
    assert taken_for(searches) == {20: (30, 3), 30: (20, 3), 60: (70, 2), 70: (60, 1)}
    figures = sample_figures(searches, [1, 2])
    assert figures is not None and figures.label_C == (10, 20, 30, 40, 60, 70)
    assert figures.rows["sample"]["R@1"] == pytest.approx([100, 0, 0, 100, 0, 200 / 3])
    # 20 and 30 are mirror images but for ties, and 60 has a right answer at place 2, beyond R = 1.
    map_r = dict(zip(figures.label_C, figures.rows["sample"]["MAP@R"], strict=True))
    assert map_r[60] == 0 and map_r[10] == map_r[40] == 100
    order = [figures.label_C[place] for place in worst_classes(figures)]
    assert order[0] == 60 and set(order[1:3]) == {20, 30} and order[3:] == [70, 10, 40]


def test_tables_of_classes_and_super_classes() -> None:
    searches = searched(PLACES)
    figures = sample_figures(searches, [1])
    assert figures is not None
    kinds = {10: "a", 20: "a", 30: "b", 40: "b", 60: "b", 70: ""}
    rows = class_rows(figures, taken_for(searches), lambda label: f"#{label}", kinds, most=4)
    assert [(row.title, row.taken_for) for row in rows][::3] == [
        ("#60", "#70, 2 ×"),
        ("#70", "#60, 1 ×"),
    ]
    assert rows[0].queries == 2 and rows[0].category == "b" and rows[0].figures == (0, 0)
    of_kind = {row.name: row for row in category_rows(figures, kinds)}
    assert list(of_kind) == ["b", "a"]  # the worst first; no row for classes without one
    # Means over queries: b has 3 + 2 + 2, of which the two of 40 are right.
    assert of_kind["b"].queries == 7 and of_kind["b"].figures[0] == pytest.approx(200 / 7)
    assert of_kind["a"].figures[0] == pytest.approx(50) and of_kind["a"].intervals == (None, None)


def test_a_hub_is_found_from_all_sides() -> None:
    """In the middle of 20 points that are farther from each other than from it."""
    rays = np.eye(20) * np.arange(1, 21)[:, None]
    z_ND = np.concatenate([rays[:5], np.zeros((1, 20)), rays[5:]])
    labels_N = np.arange(21)
    labels_N[[3, 9]] = labels_N[5]  # two of the hub's own class
    searches = search_all(z_ND, labels_N, divide(None, 21), cosine=False)
    [hub] = [hub for hub in hubs(searches, 21)[0] if hub.item == 5]
    assert (hub.found, hub.wrong) == (20, 18)
    others = [place for place in range(21) if place not in (3, 5, 9)]
    assert list(hub.queries) == [*others, 3, 9]  # all have it first, so by distance


def test_counts_are_those_of_loops_also_with_queries_apart() -> None:
    rng = np.random.default_rng(8)
    # With many ties, which stay such: the mean of 64 items is a sum of powers of two.
    z_ND, labels_N = rng.integers(0, 4, (80, 3)).astype(float), rng.integers(0, 9, 80)
    roles_N = rng.permutation(
        np.repeat([ROLES.index(role) for role in ("", "gallery", "query")], [40, 24, 16])
    )
    sides = divide(roles_N, 80)
    searches = search_all(z_ND, labels_N, sides, cosine=False)
    found: Counter[int] = Counter()
    wrong: Counter[tuple[int, int]] = Counter()
    for query, own in zip(sides.query_Q, sides.own_Q, strict=True):
        squared_G = ((z_ND[sides.item_G] - z_ND[query]) ** 2).sum(axis=1)
        order = [item for item in np.lexsort((np.arange(len(squared_G)), squared_G)) if item != own]
        found.update(map(int, order[:NEIGHBOURS]))
        pair = int(labels_N[query]), int(labels_N[sides.item_G[order[0]]])
        has_answer = any(labels_N[sides.item_G[item]] == pair[0] for item in order)
        if pair[0] != pair[1] and has_answer:
            wrong[min(pair), max(pair)] += 1
    every, found_G = hubs(searches, len(sides.item_G))
    assert {item: int(count) for item, count in enumerate(found_G) if count} == dict(found)
    assert [hub.found for hub in every] == sorted(found.values(), reverse=True)
    pairs = confused_pairs(searches, 99)
    assert {pair.labels: len(pair.wrong) for pair in pairs} == dict(wrong)


def test_distances_are_those_of_the_runs_geometry() -> None:
    z_ND = np.array([[3.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    sides, labels_N = divide(None, 3), np.zeros(3, dtype=int)
    euclidean = search_all(z_ND, labels_N, sides, cosine=False)
    assert euclidean.distance_QK[0, :2] == pytest.approx([13**0.5, 29**0.5])
    cosine = search_all(z_ND, labels_N, sides, cosine=True)
    assert cosine.distance_QK[0, :2] == pytest.approx([1 - 0.5**0.5, 1], rel=1e-6)
