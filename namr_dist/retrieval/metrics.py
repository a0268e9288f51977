"""Retrieval and clustering metrics, all in percent.

Shapes: Q queries, N items, D width, K ranked neighbours, k one of the cut-offs of R@k.

R of a query is the number of *other* items of its class. Queries with R = 0 have no right answer:
they are left out of every mean, and counted.

With groups (cameras, sequences), items of the query's own class and group are left out of its
results and of R: the protocol of Market-1501 (Zheng et al.,
"Scalable Person Re-identification: A Benchmark", ICCV 2015), which calls them junk.
"""

from __future__ import annotations

import re
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
_ALSO = re.compile(r"(mAP|precision)@([1-9]\d*)|(MRR)")


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Means over the queries that have a right answer."""

    percent: dict[str, float]
    """"R@k" for each k, "MAP@R", "R-precision", and what else was asked for; NaN where no query has
    a right answer"""
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
    query_labels_Q: Any,
    item_labels_N: Any,
    *,
    query_ids_Q: Int64 | None = None,
    query_groups_Q: Any | None = None,
    item_groups_N: Any | None = None,
) -> Int64:
    """(Q,) int64: R of each query. query_ids_Q as in search_excluding_self: −1 is "not an item".

    query_groups_Q, item_groups_N: (Q,) and (N,) integers, or neither: see the head of this file.
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
    same_Q = _counts(query_labels, item_labels)
    if query_groups_Q is None or item_groups_N is None:
        return same_Q - inside_Q
    # A query's own entry is of its class and group too.
    codes = class_and_group(query_labels, query_groups_Q, item_labels, item_groups_N)
    return same_Q - _counts(*codes)


def _counts(codes_Q: Int64, codes_N: Int64) -> Int64:
    """(Q,) how many of codes_N equal each of codes_Q."""
    values_C, counts_C = np.unique(codes_N, return_counts=True)
    position_Q = np.searchsorted(values_C, codes_Q).clip(max=len(values_C) - 1)
    counts_Q = np.where(values_C[position_Q] == codes_Q, counts_C[position_Q], 0)
    return counts_Q.astype(np.int64)


