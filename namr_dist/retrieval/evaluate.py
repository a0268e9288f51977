"""Every retrieval mode and its controls, measured on one set of embeddings.

Shapes: Q queries, N items, D width.

The controls ask whether the learnt structure embedding s carries anything that retrieval can use:
the same mode with s = 1 everywhere, and with s permuted between images. A mode is only worth its
cost where it beats both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Float64, Int64, as_labels, as_matrix, unit_rows
from namr_dist.retrieval.metrics import clustering_scores, relevance, relevant_counts, retrieval_scores
from namr_dist.retrieval.modes import (
    DENSITY_NEIGHBOURS,
    GALLERY_DENSITY_WEIGHT,
    Served,
    adaptive_vectors,
    as_weights,
    calibrated_vectors,
    local_density,
    sample_vectors,
    symmetric_vectors,
)
from namr_dist.retrieval.rerank import check_delta, rerank_candidates
from namr_dist.retrieval.roles import divide
from namr_dist.retrieval.search import exact_values, ranks_of, search_backend, search_excluding_self

Distance = Literal["euclidean", "cosine"]

MODES = ("sample", "rerank", "adaptive", "symmetric", "calibrated")
CONTROLS = ("adaptive_s1", "adaptive_shuffled", "symmetric_s1", "symmetric_shuffled", "rerank_shuffled")
LOOKS_AT_GALLERY = ("calibrated",)
"""modes whose distance depends on items other than the two compared: to be reported apart"""
_LONGEST_LIST = 32
"""R@k beyond it comes from the place of the first right item, counted where the list does not reach it:
lists of a thousand neighbours would take most of an evaluation's time and memory"""
_NOT_LISTED = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Queries or items in float64; s is None where a model has no structure head."""

    z: Float64
    s: Float64 | None
    labels: Int64

    def at(self, places: Int64) -> _Side:
        """The rows at ascending places; itself where these are all, so that both sides share one."""
        if len(places) == len(self.z):
            return self
        return _Side(z=self.z[places], s=None if self.s is None else self.s[places], labels=self.labels[places])


def _side(z: Any, s: Any, labels: Any, delta: float, distance: Distance, name: str) -> _Side:
    z_ND = as_matrix(z, f"{name} z")
    labels_N = as_labels(labels, len(z_ND), f"{name} labels")
    s_ND = None if s is None else as_weights(s, z_ND, f"{name} s")
    if s_ND is not None:
        check_delta(s_ND, delta)
    if distance not in ("euclidean", "cosine"):
        raise InputError(f"distance = {distance!r}: take 'euclidean' or 'cosine'")
    return _Side(z=unit_rows(z_ND) if distance == "cosine" else z_ND, s=s_ND, labels=labels_N)


class _Ranking:
    """Ranks one set of queries against one set of items, and scores the result."""

    def __init__(self, queries: _Side, items: _Side, own_Q: Int64, ks: Sequence[int]) -> None:
        if not ks or min(ks) < 1:
            raise InputError(f"ks = {tuple(ks)}: give at least one cut-off, each 1 or more")
        self.queries, self.items, self.own_Q, self.ks = queries, items, own_Q, ks
        self.relevant_Q = relevant_Q = relevant_counts(queries.labels, items.labels, query_ids_Q=own_Q)
        self.k = max(min(max(ks), _LONGEST_LIST), int(relevant_Q.max()))
        self.counts = {
            "queries": int((relevant_Q > 0).sum()),
            "left_out": int((relevant_Q == 0).sum()),
            "items": len(items.z),
            "classes": len(np.unique(items.labels)),
            "largest_R": int(relevant_Q.max()),
        }

    def nearest(self, served: Served, k: int) -> tuple[Float32, Int64]:
        return search_excluding_self(
            served.queries_QV, served.items_NV, k, query_ids_Q=self.own_Q, metric=served.metric
        )

    def percent(self, ranked_QK: Int64, first_right_Q: Int64) -> dict[str, float]:
        return retrieval_scores(
            ranked_QK, self.queries.labels, self.items.labels, ks=self.ks, query_ids_Q=self.own_Q,
            first_right_Q=first_right_Q,
        ).percent

    def served_percent(self, served: Served) -> dict[str, float]:
        ranked_QK = self.nearest(served, self.k)[1]
        return self.percent(ranked_QK, self.first_right(ranked_QK, served))

    def first_right(self, ranked_QK: Int64, served: Served) -> Int64:
        """(Q,) places of the first right items, in the whole order if a cut-off asks for more than the lists."""
        first_Q = self.first_listed(ranked_QK)
        beyond_M = np.flatnonzero((first_Q == _NOT_LISTED) & (self.relevant_Q > 0))
        if ranked_QK.shape[1] < max(self.ks) and len(beyond_M):
            first_Q[beyond_M] = ranks_of(
                served.queries_QV[beyond_M], served.items_NV, self._nearest_right(beyond_M, served),
                query_ids_Q=self.own_Q[beyond_M], metric=served.metric,
            )
        return first_Q

    def first_listed(self, ranked_QK: Int64) -> Int64:
        """(Q,) places, from 1 on, of the first right items in the lists; _NOT_LISTED where there is none."""
        right_QK = relevance(ranked_QK, self.queries.labels, self.items.labels)
        first_Q: Int64 = np.where(right_QK.any(axis=1), right_QK.argmax(axis=1) + 1, _NOT_LISTED)
        return first_Q

    def _nearest_right(self, places_M: Int64, served: Served) -> Int64:
        """(M,) the nearest item of the query's class, itself left out, for queries that have one."""
        order_N = np.argsort(self.items.labels, kind="stable")
        sorted_N = self.items.labels[order_N]
        nearest_M = np.empty(len(places_M), dtype=np.int64)
        sign = 1 if served.metric == "l2" else -1
        for row, place in enumerate(places_M.tolist()):
            start, stop = np.searchsorted(sorted_N, self.queries.labels[place] + np.arange(2))
            right_R = order_N[start:stop]
            right_R = right_R[right_R != self.own_Q[place]]
            query_1V = served.queries_QV[place : place + 1]
            keys_1R = sign * exact_values(query_1V, served.items_NV, right_R[None], served.metric)
            nearest_M[row] = right_R[keys_1R[0].argmin()]
        return nearest_M


