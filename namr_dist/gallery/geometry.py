"""How a network's embeddings are compared: what of it an index keeps.

Shapes: N rows, D width of z, S of s, E of what is kept of s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Float64
from namr_dist.retrieval.forms import mode_named
from namr_dist.retrieval.modes import MODES, SAMPLE, STRUCTURE, Distance, Mode, Side


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Of a structure embedding from cluster centres ρ alone is kept (E = 1), of one of weights all
    (E = D)."""

    distance: Distance
    width: int
    """D"""
    delta: float
    """δ: the weights lie within 1 ± δ"""
    gamma: float | None = None
    """γ; None for weights"""
    rho_max: float | None = None
    """what ρ is clamped to; None for weights"""

    @property
    def has_centres(self) -> bool:
        """Whether the structure embedding is made from cluster centres."""
        return self.gamma is not None

    @property
    def kept_width(self) -> int:
        """E."""
        return 1 if self.has_centres else self.width

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What can be searched by; the first is what an index has unless asked for another."""
        fitted = self.has_centres and bool(self.rho_max)
        first = STRUCTURE if fitted else SAMPLE
        served = (
            mode
            for mode in MODES
            if not (mode.uses_centres and not fitted) and not (mode.uses_s and self.has_centres)
        )
        return (first, *(mode for mode in served if mode is not first))

    def served(self, name: str | None) -> Mode:
        """The mode of this name, or the first. Raises InputError if it does not serve."""
        modes = self.modes
        chosen = modes[0] if name is None else mode_named(name)
        if chosen not in modes:
            raise InputError(
                f"mode {chosen.name} is not served by this model; take one of "
                + ", ".join(mode.name for mode in modes)
            )
        return chosen

    def kept(self, s_NS: Float32) -> Float32:
        """(N, E) of the structure embeddings."""
        return s_NS[:, -self.kept_width :]

    def side(self, z_ND: Any, kept_NE: Any, *, density_N: Float64 | None = None, name: str) -> Side:
        """Queries or items as retrieval takes them. Raises InputError, naming them, for values that
        are not finite."""
        if not self.has_centres:
            side = Side.of(z_ND, s_ND=kept_NE, distance=self.distance, name=name, whole=False)
            return replace(side, density=density_N)
        assert self.gamma is not None and self.rho_max is not None
        rho_N = np.asarray(kept_NE, dtype=np.float64)[:, 0]
        bonus_N = self.gamma * np.minimum(rho_N, self.rho_max)
        side = Side.of(z_ND, bonus_N=bonus_N, distance=self.distance, name=name, whole=False)
        return replace(side, density=density_N, limit=self.gamma * self.rho_max)
