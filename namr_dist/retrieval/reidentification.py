"""Re-identification, the protocol of VehicleID (Liu et al., "Deep Relative Distance Learning", CVPR
2016).

Shapes: N images, D width, G classes with an image each in the gallery, Q queries, T draws.

One random image of each class is the gallery, all others search it; that is drawn several times.
Each query has exactly one right item, at rank r (from 1 on): CMC@k is the share of queries with r ≤
k, and a query's average precision is 1 / r, whose mean is mAP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Int64, as_labels
from namr_dist.retrieval.modes import Distance, Mode, Side, row_name, row_names, with_own
from namr_dist.retrieval.over_ranks import Searcher
from namr_dist.retrieval.vectors import Served, local_density

CUT_OFFS = (1, 5)
METRICS = (*(f"CMC@{k}" for k in CUT_OFFS), "mAP")


def reidentify(
    z_ND: Any,
    s_ND: Any | None,
    labels_N: Any,
    *,
    draws: int,
    seed: int,
    bonus_N: Any | None = None,
    distance: Distance = "euclidean",
    modes: Sequence[Mode] = (),
    searcher: Searcher | None = None,
) -> dict[str, Any]:
    """CMC@1, CMC@5 and mAP in percent, over galleries drawn at random.

    z_ND: (N, D) sample embeddings; s_ND: (N, D) structure embeddings, or None; labels_N: (N,)
    integers. numpy or torch, any float type. bonus_N, distance, searcher: as in `evaluate`. modes:
    of a user's own, measured with those of modes.py. Distances are exact; ties go to the image that
    comes first. All modes meet the same draws; the density that the calibrated mode needs is that
    of the drawn gallery. No
    re-ranking: a gallery of one image a class is searched whole.

    Returns the block that goes into metrics.json as it is: draws, seed, gallery (G), queries (Q),
    gallery_only (classes of one image: nothing asks for them), and modes: for each served mode,
    then for their controls, the mean of each metric over the draws and, as "CMC@1 std" and so on,
    its standard deviation (divisor T).
    Raises InputError on bad shapes, fewer than one draw, where no class has a second image, and as
    `evaluate` does for modes.
    """
    searcher = searcher or Searcher()
    served = [mode for mode in with_own(modes) if mode.vectors is not None]
    whole = Side.of(z_ND, s_ND=s_ND, bonus_N=bonus_N, distance=distance, name="test")
    labels = as_labels(labels_N, len(whole.z))
    given = {
        "": whole,
        "s1": whole.with_ones(),
        "shuffled": whole.shuffled(np.random.default_rng(seed).permutation(len(whole.z))),
    }
    if draws < 1:
        raise InputError(f"draws = {draws}: draw at least one gallery")
    sizes_G = np.unique(labels, return_counts=True)[1]
    if sizes_G.max() < 2:
        raise InputError(
            "re-identification: no class has two images, so nothing is left to query with; set "
            "evaluation.reidentification_draws to 0"
        )
    measured = [mode for mode in served if mode.can_serve(whole)]
    shares_TM: dict[str, list[list[float]]] = {name: [] for name in row_names(measured)}
    for draw in range(draws):
        query_Q, gallery_G = _draw(labels, np.random.default_rng([seed, draw]))
        density_G = local_density(whole.z[gallery_G], searcher=searcher)
        for control, side in given.items():
            queries, gallery = side.at(query_Q), replace(side.at(gallery_G), density=density_G)
            for mode in measured:
                if control in ("", *mode.controls):
                    vectors = mode.serve(queries, gallery)
                    rank_Q = _ranks(vectors, labels, query_Q, gallery_G, searcher)
                    shares_TM[row_name(mode.name, control)].append(_shares(rank_Q))
    return {
        "draws": draws,
        "seed": seed,
        "gallery": len(sizes_G),
        "queries": len(whole.z) - len(sizes_G),
        "gallery_only": int((sizes_G == 1).sum()),
        "modes": {name: _figures(shares) for name, shares in shares_TM.items()},
    }


def _draw(labels_N: Int64, rng: np.random.Generator) -> tuple[Int64, Int64]:
    """Indices of the queries (Q,) and of one random image of each class (G,), both ascending."""
    order_N = np.lexsort((rng.random(len(labels_N)), labels_N))
    first_G = np.unique(labels_N[order_N], return_index=True)[1]
    gallery_G = np.sort(order_N[first_G])
    return np.setdiff1d(np.arange(len(labels_N)), gallery_G), gallery_G


def _ranks(
    served: Served, labels_N: Int64, query_Q: Int64, gallery_G: Int64, searcher: Searcher
) -> Int64:
    """(Q,) the rank of each query's one right item, from 1 on."""
    by_label_G = np.argsort(labels_N[gallery_G])
    right_Q = by_label_G[np.searchsorted(labels_N[gallery_G], labels_N[query_Q], sorter=by_label_G)]
    return searcher.ranks_of(
        served.queries_QV,
        served.items_NV,
        right_Q,
        query_ids_Q=np.full(len(query_Q), -1),
        metric=served.metric,
    )


def _shares(rank_Q: Int64) -> list[float]:
    """Of one draw, in the order of METRICS."""
    return [*((rank_Q <= k).mean() for k in CUT_OFFS), (1 / rank_Q).mean()]


def _figures(shares_TM: list[list[float]]) -> dict[str, float]:
    percent_TM = 100 * np.array(shares_TM)
    means = dict(zip(METRICS, percent_TM.mean(axis=0).tolist(), strict=True))
    names = (f"{name} std" for name in METRICS)
    return means | dict(zip(names, percent_TM.std(axis=0).tolist(), strict=True))
