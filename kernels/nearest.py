"""The cluster centres nearest to each row, and how far they are.  Definition: reference/losses.py.

Shapes: N rows, M centres, D width, K centres chosen for a row.
"""

import os
from typing import Any

import torch
from torch import Tensor

from .checks import check_centres, check_finite
from .dispatch import implementation
from .ops import exactly
from .reference.pairs import compute_dtype


def nearest_centres(z_ND: Tensor, centres_MD: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest ‖z_i - c_m‖² of each row, ascending, and which centres they belong to.

    z_ND: rows, N >= 0.  centres_MD: at least k of them, as wide.  float32, float64, bfloat16 or
    float16; two types are computed in the wider.
    Returns squared distances (N, k), in float32 or wider, and centre numbers, int64 (N, k).
    Differentiable once in z and the centres through the distances: for a chosen pair 2 g (z_i -
    c_m) and its opposite.  Which centres are chosen is a constant; one that no row chooses has
    gradient 0.
    The distances are summed from the differences z_i - c_m, so a row equal to a centre is at
    exactly 0.  They are in ascending order as returned, equal ones in the order of the centres'
    numbers.  A centre that is left out is not nearer than one returned by more than the rounding of
    such a sum; of equal centres the first are taken.  A distance of NaN counts as the least, so
    that it comes out.
    Rows do not depend on each other: a rank may pass its own rows, and the gradients of the centres
    add up over ranks.  k = 1 is the assignment step of k-means.
    Memory: O(N·(D + k) + M·D) and a block; the distances of all pairs are never stored.  On a GPU
    kernels choose up to 30 centres; more are chosen by blocked PyTorch, which waits for the device.
    Raises ValueError for a wrong shape or dtype, or a k outside 1..M.
    """
    check_centres(z_ND, centres_MD, k)
    squared_NK, index_NK = _nearest_centres(z_ND, centres_MD, k)
    return squared_NK, index_NK


def _alike(z_ND: Tensor, centres_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and of the wider of their types."""
    dtype = torch.promote_types(z_ND.dtype, centres_MD.dtype)
    return z_ND.to(dtype).contiguous(), centres_MD.to(dtype).contiguous()


@torch.library.custom_op("namr::nearest_centres", mutates_args=())
@exactly
def _nearest_centres(z_ND: Tensor, centres_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if os.environ.get("NAMR_DEBUG") == "1":
        for position, rows in enumerate((z_ND, centres_MD)):
            check_finite(f"nearest_centres: argument {position}", rows)
    z_ND, centres_MD = _alike(z_ND, centres_MD)
    primitives = implementation(z_ND)
    squared_NK, index_NK = primitives.k_nearest(z_ND, centres_MD, k=k)
    return squared_NK, index_NK


@_nearest_centres.register_fake
def _(z_ND: Tensor, centres_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (z_ND.shape[0], k)
    return (
        z_ND.new_empty(shape, dtype=compute_dtype(z_ND, centres_MD)),
        z_ND.new_empty(shape, dtype=torch.int64),
    )


@torch.library.custom_op("namr::nearest_centres_gradient", mutates_args=())
@exactly
def _nearest_centres_gradient(
    z_ND: Tensor,
    centres_MD: Tensor,
    index_NK: Tensor,
    grad_NK: Tensor,
    for_z: bool,
    for_centres: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of z and the centres in their own types; one not asked for is empty."""
    dtypes = z_ND.dtype, centres_MD.dtype
    z_ND, centres_MD = _alike(z_ND, centres_MD)
    primitives = implementation(z_ND)
    gradients = primitives.k_nearest_gradient(
        z_ND,
        centres_MD,
        index_NK.contiguous(),
        grad_NK.contiguous(),
        for_z=for_z,
        for_centres=for_centres,
    )
    grad_z_ND, grad_centres_MD = (
        z_ND.new_empty(0, dtype=dtype) if gradient is None else gradient.to(dtype).contiguous()
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
    return grad_z_ND, grad_centres_MD


@_nearest_centres_gradient.register_fake
def _(
    z_ND: Tensor,
    centres_MD: Tensor,
    index_NK: Tensor,
    grad_NK: Tensor,
    for_z: bool,
    for_centres: bool,
) -> tuple[Tensor, Tensor]:
    return (
        z_ND.new_empty(z_ND.shape if for_z else 0),
        centres_MD.new_empty(centres_MD.shape if for_centres else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx: Any, grad_NK: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            "nearest_centres has first derivatives only; use kernels.reference for anything beyond"
        )
    for_z, for_centres = ctx.needs_input_grad[:2]
    if grad_NK is None:
        return None, None, None
    grad_z_ND, grad_centres_MD = _nearest_centres_gradient(
        *ctx.saved_tensors, grad_NK, for_z, for_centres
    )
    return grad_z_ND if for_z else None, grad_centres_MD if for_centres else None, None


_nearest_centres.register_autograd(_backward, setup_context=_setup_context)
