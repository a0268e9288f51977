"""Two-stage retrieval: candidates by plain distance, their order by the adaptive distance.

Shapes: Q queries, N items, D width, C candidates, K neighbours returned.

The certificate (docs/algorithm.md, "Retrieval"): every weight is at least 1 − δ, so an item that is
no candidate has D² ≥ (1 − δ) d² ≥ (1 − δ) d²_C. Once that exceeds the K-th best re-scored D², the
first K are those of the whole gallery, although only C items were re-scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Bool, Float32, Float64, Int64
from namr_dist.retrieval.search import search_excluding_self
from namr_dist.retrieval.vectors import as_weights, centred, sample_vectors

# Both sides of the certificate are fp32 numbers, and s may have been rounded onto its bound.
_SAFETY = 1e-6
_BLOCK_NUMBERS = 2**24


@dataclass(frozen=True, kw_only=True)
class Reranked:
    """The re-ordered neighbours."""

    ids_QK: Int64
    """item indices, nearest first by (adaptive distance, index); −1 where items run out"""
    squared_QK: Float32
    """their squared adaptive distances; +inf beside −1"""
    certified_Q: Bool
    """True where the K neighbours provably are those of the whole gallery, in that order"""

    @property
    def certified_percent(self) -> float:
        """Queries that are certified, out of a hundred."""
        return 100 * float(self.certified_Q.mean())


def check_delta(s_ND: Float64, delta: float) -> None:
    """Raises InputError unless 0 ≤ δ < 1 and all weights lie in [1 − δ, 1 + δ]."""
    if not 0 <= delta < 1:
        raise InputError(f"delta = {delta}: take the model's δ, at least 0 and below 1")
    if s_ND.min() < 1 - delta - _SAFETY or s_ND.max() > 1 + delta + _SAFETY:
        raise InputError(
            f"s lies in [{s_ND.min():.4f}, {s_ND.max():.4f}], outside 1 ± {delta}: pass the δ that the "
            "model was trained with"
        )


def squared_adaptive(zq_QD: Float64, sq_QD: Float64, z_ND: Float64, ids_QC: Int64) -> Float32:
    """(Q, C) fp32: Σ_k s_qk (z_qk − z_jk)² of chosen pairs, summed in float64. 128 MiB at a
    time."""
    squared_QC = np.empty(ids_QC.shape, dtype=np.float32)
    rows = max(1, _BLOCK_NUMBERS // (ids_QC.shape[1] * z_ND.shape[1]))
    for start in range(0, len(zq_QD), rows):
        block = slice(start, start + rows)
        difference_BCD = z_ND[ids_QC[block]] - zq_QD[block, None]
        squared_QC[block] = np.einsum(
            "bd,bcd,bcd->bc", sq_QD[block], difference_BCD, difference_BCD
        )
    return squared_QC


def rerank(
    z_QD: Any,
    s_QD: Any,
    z_ND: Any,
    *,
    k: int,
    delta: float,
    candidates: int = 100,
    query_ids_Q: Int64 | None = None,
) -> Reranked:
    """The K nearest of the C candidates that plain distance finds, by adaptive distance.

    z_QD, s_QD: queries; z_ND: items; any float type. delta: δ of the structure head. candidates: C,
    at least K. query_ids_Q as in search_excluding_self.
    Raises InputError where C < K or s leaves 1 ± δ.
    """
    if candidates < k:
        raise InputError(f"candidates = {candidates}, k = {k}: at least k candidates are needed")
    served = sample_vectors(z_QD, z_ND)
    nearest_QC, ids_QC = search_excluding_self(
        served.queries_QV,
        served.items_NV,
        candidates,
        query_ids_Q=query_ids_Q,
        metric=served.metric,
    )
    return rerank_candidates(z_QD, s_QD, z_ND, nearest_QC, ids_QC, k=k, delta=delta)


def rerank_candidates(
    z_QD: Any, s_QD: Any, z_ND: Any, nearest_QC: Float32, ids_QC: Int64, *, k: int, delta: float
) -> Reranked:
    """As :func:`rerank` for candidates found before.

    ids_QC, nearest_QC: (Q, C) item indices and squared distances, nearest first, complete (no
    nearer item is missing) and without the query itself; −1 and +inf where items run out.
    """
    zq, z = centred(z_QD, z_ND)
    sq = as_weights(s_QD, zq, "query s")
    check_delta(sq, delta)
    squared_QC = squared_adaptive(zq, sq, z, ids_QC)
    squared_QC[ids_QC < 0] = np.inf
    order_QC = np.lexsort((ids_QC, squared_QC), axis=-1)[:, :k]
    squared_QK = np.take_along_axis(squared_QC, order_QC, 1)
    # The candidates' distances are those of vectors rounded to fp32: for near-duplicates that shift
    # exceeds any relative margin. Strictly greater, because an outsider at the very same distance
    # might have the lower index.
    shift_Q = 2.0**-23 * (np.linalg.norm(zq, axis=1) + np.linalg.norm(z, axis=1).max())
    outside_Q = np.maximum(np.sqrt(nearest_QC[:, -1].astype(np.float64)) - shift_Q, 0)
    reached_Q = squared_QK[:, -1].astype(np.float64) * (1 + _SAFETY)
    certified_Q = ((1 - delta - _SAFETY) * outside_Q**2 > reached_Q) | (ids_QC[:, -1] < 0)
    if ids_QC.shape[1] >= len(z):
        certified_Q[:] = True
    return Reranked(
        ids_QK=np.take_along_axis(ids_QC, order_QC, 1),
        squared_QK=squared_QK,
        certified_Q=certified_Q,
    )
