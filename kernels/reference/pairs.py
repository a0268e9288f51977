"""Distances between all pairs of rows, exactly, in O(B·N) memory: the base of every reference op.

Shapes: B anchors, N candidates, D width.

    D²_ij = Σ_k s_ik (z_ik - c_jk)²     docs/algorithm.md, "Adaptive distance"; s = 1 is Euclidean

The sum runs over the differences themselves, one dimension at a time, so nothing cancels for
near-duplicates or for embeddings far from the origin, and no (B, N, D) tensor exists in forward or
backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type an op computes in: the widest of its inputs, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _SquaredDistance(torch.autograd.Function):
    """D²_BN for anchors_BD, candidates_ND and weights_BD (None: 1 everywhere); first derivatives
    only."""

    @staticmethod
    def forward(
        ctx: Any, anchors_BD: Tensor, candidates_ND: Tensor, weights_BD: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(anchors_BD, candidates_ND, weights_BD)
        total_BN = anchors_BD.new_zeros(anchors_BD.shape[0], candidates_ND.shape[0])
        for k in range(anchors_BD.shape[1]):
            square_BN = (anchors_BD[:, k, None] - candidates_ND[None, :, k]).square_()
            if weights_BD is not None:
                square_BN *= weights_BD[:, k, None]
            total_BN += square_BN
        return total_BN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        anchors_BD, candidates_ND, weights_BD = ctx.saved_tensors
        for_anchors, for_candidates, for_weights = ctx.needs_input_grad
        grad_anchors_BD = torch.empty_like(anchors_BD) if for_anchors else None
        grad_candidates_ND = torch.empty_like(candidates_ND) if for_candidates else None
        grad_weights_BD = torch.empty_like(weights_BD) if for_weights else None
        for k in range(anchors_BD.shape[1]):
            diff_BN = anchors_BD[:, k, None] - candidates_ND[None, :, k]
            pull_BN = grad_BN * diff_BN
            if grad_weights_BD is not None:
                grad_weights_BD[:, k] = diff_BN.mul_(pull_BN).sum(1)
            if weights_BD is not None:
                pull_BN *= weights_BD[:, k, None]
            if grad_anchors_BD is not None:
                grad_anchors_BD[:, k] = 2 * pull_BN.sum(1)
            if grad_candidates_ND is not None:
                grad_candidates_ND[:, k] = -2 * pull_BN.sum(0)
        return grad_anchors_BD, grad_candidates_ND, grad_weights_BD


def pairwise_squared_distance(
    anchors_BD: Tensor, candidates_ND: Tensor, weights_BD: Tensor | None = None
) -> Tensor:
    """D²_ij = Σ_k s_ik (a_ik - c_jk)², shape (B, N), with the anchor's weights s (None: 1).

    Any floating dtype; half types are computed and returned in float32.  Gradients reach all three
    arguments, first order only.  Memory O(B·N) forward and backward.  A difference whose square
    underflows counts as 0. Raises ValueError when the shapes do not fit.
    """
    if (
        anchors_BD.dim() != 2
        or candidates_ND.dim() != 2
        or anchors_BD.shape[1] != candidates_ND.shape[1]
    ):
        raise ValueError(
            "anchors and candidates must be (B, D) and (N, D) with one D, "
            f"got {tuple(anchors_BD.shape)} and {tuple(candidates_ND.shape)}"
        )
    if weights_BD is not None and weights_BD.shape != anchors_BD.shape:
        raise ValueError(
            f"weights belong to the anchors and need their shape {tuple(anchors_BD.shape)}, "
            f"got {tuple(weights_BD.shape)}"
        )
    given = (
        (anchors_BD, candidates_ND)
        if weights_BD is None
        else (anchors_BD, candidates_ND, weights_BD)
    )
    dtype = compute_dtype(*given)
    weights = None if weights_BD is None else weights_BD.to(dtype)
    result: Tensor = _SquaredDistance.apply(anchors_BD.to(dtype), candidates_ND.to(dtype), weights)
    return result


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose subgradient at 0 is 0 (autograd's own is infinite there); NaN stays NaN."""
    zero = x <= 0
    return torch.sqrt(x.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def pairwise_distance(
    anchors_BD: Tensor, candidates_ND: Tensor, weights_BD: Tensor | None = None
) -> Tensor:
    """Square root of `pairwise_squared_distance`, (B, N); a pair at distance 0 has gradient 0."""
    return safe_sqrt(pairwise_squared_distance(anchors_BD, candidates_ND, weights_BD))


def unit_rows(z_BD: Tensor) -> Tensor:
    """Rows divided by their length, (B, D) in float32 or wider.  A row of zeros stays zero."""
    z_BD = z_BD.to(compute_dtype(z_BD))
    # A plain norm would send the gradient of a zero row to infinity; here it passes unscaled.
    length_B1 = safe_sqrt(z_BD.square().sum(1, keepdim=True))
    return z_BD / length_B1.masked_fill(length_B1 == 0, 1.0)


def inner_products(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    """x_i · y_j, shape (B, N), in the inputs' own precision even where autocast is on."""
    with torch.autocast(x_BD.device.type, enabled=False):
        return x_BD @ y_ND.T


def off_diagonal(B: int, device: torch.device, *, candidates: int | None = None) -> Tensor:
    """(B, candidates) mask, true where i != j; candidates: B unless given."""
    return ~torch.eye(B, candidates or B, dtype=torch.bool, device=device)
