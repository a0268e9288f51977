"""Galleries of embeddings drawn at random, in clusters, and each mode's distance by its
definition.

Shapes: Q queries, N items, D width, K neighbours.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from namr_dist.gallery.embedding import Embeddings
from namr_dist.gallery.gallery import Gallery, build
from namr_dist.gallery.geometry import Geometry
from namr_dist.gallery.items import Items, Source

WIDTH, DELTA, GAMMA, RHO_MAX = 12, 0.4, 0.6, 3.0
WEIGHTS = Geometry(distance="euclidean", width=WIDTH, delta=DELTA)
CENTRES = Geometry(distance="cosine", width=WIDTH, delta=DELTA, gamma=GAMMA, rho_max=RHO_MAX)
MODES = {"structure": CENTRES} | dict.fromkeys(
    ("sample", "rerank", "adaptive", "symmetric", "calibrated"), WEIGHTS
)


def rows(count: int, geometry: Geometry, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """z (N, D) and what is kept of s (N, E), fp32, far from the origin."""
    rng = np.random.default_rng(seed)
    means_CD = np.random.default_rng(0).standard_normal((20, WIDTH))
    z_ND = 3 + means_CD[rng.integers(20, size=count)] + 0.4 * rng.standard_normal((count, WIDTH))
    if geometry.has_centres:
        # Some beyond what ρ is clamped to.
        s_NE = rng.uniform(0, 1.2 * RHO_MAX, (count, 1))
    else:
        s_NE = rng.uniform(1 - DELTA, 1 + DELTA, (count, WIDTH))
    return z_ND.astype(np.float32), s_NE.astype(np.float32)


def embeddings(z_ND: np.ndarray, s_NE: np.ndarray) -> Embeddings:
    return Embeddings(z_ND=z_ND, s_NS=s_NE, kept_N=np.arange(len(z_ND)))


def items(count: int, *, first: int = 0, source: Source | None = None) -> Items:
    return Items(
        ids=tuple(f"{number:05d}.jpg" for number in range(first, first + count)),
        labels=tuple(f"label {number % 7}" for number in range(count)),
        source_N=np.zeros(count, dtype=np.int64),
        sources=(source or Source(kind="memory"),),
    )


def gallery_of(
    z_ND: np.ndarray,
    s_NE: np.ndarray,
    geometry: Geometry,
    *,
    mode: str | None = None,
    type: str = "flat",
    source: Source | None = None,
) -> Gallery:
    """As `namr index build` makes it, of a network that is asked for its geometry alone."""
    network: Any = SimpleNamespace(
        geometry=geometry, name="made-up", digest="0" * 64, place=Path("made-up")
    )
    return build(
        network, embeddings(z_ND, s_NE), items(len(z_ND), source=source), mode=mode, type=type
    )


def densities(z_ND: np.ndarray, among_ND: np.ndarray) -> np.ndarray:
    """(N,) mean squared distance to the ten nearest others; rows of z are the last of `among`."""
    squared_NN = ((z_ND[:, None] - among_ND[None]) ** 2).sum(2)
    first = len(among_ND) - len(z_ND)
    squared_NN[np.arange(len(z_ND)), first + np.arange(len(z_ND))] = np.inf
    return np.sort(squared_NN, axis=1)[:, :10].mean(1)


def defined(
    mode: str,
    queries: tuple[np.ndarray, np.ndarray],
    stored: tuple[np.ndarray, np.ndarray],
    *,
    density_N: np.ndarray | None = None,
) -> np.ndarray:
    """(Q, N) squared distances of a mode, float64, from its formula."""
    (zq, sq), (z, s) = ([one.astype(np.float64) for one in side] for side in (queries, stored))
    if MODES[mode].distance == "cosine":
        zq, z = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (zq, z))
    squared_QND = (zq[:, None] - z[None]) ** 2
    plain_QN = squared_QND.sum(2)
    if mode == "sample":
        return plain_QN
    if mode == "structure":
        return plain_QN - GAMMA * np.minimum(s[:, 0], RHO_MAX)
    if mode == "calibrated":
        return plain_QN - 0.5 * (densities(z, z) if density_N is None else density_N)
    weighed_QN = (sq[:, None] * squared_QND).sum(2)
    return weighed_QN + (s[None] * squared_QND).sum(2) if mode == "symmetric" else weighed_QN


def nearest(squared_QN: np.ndarray, k: int) -> np.ndarray:
    """(Q, K) positions by (distance in fp32, position), as all searches here order."""
    return np.argsort(squared_QN.astype(np.float32), axis=1, kind="stable")[:, :k]


def reranked(
    queries: tuple[np.ndarray, np.ndarray],
    stored: tuple[np.ndarray, np.ndarray],
    k: int,
    candidates: int,
) -> np.ndarray:
    """(Q, K) of the rerank mode: the nearest by plain distance, in order of the weighed one."""
    weighed_QN = defined("rerank", queries, stored)
    beyond_QN = np.ones(weighed_QN.shape, dtype=bool)
    np.put_along_axis(
        beyond_QN, nearest(defined("sample", queries, stored), candidates), False, axis=1
    )
    return nearest(np.where(beyond_QN, np.inf, weighed_QN), k)
