"""Distances of the retrieval modes as plain vectors: what to ask an ordinary index, and what to
store in it.

Shapes: Q queries, N items, D embedding width, V width of the served vectors.
z sample embedding, s structure embedding (positive weights), rho local density.

Each function returns a :class:`Served`: query vectors, item vectors and the metric ("l2" or inner
product) under which an unmodified exact index returns the order of the mode's own distance.
Formulas: docs/algorithm.md, "Retrieval". z is centred over the items first: no difference z_q − z_j
changes, while the squares that the expanded forms subtract from each other get smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Float64, as_matrix, unit_rows
from namr_dist.retrieval.over_ranks import Searcher
from namr_dist.retrieval.search import Metric

DENSITY_NEIGHBOURS = 10
GALLERY_DENSITY_WEIGHT = 0.5
_UNIT_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Served:
    """Vectors for an ordinary index, and how its values become the mode's squared distances."""

    queries_QV: Float32
    items_NV: Float32
    metric: Metric
    offset_Q: Float64
    scale: float

    def squared_distances(self, values_QK: Float32) -> Float64:
        """(Q, K) float64 squared distances of the mode from the (Q, K) values of a search.

        Where the metric is "ip" they come from a difference of larger numbers: good to about 1e-6
        of those, so that a duplicate's distance is nearly, not exactly, 0.
        """
        return self.offset_Q[:, None] + self.scale * values_QK.astype(np.float64)


def _served(
    queries_QV: list[Float64],
    items_NV: list[Float64],
    metric: Metric,
    offset_Q: Float64,
    scale: float,
) -> Served:
    return Served(
        queries_QV=np.concatenate(queries_QV, axis=1, dtype=np.float32, casting="same_kind"),
        items_NV=np.concatenate(items_NV, axis=1, dtype=np.float32, casting="same_kind"),
        metric=metric,
        offset_Q=offset_Q,
        scale=scale,
    )


def centred(z_QD: Any, z_ND: Any) -> tuple[Float64, Float64]:
    """Both minus the items' mean, in float64; InputError where the widths differ."""
    queries, items = as_matrix(z_QD, "query z"), as_matrix(z_ND, "item z")
    if queries.shape[1] != items.shape[1]:
        raise InputError(
            f"query z is {queries.shape[1]} wide, item z {items.shape[1]}: embed both with the same model"
        )
    centre_D = items.mean(axis=0)
    moved = items - centre_D
    return (moved if queries is items else queries - centre_D), moved


def as_weights(s_ND: Any, z_ND: Float64, name: str) -> Float64:
    """Structure embedding as float64; InputError unless it has z's shape and is positive."""
    s = as_matrix(s_ND, name)
    if s.shape != z_ND.shape:
        raise InputError(f"{name}: shape {s.shape} does not fit z of shape {z_ND.shape}")
    if s.min() <= 0:
        raise InputError(f"{name}: the weights must be positive, yet the smallest is {s.min():.4g}")
    return s


def as_bonus(bonus_N: Any, items: int, name: str) -> Float64:
    """γ ρ as float64; InputError unless it is one number for each item, finite and at least 0."""
    bonus = as_matrix(np.asarray(bonus_N).reshape(-1, 1), name)[:, 0]
    if np.ndim(bonus_N) != 1 or len(bonus) != items:
        raise InputError(
            f"{name}: {items} numbers are needed, one for each item, got shape {np.shape(bonus_N)}"
        )
    if bonus.min(initial=0) < 0:
        raise InputError(f"{name}: {bonus.min():.4g} is negative; a mean squared distance is not")
    return bonus


def sample_vectors(z_QD: Any, z_ND: Any, *, cosine: bool = False) -> Served:
    """‖z_q − z_j‖ as it stands: D wide, l2. With `cosine`, rows are scaled to length 1 first, so
    that the squared distance is 2 − 2 cos."""
    if cosine:
        z_QD, z_ND = unit_rows(as_matrix(z_QD, "query z")), unit_rows(as_matrix(z_ND, "item z"))
    queries, items = centred(z_QD, z_ND)
    return _served([queries], [items], "l2", np.zeros(len(queries)), 1.0)


def adaptive_vectors(z_QD: Any, s_QD: Any, z_ND: Any) -> Served:
    """Σ_k s_qk (z_qk − z_jk)², the query's weights: inner product, 2D wide, exact.

    Query [2 s∘z ; −s], item [z ; z∘z]; the squared distance is Σ s_q z_q² − value.
    """
    zq, z = centred(z_QD, z_ND)
    sq = as_weights(s_QD, zq, "query s")
    return _served([2 * sq * zq, -sq], [z, z * z], "ip", (sq * zq * zq).sum(1), -1.0)


