"""The losses in the loop form of the first public code: anchor by anchor, from the differences of
its row to all.

Shapes: B rows, D width, C proxies.  Autograd keeps every anchor's (B, D) differences, so a pass
holds B²D numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Form
from .eager import ALPHA, MARGIN, sample_negatives, wide


def _distance(z_BD: Tensor, s_BD: Tensor | None = None) -> Tensor:
    """(B, B), one anchor a turn; s: the anchor's weights."""
    lines = []
    for i in range(z_BD.shape[0]):
        square_BD = (z_BD[i] - z_BD).square()
        lines.append(
            (square_BD if s_BD is None else s_BD[i] * square_BD).sum(1).clamp_min(1e-12).sqrt()
        )
    return torch.stack(lines)


def _others(labels_B: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Masks of anchor i's positives and negatives."""
    same_B = labels_B == labels_B[i]
    differ_B = ~same_B
    same_B[i] = False
    return same_B, differ_B


def multi_cluster_ranking(labels_B: Tensor, z_BD: Tensor, s_BD: Tensor) -> Tensor:
    """Two clusters: the soft assignment is a softmax over the distances from both centres."""
    z_BD, s_BD = wide(z_BD), wide(s_BD)
    B = z_BD.shape[0]
    with torch.no_grad():
        d_BB = _distance(z_BD).fill_diagonal_(0.0)
        far, deviation = d_BB.mean(), d_BB.std()
        centres = torch.stack([far, torch.maximum(0.2 * far, far - 3 * deviation)])
    r_BB2 = (_distance(z_BD, s_BD)[..., None] - centres).abs()
    loss_BB = (torch.softmax(-10 * r_BB2, 2) * r_BB2).sum(2)
    return (loss_BB.sum() - loss_BB.diagonal().sum()) / (B * (B - 1))


def triplet_hardest(labels_B: Tensor, z_BD: Tensor) -> Tensor:
    """One term an anchor, with its farthest positive and its nearest negative."""
    d_BB = _distance(wide(z_BD))
    terms = []
    for i, d_B in enumerate(d_BB):
        same_B, differ_B = _others(labels_B, i)
        terms.append(torch.relu(d_B[same_B].max() - d_B[differ_B].min() + MARGIN))
    return torch.stack(terms).mean()


def triplet_semihard(labels_B: Tensor, z_BD: Tensor) -> Tensor:
    """One term a positive, with the nearest negative beyond it, or where there is none, with the
    nearest of all."""
    d_BB = _distance(wide(z_BD))
    terms = []
    for i, d_B in enumerate(d_BB):
        same_B, differ_B = _others(labels_B, i)
        negatives = d_B[differ_B]
        for reach in d_B[same_B]:
            beyond = negatives.masked_fill(negatives <= reach, math.inf).min()
            terms.append(
                torch.relu(reach - torch.where(beyond.isfinite(), beyond, negatives.min()) + MARGIN)
            )
    return torch.stack(terms).mean()


def _terms(
    labels_B: Tensor, d_BB: Tensor, negative_BR: Tensor, term: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    return torch.cat(
        [term(d_B[_others(labels_B, i)[0]], d_B[negative_BR[i]]) for i, d_B in enumerate(d_BB)]
    )


def triplet_distance_weighted(labels_B: Tensor, z_BD: Tensor) -> Tensor:
    """One term a positive; negatives are drawn as in the eager form."""
    z_BD = wide(z_BD)
    negative_BR = sample_negatives(torch.nn.functional.normalize(z_BD.detach()), labels_B)
    return _terms(
        labels_B, _distance(z_BD), negative_BR, lambda p, n: torch.relu(p - n + MARGIN)
    ).mean()


def margin(labels_B: Tensor, x_BD: Tensor, beta: Tensor) -> Tensor:
    """The mean over pairs whose term is above 0.  Negatives are drawn as in the eager form; rows
    have length 1."""
    x_BD = wide(x_BD)
    terms = _terms(
        labels_B,
        _distance(x_BD),
        sample_negatives(x_BD, labels_B),
        lambda p, n: torch.cat([torch.relu(p - beta + ALPHA), torch.relu(beta - n + ALPHA)]),
    )
    return terms.sum() / (terms > 0).sum().clamp_min(1)


def multi_similarity(labels_B: Tensor, x_BD: Tensor) -> Tensor:
    """Pairs are mined anchor by anchor, and the others left out of the sums.  Rows have length
    1."""
    x_BD = wide(x_BD)
    terms = []
    for i in range(x_BD.shape[0]):
        S_B = (x_BD[i] * x_BD).sum(1)
        same_B, differ_B = _others(labels_B, i)
        same, differ = S_B[same_B], S_B[differ_B]
        attract = torch.exp(-2 * (same[same - 0.1 < differ.max()] - 0.5)).sum()
        repel = torch.exp(50 * (differ[differ + 0.1 > same.min()] - 0.5)).sum()
        terms.append(torch.log1p(attract) / 2 + torch.log1p(repel) / 50)
    return torch.stack(terms).mean()


def proxy_anchor(labels_B: Tensor, x_BD: Tensor, proxies_CD: Tensor) -> Tensor:
    """A turn a proxy, not a row.  Rows and proxies have length 1; every class has rows."""
    x_BD, proxies_CD = wide(x_BD), wide(proxies_CD)
    attract, repel = [], []
    for c, proxy_D in enumerate(proxies_CD):
        S_B = (x_BD * proxy_D).sum(1)
        own_B = labels_B == c
        attract.append(torch.log1p(torch.exp(-32 * (S_B[own_B] - 0.1)).sum()))
        repel.append(torch.log1p(torch.exp(32 * (S_B[~own_B] + 0.1)).sum()))
    # Every class of the benchmark has rows.
    return torch.stack(attract).mean() + torch.stack(repel).mean()


FORMS: dict[str, Form] = {
    "multi-cluster-ranking": multi_cluster_ranking,
    "triplet-hardest": triplet_hardest,
    "triplet-semihard": triplet_semihard,
    "triplet-distance-weighted": triplet_distance_weighted,
    "margin": margin,
    "multi-similarity": multi_similarity,
    "proxy-anchor": proxy_anchor,
}