def _shuffled(queries: _Side, items: _Side, own_Q: Int64, seed: int) -> tuple[Float64, Float64]:
    """s of queries and items, permuted between images; a query that is also an item keeps one s."""
    assert queries.s is not None and items.s is not None
    rng = np.random.default_rng(seed)
    items_s = items.s[rng.permutation(len(items.s))]
    queries_s = queries.s[rng.permutation(len(queries.s))]
    return np.where((own_Q >= 0)[:, None], items_s[own_Q], queries_s), items_s


def evaluate(
    z_ND: Any,
    s_ND: Any | None,
    labels_N: Any,
    *,
    delta: float,
    ks: Sequence[int] = (1, 2, 4, 8),
    seed: int = 0,
    candidates: int = 100,
    distance: Distance = "euclidean",
    roles_N: Any | None = None,
) -> dict[str, Any]:
    """The evaluation of one split: every image queries all the others, or those that its role lets it.

    z_ND: (N, D) sample embeddings; s_ND: (N, D) structure embeddings, or None (only the modes that do
    without them are measured); labels_N: (N,) integers. numpy or torch, any float type.
    roles_N: (N,) integers that count in manifest.ROLES; None: every image queries and is searched. NMI and
    AMI are those of the images that are searched.
    delta: δ of the structure head; ks: the cut-offs of R@k; seed: of the permuted controls and of
    k-means; candidates: C of the re-ranking (raised to the k that MAP@R needs; R@k beyond C takes the rest
    in its plain order); distance: "cosine" scales the rows of z to length 1 before anything else.

    Returns blocks that go into metrics.json as they are, all metrics in percent:
      test           {mode: {"R@1", ..., "MAP@R", "R-precision"}} for MODES and CONTROLS; "sample" has
                     "NMI" and "AMI" besides
      test_counts    queries, left_out (no other image of their class), items, classes, largest_R,
                     rerank_candidates, rerank_certified_percent
      test_protocol  distance, seeds, k-means engine, search back end, modes that look at the gallery
    Raises InputError on bad shapes, NaN, s outside 1 ± δ, and roles that leave no query or no item.
    Memory: some copies of the (N, 4D + 1) matrix of the symmetric mode, and blocks of 128 MiB.
    """
    side = _side(z_ND, s_ND, labels_N, delta, distance, "test")
    sides = divide(roles_N, len(side.z))
    queries, items, own_Q = side.at(sides.query_Q), side.at(sides.item_G), sides.own_Q
    ranking = _Ranking(queries, items, own_Q, ks)
    zq, z = queries.z, items.z
    # Candidates beyond the other items would only be padding.
    count = max(ranking.k, min(candidates, len(z)))
    plain = sample_vectors(zq, z)
    plain_QC, plain_ids_QC = ranking.nearest(plain, count)
    plain_first_Q = ranking.first_right(plain_ids_QC, plain)
    clusters = clustering_scores(z, items.labels, seed=seed)
    scores = {"sample": ranking.percent(plain_ids_QC, plain_first_Q) | clusters.percent}
    counts: dict[str, Any] = dict(ranking.counts)

    if queries.s is not None and items.s is not None:
        ones_q, ones = np.ones_like(zq), np.ones_like(z)
        mixed_q, mixed = _shuffled(queries, items, own_Q, seed)
        for name, sq in (("rerank", queries.s), ("rerank_shuffled", mixed_q)):
            found = rerank_candidates(zq, sq, z, plain_QC, plain_ids_QC, k=count, delta=delta).ids_QK
            first_Q = ranking.first_listed(found)
            first_Q = np.where(first_Q == _NOT_LISTED, plain_first_Q, first_Q)
            scores[name] = ranking.percent(found[:, : ranking.k], first_Q)
        first = rerank_candidates(zq, queries.s, z, plain_QC, plain_ids_QC, k=ranking.k, delta=delta)
        counts["rerank_candidates"] = count
        counts["rerank_certified_percent"] = first.certified_percent
        for suffix, sq, s in (("", queries.s, items.s), ("_s1", ones_q, ones), ("_shuffled", mixed_q, mixed)):
            scores["adaptive" + suffix] = ranking.served_percent(adaptive_vectors(zq, sq, z))
            scores["symmetric" + suffix] = ranking.served_percent(symmetric_vectors(zq, sq, z, s))
    scores["calibrated"] = ranking.served_percent(calibrated_vectors(zq, z, local_density(z)))

    backend = search_backend()
    return {
        "test": {mode: scores[mode] for mode in (*MODES, *CONTROLS) if mode in scores},
        "test_counts": counts,
        "test_protocol": {
            "distance": distance,
            "recall_cut_offs": list(ks),
            "shuffle_seed": seed,
            "k_means": f"{clusters.engine}, k = {clusters.clusters}, 1 start, seed {clusters.seed}",
            "nmi_and_ami_normalisation": "arithmetic",
            "calibrated": f"d² − {GALLERY_DENSITY_WEIGHT} × mean d² to its {DENSITY_NEIGHBOURS} nearest",
            "looks_at_gallery": list(LOOKS_AT_GALLERY),
            "search_backend": backend.name,
            "search_backend_reason": backend.reason,
        },
    }


def evaluate_sample(
    z_ND: Any,
    labels_N: Any,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    distance: Distance = "euclidean",
    roles_N: Any | None = None,
) -> dict[str, float]:
    """R@k, MAP@R and R-precision of the sample mode alone, in percent: for validation while training and for
    embeddings without s.

    Arguments and errors as in :func:`evaluate`.
    """
    side = _side(z_ND, None, labels_N, 0.0, distance, "sample")
    sides = divide(roles_N, len(side.z))
    queries, items = side.at(sides.query_Q), side.at(sides.item_G)
    return _Ranking(queries, items, sides.own_Q, ks).served_percent(sample_vectors(queries.z, items.z))
