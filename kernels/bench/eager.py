"""The losses as a good PyTorch user writes them: matrix products, whole (B, B) tensors, plain
autograd.

Shapes: B rows, D width, R positives of a row, C proxies.  The batch has R + 1 rows of every class,
as the benchmark's has, which spares these forms the search for positives.  Half types are computed
in float32, as the definition asks; torch.compile takes the same functions.  Constants are the
defaults of the ops.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cases import PER_CLASS, Form

MARGIN, ALPHA = 0.2, 0.2
_NEAREST, _FARTHEST = 0.5, 1.4


def wide(rows: Tensor) -> Tensor:
    """At least float32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def distance(z_BD: Tensor) -> Tensor:
    """‖z_i - z_j‖, (B, B); clamped, for the root has no slope at 0."""
    n_B = z_BD.square().sum(1)
    return (n_B[:, None] + n_B[None, :] - 2 * z_BD @ z_BD.T).clamp_min(1e-12).sqrt()


def positives(labels_B: Tensor) -> Tensor:
    """Row numbers of every row's positives, (B, R)."""
    order_CK = labels_B.argsort(stable=True).view(-1, PER_CLASS)
    others_CKR = torch.stack([order_CK.roll(-r, 1) for r in range(1, PER_CLASS)], 2)
    positive_BR = torch.empty_like(others_CKR.view(-1, PER_CLASS - 1))
    positive_BR[order_CK.flatten()] = others_CKR.flatten(0, 1)
    return positive_BR


def sample_negatives(x_BD: Tensor, labels_B: Tensor) -> Tensor:
    """R distance-weighted negatives of every row by torch.multinomial, (B, R): Wu et al. 2017, eq.
    3."""
    with torch.no_grad():
        D = x_BD.shape[1]
        d_BB = distance(x_BD)
        never_BB = (labels_B[:, None] == labels_B[None, :]) | (d_BB > _FARTHEST)
        d_BB = d_BB.clamp(_NEAREST, _FARTHEST)
        log_q_BB = (D - 2) * d_BB.log() + (D - 3) / 2 * torch.log1p(-d_BB.square() / 4)
        weight_BB = torch.softmax((-log_q_BB).masked_fill(never_BB, -math.inf), 1)
        # A row without a candidate takes any; the multinomial wants a sum above 0.
        return torch.multinomial(weight_BB.nan_to_num(1.0), PER_CLASS - 1, replacement=True)


def multi_cluster_ranking(labels_B: Tensor, z_BD: Tensor, s_BD: Tensor) -> Tensor:
    """Two clusters: the soft assignment is a sigmoid."""
    z_BD, s_BD = wide(z_BD), wide(s_BD)
    B = z_BD.shape[0]
    with torch.no_grad():
        d_BB = distance(z_BD).fill_diagonal_(0.0)
        far, deviation = d_BB.mean(), d_BB.std()
        near = torch.maximum(0.2 * far, far - 3 * deviation)
    sz_BD = s_BD * z_BD
    square_BB = (sz_BD * z_BD).sum(1)[:, None] - 2 * sz_BD @ z_BD.T + s_BD @ z_BD.square().T
    D_BB = square_BB.clamp_min(1e-12).sqrt()
    from_far_BB, from_near_BB = (D_BB - far).abs(), (D_BB - near).abs()
    loss_BB = from_far_BB + torch.sigmoid(10 * (from_far_BB - from_near_BB)) * (
        from_near_BB - from_far_BB
    )
    return (loss_BB.sum() - loss_BB.diagonal().sum()) / (B * (B - 1))


def triplet_hardest(labels_B: Tensor, z_BD: Tensor) -> Tensor:
    """Each row with its farthest positive and its nearest negative."""
    d_BB = distance(wide(z_BD))
    same_BB = labels_B[:, None] == labels_B[None, :]
    # A row's distance to itself never is the largest.
    farthest_B = d_BB.masked_fill(~same_BB, 0.0).amax(1)
    nearest_B = d_BB.masked_fill(same_BB, math.inf).amin(1)
    return torch.relu(farthest_B - nearest_B + MARGIN).mean()


def _triplets(d_BB: Tensor, positive_BR: Tensor, negative_BR: Tensor) -> Tensor:
    return torch.relu(d_BB.gather(1, positive_BR) - d_BB.gather(1, negative_BR) + MARGIN).mean()


