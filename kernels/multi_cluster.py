"""Multi-cluster ranking: every adaptive distance is pulled to the nearer of ordered centres.

Definition: reference/losses.py.
Shapes: b local rows, B rows of the batch, N candidates, D width.
"""

import torch
from torch import Tensor

from .checks import check_clusters, check_rows, check_same_shape
from .dispatch import implementation
from .ops import Gather, alone, exactly, loss_op, needs_grad
from .reference.pairs import compute_dtype


def multi_cluster_ranking(
    z_BD: Tensor,
    s_BD: Tensor,
    *,
    clusters: int = 2,
    spread: float = 3.0,
    floor: float = 0.2,
    sharpness: float = 10.0,
    statistics: str = "batch",
) -> Tensor:
    """L_mcr of docs/algorithm.md: a scalar, differentiable once in z and s; no labels.

    z_BD: sample embeddings.  s_BD: structure embeddings, positive weights per dimension, of the
    same shape. float32, float64, bfloat16 or float16; added up and returned in float32 or wider.
    clusters M >= 2, spread t, floor φ in [0, 1], sharpness a; statistics: μ and σ over all B²
    distances ("batch") or over each anchor's B distances ("anchor").  The centres carry no
    gradient.
    M = 2 follows the NASA authors' published formulas; M > 2 is this project's reading of NAMR's
    abstract. Memory: O(B·D) and a block.  All rows equal: loss 0, gradient 0.
    Raises ValueError for a wrong shape, dtype, B < 2, clusters < 2, a floor outside [0, 1], other
    statistics.
    """
    check_rows("z", z_BD)
    check_rows("s", s_BD)
    check_same_shape("z", z_BD, "s", s_BD)
    check_clusters(clusters=clusters, floor=floor, statistics=statistics)
    loss, _, _ = _multi_cluster_ranking(
        z_BD, s_BD, clusters, spread, floor, sharpness, statistics, needs_grad(z_BD, s_BD))  # fmt: skip
    return loss


def centres(
    mean_B: Tensor,
    scatter_B: Tensor,
    *,
    candidates: int,
    clusters: int,
    spread: float,
    floor: float,
    statistics: str,
) -> tuple[Tensor, Tensor]:
    """η_m = far − m·step, m = 0..M−1, for each anchor: (B,) and (B,), from `row_moments` of all
    rows."""
    B, N = mean_B.shape[0], candidates
    if statistics == "batch":
        mean = mean_B.mean()
        # Rows have N distances each: scatter within rows and between them.
        scatter = scatter_B.sum() + N * (mean_B - mean).square().sum()
        mean, deviation = mean.expand(B), (scatter / (B * N - 1)).sqrt().expand(B)
    else:
        mean, deviation = mean_B, (scatter_B / (N - 1)).sqrt()
    near = torch.maximum(floor * mean, mean - spread * deviation)
    return mean.contiguous(), ((mean - near) / (clusters - 1)).contiguous()


@exactly
def ranking_of_rows(
    z_bD: Tensor,
    s_bD: Tensor,
    z_ND: Tensor,
    s_BD: Tensor,
    *,
    offset: int,
    gather: Gather,
    clusters: int,
    spread: float,
    floor: float,
    sharpness: float,
    statistics: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same from rows offset..offset+b alone: the batch's loss, and its gradients for those
    rows' z and s.

    z_ND: the batch's rows, then any memory rows: constants, which are candidates and never anchors,
    so need no s. Ranks exchange two numbers a row before the gradient, and one for the loss.
    """
    if z_ND.dtype != s_BD.dtype:
        dtype = compute_dtype(z_ND, s_BD)
        z_bD, s_bD, z_ND, s_BD = (rows.to(dtype) for rows in (z_bD, s_bD, z_ND, s_BD))
    primitives = implementation(z_ND)
    B, N = s_BD.shape[0], z_ND.shape[0]
    mean_b, scatter_b = primitives.row_moments(z_bD, z_ND, offset=offset)
    far_B, step_B = centres(
        gather(mean_b), gather(scatter_b), candidates=N, clusters=clusters, spread=spread, floor=floor,
        statistics=statistics)  # fmt: skip
    loss_b, grad_z_bD, grad_s_bD = primitives.ranking(
        z_bD, s_bD, z_ND, s_BD, far_B, step_B, offset=offset, clusters=clusters, sharpness=sharpness,
        with_grad=with_grad)  # fmt: skip
    pairs = B * (N - 1)
    loss = gather(loss_b).sum() / pairs
    if not with_grad:
        return loss, None, None
    return loss, grad_z_bD.div_(pairs), grad_s_bD.div_(pairs)


@loss_op("multi_cluster_ranking", differentiable=2)
def _multi_cluster_ranking(
    z_BD: Tensor, s_BD: Tensor, clusters: int, spread: float, floor: float, sharpness: float, statistics: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return ranking_of_rows(  # type: ignore[return-value]
        z_BD, s_BD, z_BD, s_BD, offset=0, gather=alone, clusters=clusters, spread=spread, floor=floor,
        sharpness=sharpness, statistics=statistics, with_grad=with_grad)  # fmt: skip
