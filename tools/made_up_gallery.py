"""Galleries of embeddings that no network made, for tools that measure indexes.

Shapes: N rows, D width.

Rows of clustered_gaussians.py, cut to D coordinates; centres are random class-like rows, so that
the structure embedding ρ follows how crowded a region is, and weights s follow z as a network's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clustered_gaussians import clustered_gaussians

from namr_dist.gallery.embedding import Embeddings
from namr_dist.gallery.gallery import Gallery, build
from namr_dist.gallery.geometry import Geometry
from namr_dist.gallery.items import Items, Source
from namr_dist.retrieval.search import search

CENTRES, NEAREST = 512, 10


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Items or queries."""

    z_ND: np.ndarray
    s_ND: np.ndarray
    """weights within 1 ± δ, or ρ in one column"""

    def at(self, rows: slice) -> Rows:
        """Some of them."""
        return Rows(z_ND=self.z_ND[rows], s_ND=self.s_ND[rows])


@dataclass(frozen=True, kw_only=True)
class NoNetwork:
    """What `build` asks of a network."""

    geometry: Geometry
    name: str = "made-up"
    digest: str = "0" * 64
    place: Path = Path("made-up")


def rows_of(*, width: int, seed: int, delta: float | None) -> Rows:
    """Rows `width` ≤ 512 wide; with weights within 1 ± δ, or, where δ is None, with ρ."""
    train, test = clustered_gaussians(seed=seed)
    z_ND = np.ascontiguousarray(test.z_ND[:, :width])
    rng = np.random.default_rng(seed)
    if delta is None:
        centres_MD = train.z_ND[rng.permutation(len(train.z_ND))[:CENTRES], :width]
        squared_NK, _ = search(z_ND, centres_MD, NEAREST)
        return Rows(z_ND=z_ND, s_ND=squared_NK.mean(axis=1, keepdims=True))
    mixing_DD = rng.standard_normal((width, width), dtype=np.float32) / np.float32(width**0.5)
    mixed_ND = z_ND @ mixing_DD
    s_ND = 1 + np.float32(delta) * np.tanh(2 * mixed_ND / mixed_ND.std())
    return Rows(z_ND=z_ND, s_ND=s_ND.astype(np.float32))


def geometry_of(rows: Rows, *, delta: float, gamma: float = 0.5) -> Geometry:
    """Euclidean, with what the rows have."""
    width = rows.z_ND.shape[1]
    if rows.s_ND.shape[1] > 1:
        return Geometry(distance="euclidean", width=width, delta=delta)
    return Geometry(
        distance="euclidean", width=width, delta=delta, gamma=gamma, rho_max=float(rows.s_ND.max())
    )


def gallery_of(rows: Rows, geometry: Geometry, *, type: str, mode: str) -> Gallery:
    """As `namr index build` makes it."""
    count = len(rows.z_ND)
    made = Embeddings(z_ND=rows.z_ND, s_NS=rows.s_ND, kept_N=np.arange(count))
    items = Items(
        ids=tuple(f"{number:06d}" for number in range(count)),
        labels=(None,) * count,
        source_N=np.zeros(count, dtype=np.int64),
        sources=(Source(kind="memory"),),
    )
    return build(NoNetwork(geometry=geometry), made, items, type=type, mode=mode)
