"""A retrieval mode as vectors for any l2 index, exact or approximate, fixed when the index is
built.

Shapes: Q queries, N items, D embedding width, V width of the vectors, C candidates.

`vectors.py` makes vectors of a known set of items, for exact search. An index outlives its items:
they are added and removed. So what vectors depend on, the centre and the limit of the last
coordinate, is fixed once, and the same image has the same vector whatever else is in the index.
All forms are l2: graph indexes fail for the largest inner product of vectors of very different
length. One more coordinate, √(L − ‖x‖²) with L at least all ‖x‖², makes items equally long, and
the nearest by l2 is then the one of the largest inner product (Bachrach et al., "Speeding Up the
Xbox Recommender System Using a Euclidean Transformation for Inner-Product Spaces", 2014).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Float64, Int64
from namr_dist.retrieval.modes import (
    ADAPTIVE,
    CALIBRATED,
    MODES,
    RERANK,
    SAMPLE,
    STRUCTURE,
    SYMMETRIC,
    Mode,
    Side,
)
from namr_dist.retrieval.rerank import check_delta
from namr_dist.retrieval.vectors import GALLERY_DENSITY_WEIGHT

HEAD_ROOM = 2.0
"""The limit of a last coordinate over the largest number seen when the index was built, for items
that are added later."""
_BLOCK_NUMBERS = 2**24


@dataclass(frozen=True, kw_only=True)
class Form:
    """A mode's vectors, and its distance of chosen pairs."""

    mode: Mode
    centre_D: Float64
    """what z is moved by, so that squares stay small: it changes no distance"""
    limit: float
    """what the last coordinate's square is taken from; 0 for a mode without one"""
    delta: float = 0.0
    """δ of the weights s; 0 for a model that has none"""

    @classmethod
    def fitted(
        cls, mode: Mode, blocks: Callable[[], Iterable[Side]], *, delta: float = 0.0
    ) -> Form:
        """The form for an index that begins with these items, given in blocks, which are gone over
        twice; `density` is needed by the calibrated mode, `limit` (γ ρ_max) by the structure mode.
        """
        count, sum_D, limit = 0, np.zeros(()), 0.0
        for items in blocks():
            if not mode.can_serve(items) or (mode is CALIBRATED and items.density is None):
                raise InputError(
                    f"mode {mode.name} needs what this model does not have; take "
                    + " or ".join(other.name for other in MODES if other.can_serve(items))
                )
            if items.s is not None:
                check_delta(items.s, delta)
            count, sum_D = count + len(items.z), sum_D + items.z.sum(axis=0)
        form = cls(mode=mode, centre_D=sum_D / count, limit=0.0, delta=delta)
        for items in blocks():
            if mode is STRUCTURE:
                limit = items.limit
                break
            if mode is CALIBRATED:
                limit = max(limit, HEAD_ROOM * float(form._lessened(items).max()))
            elif mode in (ADAPTIVE, SYMMETRIC):
                limit = max(limit, HEAD_ROOM * float(_squares(form._products(items)).max()))
        return cls(mode=mode, centre_D=form.centre_D, limit=limit, delta=delta)

    @property
    def width(self) -> int:
        """V."""
        D = len(self.centre_D)
        return {STRUCTURE: D + 1, CALIBRATED: D + 1, ADAPTIVE: 2 * D + 1, SYMMETRIC: 4 * D + 2}.get(
            self.mode, D
        )

    @property
    def offset(self) -> float:
        """What squared distances are short of those of the vectors: γ ρ_max, or likewise, in a mode
        that lessens them; with it they are never negative."""
        return self.limit if self.mode in (STRUCTURE, CALIBRATED) else 0.0

    @property
    def weighs(self) -> bool:
        """Whether the distance has weights that the vectors do not know of: what an index finds is
        to be ordered again."""
        return self.mode is RERANK

    def items(self, items: Side) -> Float32:
        """(N, V) vectors to store.

        Raises InputError for an item beyond the limit: vectors of a set that is much unlike the one
        that the index was built with.
        """
        if self.mode in (SAMPLE, RERANK):
            return (items.z - self.centre_D).astype(np.float32)
        if self.mode in (STRUCTURE, CALIBRATED):
            rows_NV, rest_N = items.z - self.centre_D, self.limit - self._lessened(items)
        else:
            rows_NV = self._products(items)
            rest_N = self.limit - _squares(rows_NV)
        if rest_N.min(initial=0.0) < -1e-9 * self.limit:
            raise InputError(
                f"{int((rest_N < 0).sum())} of {len(rest_N)} items lie beyond what the index was built for "
                f"(limit {self.limit:.4g} of mode {self.mode.name}); build it again with all items"
            )
        last_N1 = np.sqrt(np.maximum(rest_N, 0.0))[:, None]
        return np.concatenate([rows_NV, last_N1], axis=1, dtype=np.float32, casting="same_kind")

    def queries(self, queries: Side) -> Float32:
        """(Q, V) vectors to ask for."""
        z, zero_Q1 = queries.z - self.centre_D, np.zeros((len(queries.z), 1))
        if self.mode in (SAMPLE, RERANK):
            parts = [z]
        elif self.mode in (STRUCTURE, CALIBRATED):
            parts = [z, zero_Q1]
        else:
            assert queries.s is not None
            parts = [2 * queries.s * z, -queries.s]
            if self.mode is SYMMETRIC:
                parts += [2 * z, -z * z, zero_Q1 + 1]
            # Any length of a query gives the same order. As long as an item, it keeps sums small.
            rows_QV = np.concatenate(parts, axis=1)
            length_Q1 = np.sqrt(_squares(rows_QV))[:, None]
            scale_Q1 = np.sqrt(self.limit) / np.where(length_Q1 > 0, length_Q1, 1.0)
            parts = [rows_QV * scale_Q1, zero_Q1]
        return np.concatenate(parts, axis=1, dtype=np.float32, casting="same_kind")

    def squared_distances(self, queries: Side, items: Side, ids_QC: Int64) -> Float64:
        """(Q, C) the mode's own squared distances of chosen pairs, in float64 by the definition;
        +inf at −1. They may be negative in modes that lessen them."""
        squared_QC = np.empty(ids_QC.shape)
        rows = max(1, _BLOCK_NUMBERS // (max(1, ids_QC.shape[1]) * items.z.shape[1]))
        for start in range(0, len(ids_QC), rows):
            block = slice(start, start + rows)
            ids_BC = ids_QC[block]
            difference_BCD = items.z[ids_BC] - queries.z[block, None]
            difference_BCD *= difference_BCD
            if not self.mode.uses_s:
                squared_BC = difference_BCD.sum(axis=2)
            else:
                assert queries.s is not None
                squared_BC = np.einsum("bd,bcd->bc", queries.s[block], difference_BCD)
            if self.mode is SYMMETRIC:
                assert items.s is not None
                squared_BC += np.einsum("bcd,bcd->bc", items.s[ids_BC], difference_BCD)
            if self.mode in (STRUCTURE, CALIBRATED):
                squared_BC -= self._lessened(items)[ids_BC]
            squared_QC[block] = np.where(ids_BC < 0, np.inf, squared_BC)
        return squared_QC

    def _lessened(self, items: Side) -> Float64:
        """(N,) what squared distances to each item are lessened by."""
        if self.mode is STRUCTURE:
            assert items.bonus is not None
            return items.bonus
        assert items.density is not None
        return GALLERY_DENSITY_WEIGHT * items.density

    def _products(self, items: Side) -> Float64:
        """Items whose inner product with a query is largest where the distance is smallest, as
        vectors.py derives them."""
        z = items.z - self.centre_D
        parts = [z, z * z]
        if self.mode is SYMMETRIC:
            assert items.s is not None
            s = items.s
            parts += [s * z, s, -(s * z * z).sum(axis=1, keepdims=True)]
        return np.concatenate(parts, axis=1)


def _squares(rows_NV: Float64) -> Float64:
    squares_N: Float64 = np.einsum("nv,nv->n", rows_NV, rows_NV)
    return squares_N


def mode_named(name: str) -> Mode:
    """One of the table. Raises InputError for another name."""
    for mode in MODES:
        if mode.name == name:
            return mode
    raise InputError(f"mode {name!r} is none; take one of {', '.join(mode.name for mode in MODES)}")
