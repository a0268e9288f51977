"""Centres from embeddings of training images, or learnt with them, and γ from classes that may
choose it.

Shapes: N training rows, V rows that choose, M centres, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import rank_number
from namr_dist.retrieval.evaluate import evaluate_structure
from namr_dist.structure.centres import HEAD_ROOM, Centres

GAMMAS = (0.0, 0.15, 0.25, 0.4, 0.5, 0.75, 1.0)
"""From which γ is chosen; 0 is the plain search, so a choice is never worse where it is made."""
DEFAULT_GAMMA = 0.4
_CHOOSES = "MAP@R"
_EVERY = 10
_FEWEST_HELD_OUT = 5
"""classes"""
_MOST_HELD_OUT = 20_000
"""rows: their search takes seconds"""
_BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Embeddings z (N, D) with their classes, and their roles where a split has any."""

    z_ND: np.ndarray
    label_N: np.ndarray
    role_N: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What became of a fit."""

    centres: int
    learnt: bool
    """with the embeddings, and not placed by k-means in those of the training images"""
    nearest: int
    gamma: float
    chosen_on: str
    """in words, for the protocol"""
    figures: dict[float, dict[str, float]]
    """γ → figures on the classes that chose, in percent; empty where none did"""

    @property
    def record(self) -> dict[str, Any]:
        """For the trained network's metadata."""
        return {
            "centres": self.centres,
            "learnt": self.learnt,
            "nearest": self.nearest,
            "gamma": self.gamma,
            "chosen on": self.chosen_on,
            "figures": {f"{gamma:g}": figures for gamma, figures in self.figures.items()},
        }

    @property
    def gain(self) -> str:
        """What the choice is worth where it was made, as a line for people."""
        head = f"{self.centres} {'learnt ' * self.learnt}centres, k = {self.nearest}, γ = {self.gamma:g}"
        if not self.figures:
            return f"{head} ({self.chosen_on})"
        plain, best = (self.figures[gamma][_CHOOSES] for gamma in (0.0, self.gamma))
        return f"{head}, chosen on {self.chosen_on}: {_CHOOSES} {plain:.1f} → {best:.1f}"


def fit_structure(
    centres: Centres,
    training: Embedded,
    validation: Embedded | None,
    *,
    gamma: float | None,
    seed: int,
    host: HostGroup,
    learnt_MD: Tensor | None = None,
) -> Fitted:
    """Place the centres in the training embeddings, choose γ, and fix ρ_max, with head-room.

    Every rank calls it with the same rows. gamma: that of the settings; None: of GAMMAS the one
    with the greatest MAP@R on the validation classes. Without these, on a tenth of the training
    classes, held out from centres that are made for the choice; with too few of them, or more rows
    than are searched in seconds, it is DEFAULT_GAMMA. learnt_MD: centres that have been learnt, in
    units of the mean pairwise distance; None: k-means finds them. From learnt ones no training
    class was held out: without validation classes they take DEFAULT_GAMMA too.
    """
    chosen_on, choosing = "the validation classes", validation
    rho_V = None
    if gamma is None and validation is None and learnt_MD is None:
        chosen_on = "a tenth of the training classes, held out from the centres"
        choosing, rho_V = _held_out(centres, training, seed=seed)
    if learnt_MD is None:
        centres.fit(torch.from_numpy(training.z_ND), seed=seed)
    else:
        centres.place(learnt_MD, torch.from_numpy(training.z_ND), seed=seed)
    seen = [rho_of(centres, training.z_ND)]
    if validation is not None:
        rho_V = rho_of(centres, validation.z_ND)
        seen.append(rho_V)
    figures: dict[float, dict[str, float]] = {}
    if gamma is None and choosing is not None:
        # The searches are the first rank's alone, like those of a validation.
        figures = host.from_first(
            _figures(centres, choosing, rho_V) if rank_number() == 0 else None
        )
    if gamma is not None:
        chosen_on = "the settings"
    elif not figures:
        gamma, chosen_on = DEFAULT_GAMMA, "the default, for want of classes that could choose it"
    else:
        # The first of equal ones, so the smallest.
        gamma = max(GAMMAS, key=lambda one: figures[one][_CHOOSES])
    centres.settle(gamma=gamma, rho_max=HEAD_ROOM * max(float(rho_N.max()) for rho_N in seen))
    return Fitted(
        centres=len(centres.centres_MD),
        learnt=learnt_MD is not None,
        nearest=centres.nearest,
        gamma=gamma,
        chosen_on=chosen_on,
        figures=figures,
    )


@torch.no_grad()
def rho_of(centres: Centres, z_ND: np.ndarray) -> np.ndarray:
    """(N,) ρ of embeddings, a mean squared distance in the geometry that is searched."""
    device = centres.centres_MD.device
    blocks = torch.from_numpy(z_ND).split(_BLOCK_ROWS)
    return torch.cat([centres(z_bD.to(device))[:, -1].cpu() for z_bD in blocks]).numpy()


def _held_out(
    centres: Centres, training: Embedded, *, seed: int
) -> tuple[Embedded | None, np.ndarray | None]:
    """Every tenth class, and its ρ by centres fitted to the others; nothing where that says
    little or takes long."""
    held_N = np.unique(training.label_N, return_inverse=True)[1] % _EVERY == _EVERY - 1
    rest = int((~held_N).sum())
    few = len(np.unique(training.label_N[held_N])) < _FEWEST_HELD_OUT
    if few or rest < len(centres.centres_MD) or len(held_N) - rest > _MOST_HELD_OUT:
        return None, None
    centres.fit(torch.from_numpy(training.z_ND[~held_N]), seed=seed)
    held = Embedded(z_ND=training.z_ND[held_N], label_N=training.label_N[held_N])
    return held, rho_of(centres, held.z_ND)


def _figures(
    centres: Centres, choosing: Embedded, rho_V: np.ndarray | None
) -> dict[float, dict[str, float]]:
    """γ → figures; none where no image has another of its class."""
    figures = evaluate_structure(
        choosing.z_ND,
        rho_V,
        choosing.label_N,
        gammas=GAMMAS,
        distance="cosine" if centres.unit else "euclidean",
        roles_N=choosing.role_N,
    )
    return figures if all(math.isfinite(one[_CHOOSES]) for one in figures.values()) else {}
