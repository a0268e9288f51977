"""Retrieval and clustering metrics, all in percent.

Shapes: Q queries, N items, D width, K ranked neighbours, k one of the cut-offs of R@k.

R of a query is the number of *other* items of its class. Queries with R = 0 have no right answer:
they are left out of every mean, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from threadpoolctl import threadpool_limits

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Bool, Float64, Int64, as_labels, as_matrix
from namr_dist.retrieval.search import checked_query_ids

KMeansEngine = Literal["sklearn", "faiss"]
# Above this many multiplications a round, scikit-learn's k-means takes minutes and faiss seconds.
_SKLEARN_LIMIT = 2e9


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Means over the queries that have a right answer."""

    percent: dict[str, float]
    """"R@k" for each k, "MAP@R", "R-precision"; NaN where no query has a right answer"""
    queries: int
    """queries the means are taken over"""
    left_out: int
    """queries with R = 0"""
    each_MQ: Float64
    """the same for each query, a row for each name in `percent`; NaN where R = 0"""


@dataclass(frozen=True, kw_only=True)
class ClusteringScores:
    """Agreement of k-means clusters with the classes, and how it was computed."""

    percent: dict[str, float]
    """"NMI" and "AMI", both normalised by the arithmetic mean of the two entropies"""
    clusters: int
    seed: int
    engine: KMeansEngine


def relevant_counts(
    query_labels_Q: Any, item_labels_N: Any, *, query_ids_Q: Int64 | None = None
) -> Int64:
    """(Q,) int64: R of each query. query_ids_Q as in search_excluding_self: −1 is "not an item".

    Raises InputError where a query and its own entry among the items have different labels.
    """
    query_labels = as_labels(query_labels_Q, len(query_labels_Q), "query labels")
    item_labels = as_labels(item_labels_N, len(item_labels_N), "item labels")
    own_Q = checked_query_ids(query_ids_Q, len(query_labels), len(item_labels))
    inside_Q = own_Q >= 0
    wrong_Q = inside_Q & (item_labels[own_Q] != query_labels)
    if wrong_Q.any():
        query = int(np.flatnonzero(wrong_Q)[0])
        raise InputError(
            f"query {query} has label {query_labels[query]}, yet its own item {own_Q[query]} has label "
            f"{item_labels[own_Q[query]]}: query_ids and labels must stand in one order"
        )
    classes_C, counts_C = np.unique(item_labels, return_counts=True)
    position_Q = np.searchsorted(classes_C, query_labels).clip(max=len(classes_C) - 1)
    count_Q = np.where(classes_C[position_Q] == query_labels, counts_C[position_Q], 0)
    return (count_Q - inside_Q).astype(np.int64)


def relevance(ranked_QK: Int64, query_labels_Q: Int64, item_labels_N: Int64) -> Bool:
    """(Q, K) bool: does the neighbour share the query's label; index −1 (none) never does."""
    right_QK: Bool = (item_labels_N[ranked_QK] == query_labels_Q[:, None]) & (ranked_QK >= 0)
    return right_QK


