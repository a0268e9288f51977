"""The nearest centres of each row on the CPU: a block of products, its least entries, and those
again from the differences.

Shapes: N rows, M centres, D width, K centres chosen for a row, r rows of one block, G groups of
centres, P pairs (row, centre) in one list, L places for the pairs of a row.
"""

import math

import torch
from torch import Tensor

from ..centre import centre_of
from .blocks import block_rows, computed, row_blocks

FEWEST_GROUPS = 16
PAIR_ELEMENTS = 1 << 16
"""Numbers of the rows that pairs gather at a time: few enough for a core's own cache."""


def k_nearest(z_ND: Tensor, centres_MD: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k least ‖z_i - c_m‖² of each row, ascending, and their centres, int64: (N, k) each.

    ‖z - c‖² without ‖z‖², which is the same for all centres, orders them: ‖c‖² - 2 z·c, less a
    point in their middle.  The k-th least of the minima of groups of centres is a bound that k
    centres keep and few others do; those, and all that rounding may have put beyond it, are
    measured by their differences.
    """
    z_ND, centres_MD = computed(z_ND, centres_MD)
    (N, D), M = z_ND.shape, centres_MD.shape[0]
    middle_D = centre_of(centres_MD)
    shifted_MD = centres_MD - middle_D
    norm_M = shifted_MD.square().sum(1)
    longest = norm_M.max().sqrt()
    squared_NK = z_ND.new_empty(N, k)
    index_NK = torch.empty(N, k, dtype=torch.int64, device=z_ND.device)
    # Of four groups a centre, one of the k nearest seldom shares its group with another.
    groups = max(FEWEST_GROUPS, 1 << (4 * k - 1).bit_length())
    members = -(-M // groups)
    buffer = z_ND.new_full((block_rows(N, max(members * groups, D)), members * groups), math.inf)
    for rows in row_blocks(N, max(members * groups, D)):
        z_rD = z_ND[rows]
        moved_rD = z_rD - middle_D
        block = buffer[: z_rD.shape[0]]
        key_rM = torch.addmm(norm_M, moved_rD, shifted_MD.T, alpha=-2, out=block[:, :M])
        least_rG = block.view(-1, members, groups).amin(1)
        length_r = torch.linalg.vector_norm(moved_rD, 2, 1)
        apart_r = (2 * length_r + longest) * (longest * doubt(D, z_ND.dtype))
        reach_r = least_rG.kthvalue(k, 1).values + apart_r
        # A comparison that NaN fails: where rows or centres are not finite all pairs are measured.
        row_P, column_P = (key_rM > reach_r[:, None]).logical_not_().nonzero(as_tuple=True)
        exact_P = _squared(z_rD, centres_MD, row_P, column_P)
        squared_NK[rows], index_NK[rows] = _least(exact_P, row_P, column_P, z_rD.shape[0], k)
    return squared_NK, index_NK


def doubt(width: int, dtype: torch.dtype) -> float:
    """How far apart two of the keys above must be, as a share of ‖c‖ (‖c‖ + 2 ‖z‖), that their
    order is certain.

    A sum of D products in any order errs by D roundings of the sum of their sizes at most; twice
    that, for two keys, and a few roundings for norms, the middle and, on a GPU, parts of products.
    """
    return (width + 16) * torch.finfo(dtype).eps


def _least(
    squared_P: Tensor, row_P: Tensor, column_P: Tensor, rows: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k least pairs of each row, NaN first and the leftmost of equals: distances and columns.

    The pairs are listed row by row with ascending columns, at least k a row.
    """
    start_r = torch.searchsorted(row_P, torch.arange(rows, device=row_P.device))
    place_P = torch.arange(row_P.shape[0], device=row_P.device) - start_r[row_P]
    places = int(place_P.max()) + 1
    squared_rL = squared_P.new_full((rows, places), math.inf)
    squared_rL[row_P, place_P] = squared_P
    # Empty places stand behind all pairs of their row, and a stable sort leaves them there.
    order_rK = squared_rL.masked_fill(squared_rL.isnan(), -math.inf).sort(dim=1, stable=True)[1][
        :, :k
    ]
    return squared_rL.gather(1, order_rK), column_P[start_r[:, None] + order_rK]


def _squared(z_rD: Tensor, centres_MD: Tensor, row_P: Tensor, column_P: Tensor) -> Tensor:
    """‖z - c‖² of pairs from their differences, (P,)."""
    P, D = column_P.shape[0], z_rD.shape[1]
    squared_P = z_rD.new_empty(P)
    size = min(P, max(1, PAIR_ELEMENTS // D))
    rows_QD, difference_QD = z_rD.new_empty(size, D), z_rD.new_empty(size, D)
    for first in range(0, P, size):
        part = slice(first, min(first + size, P))
        count = part.stop - first
        difference_qD, rows_qD = difference_QD[:count], rows_QD[:count]
        torch.index_select(centres_MD, 0, column_P[part], out=difference_qD)
        torch.index_select(z_rD, 0, row_P[part], out=rows_qD)
        torch.sum(difference_qD.sub_(rows_qD).square_(), 1, out=squared_P[part])
    return squared_P


def k_nearest_gradient(
    z_ND: Tensor,
    centres_MD: Tensor,
    index_NK: Tensor,
    weight_NK: Tensor,
    *,
    for_z: bool,
    for_centres: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (N, D) and (M, D) of Σ_is weight_is ‖z_i - c_index_is‖²; None for one not asked
    for.

    index_add_ adds in list order on the CPU, so equal calls give equal bits.
    """
    z_ND, centres_MD, weight_NK = computed(z_ND, centres_MD, weight_NK)
    grad_z_ND = torch.zeros_like(z_ND) if for_z else None
    grad_centres_MD = torch.zeros_like(centres_MD) if for_centres else None
    for rows in row_blocks(*z_ND.shape):
        for index_r, weight_r in zip(index_NK[rows].T, weight_NK[rows].T, strict=True):
            pull_rD = (
                centres_MD.index_select(0, index_r).sub_(z_ND[rows]).mul_(2 * weight_r[:, None])
            )
            if grad_z_ND is not None:
                grad_z_ND[rows] -= pull_rD
            if grad_centres_MD is not None:
                grad_centres_MD.index_add_(0, index_r, pull_rD)
    return grad_z_ND, grad_centres_MD
