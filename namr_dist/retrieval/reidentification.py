"""Re-identification, the protocol of VehicleID (Liu et al., "Deep Relative Distance Learning", CVPR 2016).

Shapes: N images, D width, G classes with an image each in the gallery, Q queries, T draws.

One random image of each class is the gallery, all others search it; that is drawn several times. Each query has
exactly one right item, at place r (from 1 on): CMC@k is the share of queries with r ≤ k, and a query's average
precision is 1 / r, whose mean is mAP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float64, Int64, as_labels, as_matrix
from namr_dist.retrieval.modes import (
    Served,
    adaptive_vectors,
    as_weights,
    calibrated_vectors,
    local_density,
    sample_vectors,
    symmetric_vectors,
)
from namr_dist.retrieval.search import ranks_of

CUT_OFFS = (1, 5)
METRICS = (*(f"CMC@{k}" for k in CUT_OFFS), "mAP")

Serve = Callable[[Int64, Int64], Served]
"""places of the queries (Q,) and of the gallery (G,) → their vectors"""


def reidentify(z_ND: Any, s_ND: Any | None, labels_N: Any, *, draws: int, seed: int) -> dict[str, Any]:
    """CMC@1, CMC@5 and mAP in percent, over galleries drawn at random.

    z_ND: (N, D) sample embeddings; s_ND: (N, D) structure embeddings, or None; labels_N: (N,) integers. numpy or
    torch, any float type. Exact Euclidean distances; ties go to the image that comes first. All modes meet the same
    draws; the density that the calibrated mode needs is that of the drawn gallery.

    Returns the block that goes into metrics.json as it is: draws, seed, gallery (G), queries (Q), gallery_only
    (classes of one image: nothing asks for them), and modes: for each served mode and its controls the mean of each
    metric over the draws and, as "CMC@1 std" and so on, its standard deviation (divisor T).
    Raises InputError on bad shapes, fewer than one draw, and where no class has a second image.
    """
    z = as_matrix(z_ND, "z")
    labels = as_labels(labels_N, len(z))
    s = None if s_ND is None else as_weights(s_ND, z, "s")
    if draws < 1:
        raise InputError(f"draws = {draws}: draw at least one gallery")
    sizes_G = np.unique(labels, return_counts=True)[1]
    if sizes_G.max() < 2:
        raise InputError("re-identification: no class has two images, so nothing is left to query with; set "
                         "evaluation.reidentification_draws to 0")
    modes = _modes(z, s, seed)
    drawn_T = [_draw(labels, np.random.default_rng([seed, draw])) for draw in range(draws)]
    return {
        "draws": draws, "seed": seed, "gallery": len(sizes_G), "queries": len(z) - len(sizes_G),
        "gallery_only": int((sizes_G == 1).sum()),
        "modes": {name: _figures([_ranks(serve, labels, *drawn) for drawn in drawn_T])
                  for name, serve in modes.items()},
    }


def _draw(labels_N: Int64, rng: np.random.Generator) -> tuple[Int64, Int64]:
    """Places of the queries (Q,) and of one random image of each class (G,), both ascending."""
    order_N = np.lexsort((rng.random(len(labels_N)), labels_N))
    first_G = np.unique(labels_N[order_N], return_index=True)[1]
    gallery_G = np.sort(order_N[first_G])
    return np.setdiff1d(np.arange(len(labels_N)), gallery_G), gallery_G


def _ranks(serve: Serve, labels_N: Int64, query_Q: Int64, gallery_G: Int64) -> Int64:
    """(Q,) the place of each query's one right item."""
    served = serve(query_Q, gallery_G)
    by_label_G = np.argsort(labels_N[gallery_G])
    right_Q = by_label_G[np.searchsorted(labels_N[gallery_G], labels_N[query_Q], sorter=by_label_G)]
    return ranks_of(served.queries_QV, served.items_NV, right_Q, query_ids_Q=np.full(len(query_Q), -1),
                    metric=served.metric)


def _figures(ranks_TQ: list[Int64]) -> dict[str, float]:
    percent_TM = 100 * np.array([[*((rank_Q <= k).mean() for k in CUT_OFFS), (1 / rank_Q).mean()]
                                 for rank_Q in ranks_TQ])
    means = dict(zip(METRICS, percent_TM.mean(axis=0).tolist(), strict=True))
    names = (f"{name} std" for name in METRICS)
    return means | dict(zip(names, percent_TM.std(axis=0).tolist(), strict=True))


def _modes(z_ND: Float64, s_ND: Float64 | None, seed: int) -> dict[str, Serve]:
    """How each mode serves a draw. No re-ranking: a gallery of one image a class is searched whole."""
    modes: dict[str, Serve] = {"sample": lambda q, g: sample_vectors(z_ND[q], z_ND[g])}

    def with_weights(suffix: str, weights_ND: Float64) -> None:
        modes["adaptive" + suffix] = lambda q, g: adaptive_vectors(z_ND[q], weights_ND[q], z_ND[g])
        modes["symmetric" + suffix] = lambda q, g: symmetric_vectors(z_ND[q], weights_ND[q], z_ND[g], weights_ND[g])

    if s_ND is not None:
        with_weights("", s_ND)
        with_weights("_s1", np.ones_like(s_ND))
        with_weights("_shuffled", s_ND[np.random.default_rng(seed).permutation(len(s_ND))])
    modes["calibrated"] = lambda q, g: calibrated_vectors(z_ND[q], z_ND[g], local_density(z_ND[g]))
    return modes