def retrieval_scores(
    ranked_QK: Int64,
    query_labels_Q: Any,
    item_labels_N: Any,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    query_ids_Q: Int64 | None = None,
    first_right_Q: Int64 | None = None,
) -> RetrievalScores:
    """R@k, MAP@R and R-precision of ranked neighbours.

    ranked_QK: (Q, K) item indices, nearest first, the query's own entry left out, −1 for "no more
    items"; K must reach the largest R, and max(ks) too unless first_right_Q is given: (Q,) the
    rank, from 1 on, of each query's first right item in the whole order; whatever it says where R =
    0 is not read. With fewer than k other items, R@k looks at all of them.
    R@k is the share of queries with a right item among the first k; R-precision the share of right
    items among the first R; MAP@R = (1/R) Σ_{i ≤ R} P(i)·rel(i) with P(i) the precision of the
    first i (Musgrave et al., "A Metric Learning Reality Check", 2020).
    Raises InputError where K is too small or labels do not fit.
    """
    query_labels = as_labels(query_labels_Q, len(ranked_QK), "query labels")
    item_labels = as_labels(item_labels_N, len(item_labels_N), "item labels")
    relevant_Q = relevant_counts(query_labels, item_labels, query_ids_Q=query_ids_Q)
    needed = max(max(ks) if first_right_Q is None else 1, int(relevant_Q.max()))
    if ranked_QK.shape[1] < needed:
        raise InputError(
            f"{ranked_QK.shape[1]} neighbours a query, {needed} are needed (largest k {max(ks)}, "
            f"largest R {relevant_Q.max()}): search with k = {needed}"
        )
    counted_Q = relevant_Q > 0
    right_QK = relevance(ranked_QK[counted_Q], query_labels[counted_Q], item_labels)
    relevant_Q1 = relevant_Q[counted_Q][:, None]
    names = [f"R@{k}" for k in ks] + ["MAP@R", "R-precision"]
    each_MQ = np.full((len(names), len(counted_Q)), np.nan)
    if not counted_Q.any():
        return RetrievalScores(
            percent=dict.fromkeys(names, float("nan")),
            queries=0,
            left_out=len(counted_Q),
            each_MQ=each_MQ,
        )

    rank_K = np.arange(1, right_QK.shape[1] + 1)
    hit_QK = right_QK & (rank_K <= relevant_Q1)
    precision_QK = np.cumsum(right_QK, axis=1) / rank_K
    if first_right_Q is None:
        shares = [right_QK[:, :k].any(axis=1) for k in ks]
    else:
        shares = [first_right_Q[counted_Q] <= k for k in ks]
    shares.append((precision_QK * hit_QK).sum(axis=1) / relevant_Q1[:, 0])
    shares.append(hit_QK.sum(axis=1) / relevant_Q1[:, 0])
    percent = {name: 100 * float(share.mean()) for name, share in zip(names, shares, strict=True)}
    each_MQ[:, counted_Q] = 100 * np.stack(shares)
    return RetrievalScores(
        percent=percent,
        queries=int(counted_Q.sum()),
        left_out=int((~counted_Q).sum()),
        each_MQ=each_MQ,
    )


def clustering_scores(
    z_ND: Any, labels_N: Any, *, seed: int = 0, engine: KMeansEngine | None = None
) -> ClusteringScores:
    """NMI and AMI between the labels and k-means clusters of z, with k = number of classes.

    z_ND: (N, D) any float type; labels_N: (N,) integers. One start, Euclidean distance. engine None
    takes scikit-learn (k-means++ start), and faiss (random start) where N·k·D is above 2e9; the
    engine is part of the result because the two do not find the same clusters.
    Raises InputError on bad shapes, and where faiss is asked for and not installed.
    """
    # Seconds of imports, which no rank that trains needs.
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    z = as_matrix(z_ND, "z")
    labels = as_labels(labels_N, len(z))
    clusters = len(np.unique(labels))
    if engine is None:
        engine = "faiss" if z.size * clusters > _SKLEARN_LIMIT and _has_faiss() else "sklearn"
    if engine == "faiss":
        assigned_N = _faiss_clusters(z, clusters, seed)
    else:
        # One thread: the same sums, hence the same clusters, on any number of cores; and no active
        # waiting beside another busy process.
        with threadpool_limits(1):
            assigned_N = KMeans(clusters, n_init=1, random_state=seed).fit_predict(
                z.astype(np.float32)
            )
    return ClusteringScores(
        percent={
            "NMI": 100 * float(normalized_mutual_info_score(labels, assigned_N)),
            "AMI": 100 * float(adjusted_mutual_info_score(labels, assigned_N)),
        },
        clusters=clusters,
        seed=seed,
        engine=engine,
    )


def _has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def _faiss_clusters(z_ND: Any, clusters: int, seed: int) -> Int64:
    if not _has_faiss():
        raise InputError(
            "engine = 'faiss': faiss is not installed; install faiss-cpu or take 'sklearn'"
        )
    import faiss

    z = z_ND.astype(np.float32)
    # One point a class is enough here, while faiss warns below 39 and samples above 256.
    kmeans = faiss.Kmeans(
        z.shape[1],
        clusters,
        niter=25,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(z),
    )
    kmeans.train(z)
    return kmeans.index.search(z, 1)[1][:, 0].astype(np.int64)
