"""Mean pairwise distance, by which training scales its embeddings.  Definition:
reference/losses.py."""

from torch import Tensor

from .checks import check_rows
from .dispatch import implementation
from .ops import Gather, alone, exactly, loss_op, needs_grad


def mean_pairwise_distance(z_BD: Tensor) -> Tensor:
    """mean over i != j of ‖z_i - z_j‖: a scalar; training divides z by it.

    z_BD: float32, float64, bfloat16 or float16; added up and returned in float32 or wider.
    Differentiable once. It is 0 when all rows are equal, so a caller that divides must guard
    against that.
    Memory: O(B·D).  Raises ValueError unless z is a floating (B, D) with B >= 2.
    """
    check_rows("z", z_BD)
    value, _ = _mean_pairwise_distance(z_BD, needs_grad(z_BD))
    return value


@exactly
def mean_distance_of_rows(
    z_bD: Tensor, z_BD: Tensor, *, offset: int, gather: Gather, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The same from rows offset..offset+b alone: the batch's value, and its gradient for those
    rows, (b, D)."""
    primitives = implementation(z_BD)
    B = z_BD.shape[0]
    mean_b, _ = primitives.row_moments(z_bD, z_BD, offset=offset)
    value = gather(mean_b).sum() / (B - 1)
    if not with_grad:
        return value, None
    return value, primitives.distance_sum_gradient(z_bD, z_BD, offset=offset).div_(B * (B - 1))


@loss_op("mean_pairwise_distance", differentiable=1)
def _mean_pairwise_distance(z_BD: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    return mean_distance_of_rows(z_BD, z_BD, offset=0, gather=alone, with_grad=with_grad)  # type: ignore[return-value]
