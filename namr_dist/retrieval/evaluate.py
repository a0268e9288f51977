"""Every retrieval mode and its controls (modes.py), measured on one set of embeddings.

Shapes: Q queries, N items, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Int64, as_labels
from namr_dist.retrieval.metrics import (
    RetrievalScores,
    class_and_group,
    clustering_scores,
    longest_list,
    relevance,
    relevant_counts,
    retrieval_scores,
)
from namr_dist.retrieval.modes import (
    SAMPLE,
    STRUCTURE,
    Distance,
    Mode,
    Side,
    row_name,
    row_names,
    with_own,
)
from namr_dist.retrieval.over_ranks import Searcher
from namr_dist.retrieval.rerank import Reranked, check_delta, rerank_candidates
from namr_dist.retrieval.roles import Division, divide
from namr_dist.retrieval.search import order_of_pairs, search_backend
from namr_dist.retrieval.vectors import (
    DENSITY_NEIGHBOURS,
    GALLERY_DENSITY_WEIGHT,
    Served,
    local_density,
    mean_of_nearest,
)

_LONGEST_LIST = 32
"""R@k beyond it comes from the rank of the first right item, counted where the list does not reach
it: lists of a thousand neighbours would take most of an evaluation's time and memory."""
_NOT_LISTED = np.iinfo(np.int64).max


