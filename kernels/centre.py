"""A point in the middle of a batch, from which rows are taken before distances are made of
products."""

import torch
from torch import Tensor


def centre_of(z_BD: Tensor) -> Tensor:
    """A point (D,) near the middle of the rows: their mean, rounded to a power of two near the
    rows' spread.

    Rounded, because rows of small integers then stay exact, and so do ties between their distances.
    Where all rows agree it is their value, so equal rows become zeros.
    """
    mean_D = z_BD.mean(0)
    spread_D = (z_BD - mean_D).abs_().mean(0)
    mantissa_D, _ = torch.frexp(spread_D)
    # 0.5 <= mantissa < 1, so this is a power of two, at most the spread.
    step_D = spread_D / mantissa_D / 2
    low_D, high_D = torch.aminmax(z_BD, dim=0)
    return torch.where(low_D == high_D, low_D, (mean_D / step_D).round() * step_D)