def symmetric_vectors(z_QD: Any, s_QD: Any, z_ND: Any, s_ND: Any) -> Served:
    """Σ_k (s_qk + s_jk)(z_qk − z_jk)², both sides' weights: inner product, 4D + 1 wide, exact.

    Query [2 s∘z ; −s ; 2z ; −z∘z ; 1], item [z ; z∘z ; s∘z ; s ; −Σ s z²]; the squared distance is
    Σ s_q z_q² − value.
    """
    zq, z = centred(z_QD, z_ND)
    sq, s = as_weights(s_QD, zq, "query s"), as_weights(s_ND, z, "item s")
    queries = [2 * sq * zq, -sq, 2 * zq, -zq * zq, np.ones((len(zq), 1))]
    items = [z, z * z, s * z, s, -(s * z * z).sum(1, keepdims=True)]
    return _served(queries, items, "ip", (sq * zq * zq).sum(1), -1.0)


def structure_vectors(z_QD: Any, z_ND: Any, bonus_N: Float64, *, limit: float) -> Served:
    """‖z_q − z_j‖² − γ ρ_j: one more coordinate, l2, D + 1 wide, exact; graph indexes serve it.

    bonus_N: γ ρ_j, what an item's squared distances are lessened by.  limit: γ ρ_max, at least all
    of them: the same for all items of an index, whenever they are added. Query [z ; 0], item
    [z ; √(γ (ρ_max − ρ_j))]; the squared distance is value − γ ρ_max, and may be negative.
    """
    zq, z = centred(z_QD, z_ND)
    bonus = as_bonus(bonus_N, len(z), "item γ ρ")
    if bonus.max(initial=0) > limit:
        raise InputError(
            f"item γ ρ: {bonus.max():.6g} is above the limit, {limit:.6g}; clamp it, or raise the limit"
        )
    last_N1 = np.sqrt(limit - bonus)[:, None]
    return _served([zq, np.zeros((len(zq), 1))], [z, last_N1], "l2", np.full(len(zq), -limit), 1.0)


def structure_products(z_QD: Any, z_ND: Any, bonus_N: Float64) -> Served:
    """The same order by inner product, for an index that has nothing else: rows of z of length 1,
    D + 1 wide.

    Query [z ; 1], item [z ; ½ γ ρ_j]; the squared distance is 2 − 2 value. Raises InputError for
    rows of another length.
    """
    zq, z = as_matrix(z_QD, "query z"), as_matrix(z_ND, "item z")
    for name, rows in (("query z", zq), ("item z", z)):
        lengths_N = np.linalg.norm(rows, axis=1)
        if np.abs(lengths_N - 1).max() > _UNIT_TOLERANCE:
            raise InputError(
                f"{name}: a row has length {lengths_N[np.abs(lengths_N - 1).argmax()]:.4g}; scale all to 1, "
                "or take structure_vectors"
            )
    last_N1 = 0.5 * as_bonus(bonus_N, len(z), "item γ ρ")[:, None]
    return _served([zq, np.ones((len(zq), 1))], [z, last_N1], "ip", np.full(len(zq), 2.0), -2.0)


def local_density(
    z_ND: Any, *, neighbours: int = DENSITY_NEIGHBOURS, searcher: Searcher | None = None
) -> Float64:
    """rho (N,): mean squared distance of each item to its nearest other items.

    No labels and no learning, yet it looks at the whole gallery; computed once when the index is
    built. With N ≤ neighbours, the mean is over the N − 1 others (0 for a single item). searcher:
    on all ranks; None: this process alone.
    """
    z = centred(z_ND, z_ND)[1]
    count = min(neighbours, len(z) - 1)
    if count < 1:
        return np.zeros(len(z))
    nearest_NK, _ = (searcher or Searcher()).nearest(z, z, count)
    return mean_of_nearest(nearest_NK, neighbours=neighbours)


def mean_of_nearest(nearest_NK: Float32, *, neighbours: int = DENSITY_NEIGHBOURS) -> Float64:
    """:func:`local_density` from (N, K) squared distances of other items that a search has found,
    nearest first: all others, or `neighbours` and more."""
    density_N: Float64 = nearest_NK[:, :neighbours].astype(np.float64).mean(axis=1)
    return density_N


def calibrated_vectors(
    z_QD: Any, z_ND: Any, rho_N: Float64, *, weight: float = GALLERY_DENSITY_WEIGHT
) -> Served:
    """‖z_q − z_j‖² − weight·ρ_j: inner product, D + 1 wide, exact.

    rho_N: :func:`local_density` of the items (weight ½), or any other (N,) density. Query [z ; −1],
    item [z ; ½‖z‖² − ½ weight ρ]; the squared distance is ‖z_q‖² − 2 value, and may be negative.
    """
    zq, z = centred(z_QD, z_ND)
    if rho_N.shape != (len(z),):
        raise InputError(
            f"rho: {len(z)} densities are needed, one for each item, got shape {rho_N.shape}"
        )
    last_N1 = 0.5 * ((z * z).sum(1) - weight * rho_N)[:, None]
    return _served([zq, -np.ones((len(zq), 1))], [z, last_N1], "ip", (zq * zq).sum(1), -2.0)
