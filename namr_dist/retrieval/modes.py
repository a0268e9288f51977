"""The retrieval modes: the one list that evaluation, re-identification, reports and tables read.

Shapes: N rows (queries or items), D embedding width.

A mode that uses the structure embedding s is measured beside its controls, the same mode with
another s. They ask whether the learnt s carries anything that retrieval can use; the mode is only
worth its cost where it beats them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Float64, Int64, as_matrix, unit_rows
from namr_dist.retrieval.vectors import (
    Served,
    adaptive_vectors,
    as_bonus,
    as_weights,
    calibrated_vectors,
    sample_vectors,
    structure_vectors,
    symmetric_vectors,
)

Distance = Literal["euclidean", "cosine"]

# Between these, squares of z and of differences a million times smaller are normal numbers of fp32,
# and below the limit on what is searched.
_SPREADS = (2.0**-40, 2.0**20)

CONTROLS = {"s1": "with s = 1 everywhere", "shuffled": "shuffled between images"}
"""Name of a control → what it changes."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is known of the queries, or of the items that they search; all float64."""

    z: Float64
    """(N, D) sample embeddings"""
    s: Float64 | None = None
    """(N, D) positive weights; None where a model has no structure head, and for a mode that does
    without them"""
    bonus: Float64 | None = None
    """(N,) γ ρ of the items, by which the structure mode lessens their squared distances; None for
    a model without centres, and for a mode that does without them"""
    limit: float = 0.0
    """γ ρ_max, at least every `bonus`"""
    density: Float64 | None = None
    """(N,) of the items, their `local_density`; None for queries, and for a mode that does not look
    at the gallery"""

    @classmethod
    def of(
        cls,
        z_ND: Any,
        *,
        s_ND: Any = None,
        bonus_N: Any = None,
        distance: Distance,
        name: str,
        whole: bool = True,
    ) -> Side:
        """All images, checked; by "cosine", rows of z are scaled to length 1. `name` is for
        errors. Raises InputError on bad shapes, values that are not finite, s ≤ 0, γ ρ < 0.

        Where squared differences of z would leave the range of fp32, z is multiplied by a power of
        two, and γ ρ by its square: no order changes. Not `whole`: these are some of several sides
        that are compared, of which none may be multiplied by a power of its own.
        """
        if distance not in ("euclidean", "cosine"):
            raise InputError(f"distance = {distance!r}: take 'euclidean' or 'cosine'")
        z = as_matrix(z_ND, f"{name} z")
        bonus = None if bonus_N is None else as_bonus(bonus_N, len(z), f"{name} γ ρ")
        if distance == "cosine":
            z = unit_rows(_times_power(z, _power(z)))
        power = _power(z) if whole else 0
        z = _times_power(z, power)
        bonus = None if bonus is None else _times_power(bonus, 2 * power)
        return cls(
            z=z,
            s=None if s_ND is None else as_weights(s_ND, z, f"{name} s"),
            bonus=bonus,
            limit=0.0 if bonus is None else float(bonus.max()),
        )

    def shuffled(self, order_N: Int64) -> Side:
        """With its structure embeddings in another order."""
        return replace(
            self,
            s=None if self.s is None else self.s[order_N],
            bonus=None if self.bonus is None else self.bonus[order_N],
        )

    def with_ones(self) -> Side:
        """With s = 1, where it has an s."""
        return self if self.s is None else replace(self, s=np.ones_like(self.s))

    def at(self, rows: Int64) -> Side:
        """The rows at ascending indices; itself where these are all, so that queries and items
        share one."""
        if len(rows) == len(self.z):
            return self
        return Side(
            z=self.z[rows],
            s=None if self.s is None else self.s[rows],
            bonus=None if self.bonus is None else self.bonus[rows],
            limit=self.limit,
            density=None if self.density is None else self.density[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to search: a distance from a query to an item, served by an ordinary index."""

    name: str
    """what its figures are called in metrics.json and in tables"""
    sentence: str
    """the distance in words, for the report"""
    vectors: Callable[[Side, Side], Served] | None
    """queries, items → their vectors; None for RERANK alone, which re-orders what the plain search
    finds"""
    uses_s: bool = False
    """Whether the vectors depend on the weights s. Else they are given none."""
    uses_centres: bool = False
    """Whether they depend on γ ρ. Else they are given none."""
    looks_at_gallery: bool = False
    """Whether the distance depends on items other than the two compared: marked so wherever its
    figures stand. Else the vectors are not given the items' density."""

    @property
    def controls(self) -> tuple[str, ...]:
        """Names in CONTROLS; none for a mode that uses no structure embedding. Re-ranking with
        s = 1, and γ = 0, is the plain order, which the sample mode has already."""
        if self.uses_s and self.vectors is not None:
            return tuple(CONTROLS)
        return ("shuffled",) if self.uses_s or self.uses_centres else ()

    def can_serve(self, side: Side) -> bool:
        """Whether the model has what the mode uses."""
        return (side.s is not None or not self.uses_s) and (
            side.bonus is not None or not self.uses_centres
        )

    def serve(self, queries: Side, items: Side) -> Served:
        """The vectors for these queries and items, made from what the mode says it uses and rounded
        to fp32.

        Raises InputError if they are no `Served`, not a row for each query and item, of two widths,
        or not finite.
        """
        assert self.vectors is not None, f"{self.name} has no vectors of its own"
        served: Any = self.vectors(self._given(queries), self._given(items))
        if not isinstance(served, Served):
            raise InputError(
                f"mode {self.name} makes vectors as {type(served).__name__}; return them as a Served "
                "(namr_dist.retrieval.vectors)"
            )
        return _checked(served, len(queries.z), len(items.z), f"mode {self.name}")

    def _given(self, side: Side) -> Side:
        return replace(
            side,
            s=side.s if self.uses_s else None,
            bonus=side.bonus if self.uses_centres else None,
            density=side.density if self.looks_at_gallery else None,
        )


def _power(z_ND: Float64) -> int:
    """The power of two that brings differences of z to where fp32 holds their squares; 0 where it
    does."""
    spread = float((z_ND.max(axis=0) - z_ND.min(axis=0)).max() or np.abs(z_ND).max())
    usual = spread == 0 or _SPREADS[0] <= spread <= _SPREADS[1]
    return 0 if usual else -int(np.frexp(spread)[1])


def _times_power(values: Float64, power: int) -> Float64:
    scaled: Float64 = np.ldexp(values, power) if power else values
    return scaled


def _checked(served: Served, queries: int, items: int, name: str) -> Served:
    queries_QV = _finite(served.queries_QV, queries, f"{name}, vectors of queries")
    items_NV = _finite(served.items_NV, items, f"{name}, vectors of items")
    if queries_QV.shape[1] != items_NV.shape[1]:
        raise InputError(
            f"{name} makes vectors of queries {queries_QV.shape[1]} wide and of items "
            f"{items_NV.shape[1]} wide; make them equally wide"
        )
    if served.metric not in ("l2", "ip"):
        raise InputError(f"{name} asks for the metric {served.metric!r}; take 'l2' or 'ip'")
    return replace(served, queries_QV=queries_QV, items_NV=items_NV)


def _finite(vectors: npt.ArrayLike, rows: int, name: str) -> Float32:
    """(rows, V) fp32; itself if it is that already."""
    with np.errstate(over="ignore"):
        matrix: Float32 = np.asarray(vectors, dtype=np.float32)
    if matrix.ndim != 2 or len(matrix) != rows or not matrix.shape[1]:
        raise InputError(
            f"{name}: shape {matrix.shape} where ({rows}, width) is needed, one row for each"
        )
    # By rows' extremes, which NaN passes through: no second matrix is made.
    with np.errstate(invalid="ignore"):
        bad_N = ~(np.isfinite(matrix.max(axis=1)) & np.isfinite(matrix.min(axis=1)))
    if bad_N.any():
        raise InputError(
            f"{name}: row {int(bad_N.argmax())} holds NaN or infinity ({int(bad_N.sum())} such rows of "
            f"{rows}); look at how the mode computes it"
        )
    return matrix


def _calibrated(queries: Side, items: Side) -> Served:
    assert items.density is not None
    return calibrated_vectors(queries.z, items.z, items.density)


def _structure(queries: Side, items: Side) -> Served:
    assert items.bonus is not None
    return structure_vectors(queries.z, items.z, items.bonus, limit=items.limit)


SAMPLE = Mode(
    name="sample",
    sentence="plain distance between sample embeddings",
    vectors=lambda queries, items: sample_vectors(queries.z, items.z),
)
STRUCTURE = Mode(
    name="structure",
    sentence="plain distance, less γ times how far an item lies from the nearest cluster centres",
    uses_centres=True,
    vectors=_structure,
)
RERANK = Mode(
    name="rerank",
    sentence="the nearest by plain distance, re-ordered with the query’s structure weights",
    vectors=None,
    uses_s=True,
)
ADAPTIVE = Mode(
    name="adaptive",
    sentence="distance with the query’s structure weights, over everything",
    uses_s=True,
    vectors=lambda queries, items: adaptive_vectors(queries.z, queries.s, items.z),
)
SYMMETRIC = Mode(
    name="symmetric",
    sentence="distance with the structure weights of both images",
    uses_s=True,
    vectors=lambda queries, items: symmetric_vectors(queries.z, queries.s, items.z, items.s),
)
CALIBRATED = Mode(
    name="calibrated",
    sentence="plain distance, corrected for how crowded an item’s surroundings are",
    vectors=_calibrated,
    looks_at_gallery=True,
)

MODES = (SAMPLE, STRUCTURE, RERANK, ADAPTIVE, SYMMETRIC, CALIBRATED)
"""In the order of tables."""


def row_name(mode: str, control: str = "") -> str:
    """What the figures of the mode of this name, or of one of its controls, are called."""
    return f"{mode}_{control}" if control else mode


def row_names(modes: Sequence[Mode]) -> list[str]:
    """What all their figures are called: first the modes', then those of their controls."""
    return [mode.name for mode in modes] + [
        row_name(mode.name, control) for mode in modes for control in mode.controls
    ]


def with_own(modes: Sequence[Mode]) -> tuple[Mode, ...]:
    """MODES, and behind them modes of a user's own.

    Raises InputError for what is no Mode or has no vectors, and for a name that is taken by another
    or its controls.
    """
    every = list(MODES)
    for mode in modes:
        if not isinstance(mode, Mode):
            raise InputError(
                f"{repr(mode):.80} is no retrieval mode; make it a Mode (namr_dist.retrieval.modes)"
            )
        if not isinstance(mode.name, str) or not mode.name.strip() or not mode.name.isprintable():
            raise InputError(
                f"a mode of your own is called {mode.name!r}; give it a name of printable letters"
            )
        if not callable(mode.vectors):
            raise InputError(
                f"mode {mode.name} has no vectors; give it a function of two Sides that returns a Served"
            )
        taken = {row_name(other.name, control) for other in every for control in ("", *CONTROLS)}
        if clash := sorted(taken & {row_name(mode.name, control) for control in ("", *CONTROLS)}):
            raise InputError(
                f"mode {mode.name} would have its figures called {clash[0]}, as another's are; give it "
                "another name"
            )
        every.append(mode)
    return tuple(every)
