"""All searches of the sample mode, and what they say of classes and images: which classes are found
worst, which are taken for each other, which images come up everywhere.

Shapes: N test images, Q of them queries, G of them searched, D width, K ranked neighbours, C test
classes that have queries, W queries whose first neighbour is of another class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from namr_dist.results.class_figures import ClassFigures
from namr_dist.retrieval.arrays import Bool, Float64, Int64
from namr_dist.retrieval.metrics import relevance, relevant_counts, retrieval_scores
from namr_dist.retrieval.modes import SAMPLE
from namr_dist.retrieval.roles import Division
from namr_dist.retrieval.search import search_excluding_self
from namr_dist.retrieval.vectors import sample_vectors

NEIGHBOURS = 8
"""that are shown of a search, and in which a hub is looked for"""
_LONGEST_LIST = 32
"""for R@k; MAP@R may ask for more"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Searches:
    """Every query's nearest items, in order."""

    sides: Division
    query_label_Q: Int64
    item_label_G: Int64
    relevant_Q: Int64
    """how many right answers exist"""
    ranked_QK: Int64
    """indices among the items, −1 where there are no more"""
    distance_QK: Float64
    """Euclidean; with `cosine` 1 − cos"""
    right_QK: Bool
    cosine: bool

    @property
    def wrong_W(self) -> Int64:
        """Queries that have a right answer, and whose first neighbour is of another class."""
        found_Q = (self.ranked_QK[:, 0] >= 0) & ~self.right_QK[:, 0]
        return np.flatnonzero(found_Q & (self.relevant_Q > 0))

    def found_label(self, query_W: Int64) -> Int64:
        """(W,) the class of each of these queries' first neighbour."""
        label_W: Int64 = self.item_label_G[self.ranked_QK[query_W, 0]]
        return label_W


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Two classes whose queries find the other one first."""

    labels: tuple[int, int]
    wrong: tuple[int, ...]
    """those queries, the nearest to what they find first"""
    queries: int
    """how many both have"""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """An item that is among the first NEIGHBOURS of many queries."""

    item: int
    found: int
    """by so many queries"""
    wrong: int
    """how many of those are of other classes"""
    queries: tuple[int, ...]
    """all of them: those of other classes first, then by the place at which they find it, then by
    distance"""


def search_all(
    z_ND: Float64, labels_N: Int64, sides: Division, *, cosine: bool, ks: Sequence[int] = ()
) -> Searches:
    """Search for every query: NEIGHBOURS items, or as many as R and the cut-offs ks (up to 32) ask
    for."""
    query_label_Q, item_label_G = labels_N[sides.query_Q], labels_N[sides.item_G]
    relevant_Q = relevant_counts(query_label_Q, item_label_G, query_ids_Q=sides.own_Q)
    served = sample_vectors(z_ND[sides.query_Q], z_ND[sides.item_G], cosine=cosine)
    values_QK, ranked_QK = search_excluding_self(
        served.queries_QV,
        served.items_NV,
        max(NEIGHBOURS, min(max(ks, default=1), _LONGEST_LIST), int(relevant_Q.max())),
        query_ids_Q=sides.own_Q,
        metric=served.metric,
    )
    squared_QK = served.squared_distances(values_QK).clip(min=0)
    return Searches(
        sides=sides,
        query_label_Q=query_label_Q,
        item_label_G=item_label_G,
        relevant_Q=relevant_Q,
        ranked_QK=ranked_QK,
        distance_QK=squared_QK / 2 if cosine else np.sqrt(squared_QK),
        right_QK=relevance(ranked_QK, query_label_Q, item_label_G),
        cosine=cosine,
    )


def sample_figures(searches: Searches, ks: Sequence[int]) -> ClassFigures | None:
    """R@1, R@k for those k that the lists reach, MAP@R and R-precision of each class; None where no
    query has a right answer."""
    counted_Q = searches.relevant_Q > 0
    if not counted_Q.any():
        return None
    scores = retrieval_scores(
        searches.ranked_QK,
        searches.query_label_Q,
        searches.item_label_G,
        ks=sorted({1, *(k for k in ks if 1 <= k <= searches.ranked_QK.shape[1])}),
        query_ids_Q=searches.sides.own_Q,
    )
    label_C, class_Q, queries_C = np.unique(
        searches.query_label_Q[counted_Q], return_inverse=True, return_counts=True
    )
    return ClassFigures(
        label_C=tuple(label_C.tolist()),
        queries_C=queries_C.astype(np.float64),
        rows={
            SAMPLE.name: {
                name: np.bincount(class_Q, each_Q[counted_Q]) / queries_C
                for name, each_Q in zip(scores.percent, scores.each_MQ, strict=True)
            }
        },
    )


def taken_for(searches: Searches) -> dict[int, tuple[int, int]]:
    """Class → the other class that most of its wrong first neighbours are of, and how many; of as
    many, the lower number. Classes without a wrong one are left out."""
    wrong_W = searches.wrong_W
    pairs = np.stack([searches.query_label_Q[wrong_W], searches.found_label(wrong_W)], axis=1)
    result: dict[int, tuple[int, int]] = {}
    for (label, other), count in zip(*map(np.ndarray.tolist, _unique_rows(pairs)), strict=True):
        if label not in result or count > result[label][1]:
            result[label] = other, count
    return result


def confused_pairs(searches: Searches, most: int) -> list[ConfusedPair]:
    """The pairs of classes with the most queries of either that find the other first; of as many,
    those with fewer queries, then by number."""
    wrong_W = searches.wrong_W
    pairs_W2 = np.sort(
        np.stack([searches.query_label_Q[wrong_W], searches.found_label(wrong_W)], axis=1), axis=1
    )
    pairs, counts = _unique_rows(pairs_W2)
    label_C, queries_C = np.unique(
        searches.query_label_Q[searches.relevant_Q > 0], return_counts=True
    )
    queries_of = dict(zip(label_C.tolist(), queries_C.tolist(), strict=True))
    entries = [
        (-count, queries_of.get(low, 0) + queries_of.get(high, 0), low, high)
        for (low, high), count in zip(pairs.tolist(), counts.tolist(), strict=True)
    ]
    result = []
    for _, queries, low, high in sorted(entries)[:most]:
        of_pair = wrong_W[(pairs_W2 == (low, high)).all(axis=1)]
        nearest = of_pair[np.argsort(searches.distance_QK[of_pair, 0], kind="stable")]
        result.append(
            ConfusedPair(labels=(low, high), wrong=tuple(nearest.tolist()), queries=queries)
        )
    return result


def hubs(searches: Searches, most: int) -> tuple[list[Hub], Int64]:
    """The items that the most queries have among their first NEIGHBOURS (the largest k-occurrence,
    Radovanović et al., "Hubs in Space", 2010), the first of as many; and (G,) that number of every
    item."""
    ranked_QK = searches.ranked_QK[:, :NEIGHBOURS]
    found_G = np.bincount(ranked_QK[ranked_QK >= 0], minlength=len(searches.item_label_G))
    result = []
    for item in np.argsort(-found_G, kind="stable")[:most].tolist():
        query_F, place_F = np.nonzero(ranked_QK == item)
        right_F = searches.right_QK[query_F, place_F]
        order_F = np.lexsort((searches.distance_QK[query_F, place_F], place_F, right_F))
        result.append(
            Hub(
                item=item,
                found=len(query_F),
                wrong=int((~right_F).sum()),
                queries=tuple(query_F[order_F].tolist()),
            )
        )
    return [hub for hub in result if hub.found], found_G


def worst_classes(figures: ClassFigures) -> list[int]:
    """Places in the figures' lists, by R@1, then MAP@R, then number."""
    of_sample = figures.rows[SAMPLE.name]
    label_C = np.array(figures.label_C)
    return [int(place) for place in np.lexsort((label_C, of_sample["MAP@R"], of_sample["R@1"]))]


def _unique_rows(pairs_W2: Int64) -> tuple[Int64, Int64]:
    """Different rows in ascending order, and how often each stands there."""
    rows, counts = np.unique(pairs_W2, axis=0, return_counts=True)
    return rows, counts