def class_and_group(
    query_labels_Q: Int64, query_groups_Q: Any, item_labels_N: Int64, item_groups_N: Any
) -> tuple[Int64, Int64]:
    """(Q,) and (N,) int64 codes, equal where both class and group are."""
    queries = len(query_labels_Q)
    groups = (
        as_labels(query_groups_Q, queries, "query groups"),
        as_labels(item_groups_N, len(item_labels_N), "item groups"),
    )
    both_M2 = np.stack(
        [np.concatenate([query_labels_Q, item_labels_N]), np.concatenate(groups)], axis=1
    )
    codes_M = np.unique(both_M2, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return codes_M[:queries], codes_M[queries:]


def longest_list(also: Sequence[str]) -> int:
    """How many neighbours the further metrics of :func:`retrieval_scores` look at; InputError for a
    name that is none."""
    for name in also:
        if not isinstance(name, str) or _ALSO.fullmatch(name) is None:
            raise InputError(
                f"also: {name!r} is no further metric; take mAP@k, precision@k (a number for k) or MRR"
            )
    return max((int(name.partition("@")[2] or 1) for name in also), default=1)


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
    also: Sequence[str] = (),
    query_groups_Q: Any | None = None,
    item_groups_N: Any | None = None,
) -> RetrievalScores:
    """R@k, MAP@R and R-precision of ranked neighbours, and further metrics.

    ranked_QK: (Q, K) item indices, nearest first, the query's own entry left out, −1 for "no more
    items"; K must reach the largest R, and max(ks) too unless first_right_Q is given: (Q,) the
    rank, from 1 on, of each query's first right item in the whole order; whatever it says where R =
    0 is not read. With fewer than k other items, R@k looks at all of them.
    R@k is the share of queries with a right item among the first k; R-precision the share of right
    items among the first R; MAP@R = (1/R) Σ_{i ≤ R} P(i)·rel(i) with P(i) the precision of the
    first i (Musgrave et al., "A Metric Learning Reality Check", 2020).
    also: any of these, by such names; K must reach each k.
      mAP@10: (1/n_k) Σ_{i ≤ k} P(i)·rel(i), with n_k the right items among the first k; 0 without
        any. As OML defines it (open-metric-learning 3, oml.functional.metrics.calc_map); its
        versions before 3 divide by min(k, R).
      precision@10: right items among the first k over min(k, R). As OML's calc_precision, it does
        not hold against a query that it has fewer right items than k.
      MRR: mean of 1 / rank of the first right item (Voorhees, "The TREC-8 Question Answering Track
        Report", 1999); where lists end before it, first_right_Q is needed.
    query_groups_Q, item_groups_N: as in :func:`relevant_counts`; ranked_QK must be without the
    items that they leave out.
    Raises InputError where K is too small or labels do not fit.
    """
    query_labels = as_labels(query_labels_Q, len(ranked_QK), "query labels")
    item_labels = as_labels(item_labels_N, len(item_labels_N), "item labels")
    relevant_Q = relevant_counts(
        query_labels,
        item_labels,
        query_ids_Q=query_ids_Q,
        query_groups_Q=query_groups_Q,
        item_groups_N=item_groups_N,
    )
    needed = max(max(ks) if first_right_Q is None else 1, int(relevant_Q.max()), longest_list(also))
    if ranked_QK.shape[1] < needed:
        raise InputError(
            f"{ranked_QK.shape[1]} neighbours a query, {needed} are needed (largest k {max(ks)}, "
            f"largest R {relevant_Q.max()}): search with k = {needed}"
        )
    counted_Q = relevant_Q > 0
    right_QK = relevance(ranked_QK[counted_Q], query_labels[counted_Q], item_labels)
    relevant_Q1 = relevant_Q[counted_Q][:, None]
    names = [f"R@{k}" for k in ks] + ["MAP@R", "R-precision", *also]
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
    shares: list[Any]
    if first_right_Q is None:
        shares = [right_QK[:, :k].any(axis=1) for k in ks]
    else:
        shares = [first_right_Q[counted_Q] <= k for k in ks]
    shares.append((precision_QK * hit_QK).sum(axis=1) / relevant_Q1[:, 0])
    shares.append(hit_QK.sum(axis=1) / relevant_Q1[:, 0])
    for name in also:
        kind, _, cut = name.partition("@")
        if kind == "MRR":
            shares.append(1 / _first_ranks(right_QK, first_right_Q, counted_Q))
            continue
        right_Qk = right_QK[:, : int(cut)]
        found_Q = right_Qk.sum(axis=1)
        if kind == "precision":
            shares.append(found_Q / relevant_Q1[:, 0].clip(max=int(cut)))
        else:
            total_Q = (precision_QK[:, : int(cut)] * right_Qk).sum(axis=1)
            shares.append(total_Q / found_Q.clip(min=1))
    percent = {name: 100 * float(share.mean()) for name, share in zip(names, shares, strict=True)}
    each_MQ[:, counted_Q] = 100 * np.stack(shares)
    return RetrievalScores(
        percent=percent,
        queries=int(counted_Q.sum()),
        left_out=int((~counted_Q).sum()),
        each_MQ=each_MQ,
    )


def _first_ranks(right_QK: Bool, first_right_Q: Int64 | None, counted_Q: Bool) -> Int64:
    """Ranks of the first right items of the queries that have any."""
    if first_right_Q is not None:
        return first_right_Q[counted_Q]
    if not right_QK.any(axis=1).all():
        raise InputError(
            f"MRR: lists of {right_QK.shape[1]} neighbours end before the first right item; give "
            "first_right_Q, or lists of all items"
        )
    first_Q: Int64 = right_QK.argmax(axis=1) + 1
    return first_Q


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