def triplet_semihard(labels_B: Tensor, z_BD: Tensor) -> Tensor:
    """Every positive with the nearest negative beyond it, or where there is none, with the nearest
    of all."""
    d_BB = distance(wide(z_BD))
    positive_BR = positives(labels_B)
    with torch.no_grad():
        negative_BB = d_BB.masked_fill(labels_B[:, None] == labels_B[None, :], math.inf)
        hardest_B = negative_BB.argmin(1)
        chosen = []
        for r in range(positive_BR.shape[1]):
            reach_B1 = d_BB.gather(1, positive_BR[:, r, None])
            nearest_B, index_B = negative_BB.masked_fill(negative_BB <= reach_B1, math.inf).min(1)
            chosen.append(torch.where(nearest_B.isfinite(), index_B, hardest_B))
    return _triplets(d_BB, positive_BR, torch.stack(chosen, 1))


def triplet_distance_weighted(labels_B: Tensor, z_BD: Tensor) -> Tensor:
    """Every positive with a negative that is drawn by the distances of the rows at length 1."""
    z_BD = wide(z_BD)
    negative_BR = sample_negatives(torch.nn.functional.normalize(z_BD.detach()), labels_B)
    return _triplets(distance(z_BD), positives(labels_B), negative_BR)


def margin(labels_B: Tensor, x_BD: Tensor, beta: Tensor) -> Tensor:
    """The mean over pairs whose term is above 0.  Rows have length 1; beta, (1,), is learnt."""
    x_BD = wide(x_BD)
    d_BB = distance(x_BD)
    too_far_BR = torch.relu(d_BB.gather(1, positives(labels_B)) - beta + ALPHA)
    too_near_BR = torch.relu(beta - d_BB.gather(1, sample_negatives(x_BD, labels_B)) + ALPHA)
    active = (too_far_BR > 0).sum() + (too_near_BR > 0).sum()
    return (too_far_BR + too_near_BR).sum() / active.clamp_min(1)


def multi_similarity(labels_B: Tensor, x_BD: Tensor) -> Tensor:
    """Pairs are mined by masks of all (B, B) similarities.  Rows have length 1."""
    x_BD = wide(x_BD)
    S_BB = x_BD @ x_BD.T
    differ_BB = labels_B[:, None] != labels_B[None, :]
    same_BB = (~differ_BB).fill_diagonal_(False)
    with torch.no_grad():
        nearest_B1 = S_BB.masked_fill(~differ_BB, -math.inf).amax(1, keepdim=True)
        farthest_B1 = S_BB.masked_fill(~same_BB, math.inf).amin(1, keepdim=True)
        positive_BB = same_BB & (nearest_B1 > S_BB - 0.1)
        negative_BB = differ_BB & (farthest_B1 < S_BB + 0.1)
    # On unit vectors no exponential overflows.
    attract_B = torch.log1p((torch.exp(-2 * (S_BB - 0.5)) * positive_BB).sum(1)) / 2
    repel_B = torch.log1p((torch.exp(50 * (S_BB - 0.5)) * negative_BB).sum(1)) / 50
    return (attract_B + repel_B).mean()


def proxy_anchor(labels_B: Tensor, x_BD: Tensor, proxies_CD: Tensor) -> Tensor:
    """Proxy c is that of class c.  Rows and proxies have length 1."""
    S_BC = wide(x_BD) @ wide(proxies_CD).T
    own_BC = labels_B[:, None] == torch.arange(proxies_CD.shape[0], device=labels_B.device)
    attract_C = torch.log1p((torch.exp(-32 * (S_BC - 0.1)) * own_BC).sum(0))
    repel_C = torch.log1p((torch.exp(32 * (S_BC + 0.1)) * ~own_BC).sum(0))
    return attract_C.sum() / own_BC.any(0).sum() + repel_C.mean()


FORMS: dict[str, Form] = {
    "multi-cluster-ranking": multi_cluster_ranking,
    "triplet-hardest": triplet_hardest,
    "triplet-semihard": triplet_semihard,
    "triplet-distance-weighted": triplet_distance_weighted,
    "margin": margin,
    "multi-similarity": multi_similarity,
    "proxy-anchor": proxy_anchor,
}