class _Ranking:
    """Ranks one set of queries against one set of items, and scores the result."""

    def __init__(
        self,
        labels: Int64,
        sides: Division,
        ks: Sequence[int],
        *,
        also: Sequence[str] = (),
        groups_N: Any | None = None,
        searcher: Searcher | None = None,
    ) -> None:
        """labels, groups_N: of the images that `sides` divides."""
        if not ks or min(ks) < 1:
            raise InputError(f"ks = {tuple(ks)}: give at least one cut-off, each 1 or more")
        self.labels_Q, self.labels_N = labels[sides.query_Q], labels[sides.item_G]
        self.own_Q, self.ks, self.also = sides.own_Q, ks, also
        self.searcher = searcher or Searcher()
        self.groups: dict[str, Int64] = {}
        # Of class and group: what a query leaves out. Without groups nothing but itself.
        self.codes: tuple[Int64, Int64] | None = None
        self.left_out = 0
        if groups_N is not None:
            groups = as_labels(groups_N, len(labels), "groups")
            self.groups["query_groups_Q"] = groups[sides.query_Q]
            self.groups["item_groups_N"] = groups[sides.item_G]
            self.codes = class_and_group(
                self.labels_Q, groups[sides.query_Q], self.labels_N, groups[sides.item_G]
            )
            self.left_out = int(relevant_counts(*self.codes, query_ids_Q=self.own_Q).max())
        labels_N = self.labels_N
        self.relevant_Q = relevant_Q = relevant_counts(
            self.labels_Q, labels_N, query_ids_Q=self.own_Q, **self.groups
        )
        self.k = max(min(max(ks), _LONGEST_LIST), int(relevant_Q.max()), longest_list(also))
        self.counts = {
            "queries": int((relevant_Q > 0).sum()),
            "left_out": int((relevant_Q == 0).sum()),
            "items": len(labels_N),
            "classes": len(np.unique(labels_N)),
            "largest_R": int(relevant_Q.max()),
        }

    def nearest(self, served: Served, k: int) -> tuple[Float32, Int64]:
        values_QK, ids_QK = self.searcher.nearest(
            served.queries_QV,
            served.items_NV,
            k + self.left_out,
            query_ids_Q=self.own_Q,
            metric=served.metric,
        )
        if self.codes is None:
            return values_QK, ids_QK
        out_QK = relevance(ids_QK, *self.codes)
        values_QK[out_QK] = np.inf if served.metric == "l2" else -np.inf
        ids_QK[out_QK] = -1
        kept_QK = np.argsort(out_QK, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(values_QK, kept_QK, 1), np.take_along_axis(ids_QK, kept_QK, 1)

    def scores(self, ranked_QK: Int64, first_right_Q: Int64) -> RetrievalScores:
        return retrieval_scores(
            ranked_QK,
            self.labels_Q,
            self.labels_N,
            ks=self.ks,
            query_ids_Q=self.own_Q,
            first_right_Q=first_right_Q,
            also=self.also,
            **self.groups,
        )

    def served_scores(self, served: Served) -> RetrievalScores:
        ranked_QK = self.nearest(served, self.k)[1]
        return self.scores(ranked_QK, self.first_right(ranked_QK, served))

    def by_class(self, scores: dict[str, RetrievalScores]) -> dict[str, Any]:
        """Labels of the classes that have queries, how many, and the means over them of R@k for the
        smallest k and of MAP@R."""
        counted_Q = self.relevant_Q > 0
        label_C, class_Q, queries_C = np.unique(
            self.labels_Q[counted_Q], return_inverse=True, return_counts=True
        )
        return {
            "label": label_C.tolist(),
            "queries": queries_C.tolist(),
            **{
                row: {
                    name: (np.bincount(class_Q, each_Q[counted_Q]) / queries_C).round(3).tolist()
                    for name, each_Q in zip(of_row.percent, of_row.each_MQ, strict=True)
                    if name in (f"R@{min(self.ks)}", "MAP@R")
                }
                for row, of_row in scores.items()
            },
        }

    def first_right(self, ranked_QK: Int64, served: Served) -> Int64:
        """(Q,) ranks of the first right items, in the whole order if a cut-off or MRR asks for more
        than the lists."""
        first_Q = self.first_listed(ranked_QK)
        beyond_M = np.flatnonzero((first_Q == _NOT_LISTED) & (self.relevant_Q > 0))
        asked = ranked_QK.shape[1] < max(self.ks) or "MRR" in self.also
        if asked and len(beyond_M):
            nearest_M = self._nearest_right(beyond_M, served)
            first_Q[beyond_M] = self.searcher.ranks_of(
                served.queries_QV[beyond_M],
                served.items_NV,
                nearest_M,
                query_ids_Q=self.own_Q[beyond_M],
                metric=served.metric,
            )
            if self.codes is not None:
                first_Q[beyond_M] -= self._left_out_before(nearest_M, beyond_M, served)
        return first_Q

    def first_listed(self, ranked_QK: Int64) -> Int64:
        """(Q,) ranks, from 1 on, of the first right items in the lists; _NOT_LISTED where there is
        none."""
        right_QK = relevance(ranked_QK, self.labels_Q, self.labels_N)
        first_Q: Int64 = np.where(right_QK.any(axis=1), right_QK.argmax(axis=1) + 1, _NOT_LISTED)
        return first_Q

    def _nearest_right(self, queries_M: Int64, served: Served) -> Int64:
        """(M,) the first item of the query's class in its order, itself left out, for the numbers
        of queries that have one."""
        row_P, id_P = _matches(self.labels_Q[queries_M], self.labels_N)
        others_P = id_P != self.own_Q[queries_M][row_P]
        if self.codes is not None:
            others_P &= self.codes[1][id_P] != self.codes[0][queries_M][row_P]
        row_P, id_P = row_P[others_P], id_P[others_P]
        order_P = order_of_pairs(
            served.queries_QV[queries_M], served.items_NV, row_P, id_P, metric=served.metric
        )
        first_M = np.minimum.reduceat(order_P, np.searchsorted(row_P, np.arange(len(queries_M))))
        nearest_M: Int64 = first_M & 0xFFFFFFFF
        return nearest_M

    def _left_out_before(self, ids_M: Int64, queries_M: Int64, served: Served) -> Int64:
        """(M,) how many items of the query's class and group, itself aside, come before one of its
        right items."""
        assert self.codes is not None
        row_P, id_P = _matches(self.codes[0][queries_M], self.codes[1])
        others_P = id_P != self.own_Q[queries_M][row_P]
        row_P, id_P = row_P[others_P], id_P[others_P]
        queries_MV = served.queries_QV[queries_M]
        limit_M, order_P = (
            order_of_pairs(queries_MV, served.items_NV, rows, ids, metric=served.metric)
            for rows, ids in ((np.arange(len(ids_M)), ids_M), (row_P, id_P))
        )
        return np.bincount(row_P[order_P < limit_M[row_P]], minlength=len(ids_M))


def _matches(codes_M: Int64, codes_N: Int64) -> tuple[Int64, Int64]:
    """(P,) rows of the first and of the second of all pairs of equal codes, sorted by the first."""
    order_N = np.argsort(codes_N, kind="stable")
    start_M, stop_M = (
        np.searchsorted(codes_N[order_N], codes_M, side) for side in ("left", "right")
    )
    count_M = stop_M - start_M
    row_P = np.repeat(np.arange(len(codes_M)), count_M)
    place_P = np.arange(len(row_P)) - np.repeat(np.cumsum(count_M) - count_M, count_M)
    return row_P, order_N[start_M[row_P] + place_P]


def _with_controls(
    modes: Sequence[Mode], queries: Side, items: Side, own_Q: Int64, seed: int
) -> Iterator[tuple[str, Mode, Side, Side]]:
    """Name of the figures, mode, and the sides it is given: each mode as it is, then with its
    controls. Modes that use what the model does not have are left out."""
    given = {
        "": (queries, items),
        "s1": (queries.with_ones(), items.with_ones()),
        "shuffled": _shuffled(queries, items, own_Q, seed),
    }
    for mode in modes:
        if mode.can_serve(items):
            for control in ("", *mode.controls):
                yield row_name(mode.name, control), mode, *given[control]


def _shuffled(queries: Side, items: Side, own_Q: Int64, seed: int) -> tuple[Side, Side]:
    """Both with their structure embeddings permuted between images; a query that is also an item
    keeps one."""
    rng = np.random.default_rng(seed)
    mixed = items.shuffled(rng.permutation(len(items.z)))
    queries_too = queries.shuffled(rng.permutation(len(queries.z)))
    if queries_too.s is None or mixed.s is None:
        return queries_too, mixed
    s_QD = np.where((own_Q >= 0)[:, None], mixed.s[own_Q], queries_too.s)
    return replace(queries_too, s=s_QD), mixed


def evaluate(
    z_ND: Any,
    s_ND: Any | None,
    labels_N: Any,
    *,
    delta: float,
    ks: Sequence[int] = (1, 2, 4, 8),
    seed: int = 0,
    candidates: int = 100,
    bonus_N: Any | None = None,
    distance: Distance = "euclidean",
    roles_N: Any | None = None,
    clustering: bool = True,
    modes: Sequence[Mode] = (),
    also: Sequence[str] = (),
    groups_N: Any | None = None,
    searcher: Searcher | None = None,
) -> dict[str, Any]:
    """The evaluation of one split: every image queries all the others, or those that its role lets
    it.

    z_ND: (N, D) sample embeddings; s_ND: (N, D) structure embeddings, or None (only the modes that
    do without them are measured); labels_N: (N,) integers. numpy or torch, any float type.
    bonus_N: (N,) γ ρ of each image, at least 0, in squared units of `distance`; None: no structure
    mode.
    roles_N: (N,) integers that count in manifest.ROLES; None: every image queries and is searched.
    NMI and AMI are those of the images that are searched.
    delta: δ of the structure head; ks: the cut-offs of R@k; seed: of the permuted controls and of
    k-means; candidates: C of the re-ranking (raised to the k that MAP@R needs; R@k beyond C takes
    the rest in its plain order); distance: "cosine" scales the rows of z to length 1 before
    anything else.
    clustering: whether to measure NMI and AMI, which takes most of the time.
    modes: of a user's own, measured together with those of modes.py.
    also: further metrics, "mAP@k", "precision@k" and "MRR", as `retrieval_scores` defines them.
    groups_N: (N,) integers, such as the camera of each image: items of the query's own class and
    group are left out of its results and of R (metrics.py); None: the query alone is.
    searcher: on all ranks, which then call this together with the same embeddings and get the same
    figures; None: this process alone.

    Returns blocks that go into metrics.json as they are, all metrics in percent:
      test           {mode: {"R@1", ..., "MAP@R", "R-precision", `also`}} for the modes, then for
                     their controls; "sample" also has "NMI" and "AMI", with `clustering`
      test_classes   "label" and "queries" of each class that has any, and for each row of `test`
                     the means of R@k (the smallest k) and MAP@R over its queries, in lists by
                     class: for intervals over classes
      test_counts    queries, left_out (R = 0), items, classes, largest_R,
                     rerank_candidates, rerank_certified_percent
      test_protocol  distance, seeds, k-means engine, search back end, modes that look at the
                     gallery; with groups, same_class_and_group
      own_modes      {mode: {"sentence", "looks_at_gallery"}} for `modes`; only if there are any
    Raises InputError on bad shapes, NaN, s outside 1 ± δ, roles that leave no query or no item, and
    modes that are none, share a name or make vectors that cannot be searched.
    Memory: some copies of the (N, 4D + 1) matrix of the symmetric mode, and blocks of 128 MiB.
    """
    every = with_own(modes)
    whole = Side.of(z_ND, s_ND=s_ND, bonus_N=bonus_N, distance=distance, name="test")
    if whole.s is not None:
        check_delta(whole.s, delta)
    labels = as_labels(labels_N, len(whole.z), "test labels")
    sides = divide(roles_N, len(whole.z))
    queries, items = whole.at(sides.query_Q), whole.at(sides.item_G)
    ranking = _Ranking(labels, sides, ks, also=also, groups_N=groups_N, searcher=searcher)
    # Candidates beyond the other items would only be padding.
    count = max(ranking.k, min(candidates, len(items.z)))
    plain = SAMPLE.serve(queries, items)
    plain_QC, plain_ids_QC = ranking.nearest(plain, count)
    plain_first_Q = ranking.first_right(plain_ids_QC, plain)

    def rerank(given: Side, k: int) -> Reranked:
        return rerank_candidates(
            given.z, given.s, items.z, plain_QC, plain_ids_QC, k=k, delta=delta
        )

    def reranked(given: Side) -> RetrievalScores:
        ranked_QC = rerank(given, count).ids_QK
        first_Q = ranking.first_listed(ranked_QC)
        first_Q = np.where(first_Q == _NOT_LISTED, plain_first_Q, first_Q)
        return ranking.scores(ranked_QC[:, : ranking.k], first_Q)

    clusters = clustering_scores(items.z, labels[sides.item_G], seed=seed) if clustering else None
    others = len(items.z) - 1
    if sides.leave_one_out and groups_N is None and count >= min(DENSITY_NEIGHBOURS, others) > 0:
        # What the sample mode found is what the density is taken of.
        density_N = mean_of_nearest(plain_QC[:, :others])
    else:
        density_N = local_density(items.z, searcher=searcher)
    items = replace(items, density=density_N)
    scores: dict[str, RetrievalScores] = {}
    for name, mode, side_Q, side_N in _with_controls(every, queries, items, sides.own_Q, seed):
        if mode is SAMPLE:
            scores[name] = ranking.scores(plain_ids_QC, plain_first_Q)
        elif mode.vectors is None:
            scores[name] = reranked(side_Q)
        else:
            scores[name] = ranking.served_scores(mode.serve(side_Q, side_N))
    percent = {name: dict(scores[name].percent) for name in row_names(every) if name in scores}
    if clusters is not None:
        percent[SAMPLE.name] |= clusters.percent
    counts: dict[str, Any] = dict(ranking.counts)
    if queries.s is not None:
        counts["rerank_candidates"] = count
        counts["rerank_certified_percent"] = rerank(queries, ranking.k).certified_percent

    backend = search_backend()
    return {
        "test": percent,
        "test_classes": ranking.by_class(scores),
        "test_counts": counts,
        "test_protocol": {
            "distance": distance,
            "recall_cut_offs": list(ks),
            "shuffle_seed": seed,
            **(
                {
                    "k_means": f"{clusters.engine}, k = {clusters.clusters}, 1 start, seed {clusters.seed}",
                    "nmi_and_ami_normalisation": "arithmetic",
                }
                if clusters
                else {}
            ),
            "calibrated": f"d² − {GALLERY_DENSITY_WEIGHT} × mean d² to its {DENSITY_NEIGHBOURS} nearest",
            "looks_at_gallery": [mode.name for mode in every if mode.looks_at_gallery],
            **({} if groups_N is None else {"same_class_and_group": "left out"}),
            "search_backend": backend.name,
            "search_backend_reason": backend.reason,
        },
        **(
            {
                "own_modes": {
                    mode.name: {
                        "sentence": mode.sentence,
                        "looks_at_gallery": mode.looks_at_gallery,
                    }
                    for mode in modes
                }
            }
            if modes
            else {}
        ),
    }


def evaluate_sample(
    z_ND: Any,
    labels_N: Any,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    distance: Distance = "euclidean",
    roles_N: Any | None = None,
    also: Sequence[str] = (),
    groups_N: Any | None = None,
    searcher: Searcher | None = None,
) -> dict[str, float]:
    """R@k, MAP@R and R-precision of the sample mode alone, in percent, and `also`: for validation
    while training and for embeddings without s.

    Arguments and errors as in :func:`evaluate`.
    """
    whole = Side.of(z_ND, distance=distance, name="sample")
    labels = as_labels(labels_N, len(whole.z), "sample labels")
    sides = divide(roles_N, len(whole.z))
    ranking = _Ranking(labels, sides, ks, also=also, groups_N=groups_N, searcher=searcher)
    served = SAMPLE.serve(whole.at(sides.query_Q), whole.at(sides.item_G))
    return ranking.served_scores(served).percent


def evaluate_structure(
    z_ND: Any,
    rho_N: Any,
    labels_N: Any,
    *,
    gammas: Sequence[float],
    ks: Sequence[int] = (1, 2, 4, 8),
    distance: Distance = "euclidean",
    roles_N: Any | None = None,
) -> dict[float, dict[str, float]]:
    """R@k, MAP@R and R-precision of the structure mode for each γ, in percent; γ = 0 is the sample
    mode. For choosing γ on classes that are neither trained nor tested on.

    rho_N: (N,) ρ of each image. Other arguments and errors as in :func:`evaluate`.
    """
    labels = as_labels(labels_N, len(labels_N), "structure labels")
    sides = divide(roles_N, len(labels))
    ranking = _Ranking(labels, sides, ks)
    figures: dict[float, dict[str, float]] = {}
    for gamma in gammas:
        mode = STRUCTURE if gamma else SAMPLE
        bonus_N = gamma * np.asarray(rho_N, dtype=np.float64)
        whole = Side.of(z_ND, bonus_N=bonus_N, distance=distance, name="structure")
        served = mode.serve(whole.at(sides.query_Q), whole.at(sides.item_G))
        figures[gamma] = ranking.served_scores(served).percent
    return figures
