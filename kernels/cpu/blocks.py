"""What the blocked CPU primitives share: walking over blocks of rows, and squared distances within
a block.

Shapes: b anchors, B candidates, D width, r anchors of one block, P some pairs (anchor, candidate).
A block is r rows against all B candidates, about BLOCK_ELEMENTS numbers, so that it stays in cache
while several cheap operations pass over it.  Memory of every op: O((b + B)·D + block).

    D²_ij = Σ_k s_ik (z_ik - c_jk)² = Σ_k s_ik z_ik² - 2 (s_i∘z_i)·c_j + s_i·(c_j∘c_j)

as matrix products on centred rows (docs/algorithm.md, "Adaptive distance"); s = 1 is Euclidean.
They cancel for near-duplicates: pairs with D² below NEAR times the pair's scale are computed again
from their differences.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference.pairs import compute_dtype

BLOCK_ELEMENTS = 3 << 17
"""Numbers in one block; there are a few buffers of that size.  Larger ones are a little faster, for
more memory."""
SHORTEST = 16
"""Rows of a block at least, however many candidates there are: thinner matrix products run
slowly."""
NEAR = 2.0**-8
"""Below this share of its scale a squared distance has lost more than 8 bits to cancellation."""


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of 0..rows, each with about BLOCK_ELEMENTS numbers in `columns` columns."""
    size = block_rows(rows, columns)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def block_rows(rows: int, columns: int) -> int:
    """Rows of the largest block `row_blocks` makes."""
    return min(max(rows, 1), max(SHORTEST, BLOCK_ELEMENTS // max(columns, 1)))


def chunks(pairs: int, width: int) -> Iterator[slice]:
    """Slices of a list of pairs, such that `pairs` rows of `width` numbers fill one block."""
    size = max(1, BLOCK_ELEMENTS // max(width, 1))
    for first in range(0, pairs, size):
        yield slice(first, min(first + size, pairs))


def computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in the type the op computes in."""
    dtype = compute_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)


class SquaredDistances:
    """D² between anchors and candidates, one block of anchors at a time, in one reused buffer.

    anchors_bD, candidates_BD, weights_bD (the anchors', or None): all in one computing dtype.
    Anchor i and candidate i + offset are the same row.  left_bK, right_BK: the factors of the
    product; z_bD, z_BD: the centred rows.
    """

    def __init__(
        self,
        anchors_bD: Tensor,
        candidates_BD: Tensor,
        weights_bD: Tensor | None,
        *,
        centre_D: Tensor,
    ):
        self.anchors_bD, self.candidates_BD, self.weights_bD = anchors_bD, candidates_BD, weights_bD
        self.z_BD = candidates_BD - centre_D
        self.z_bD = self.z_BD if anchors_bD is candidates_BD else anchors_bD - centre_D
        self.norm_b, self.norm_B = self.z_bD.square().sum(1), self.z_BD.square().sum(1)
        if weights_bD is None:
            self.left_bK, self.right_BK = -2 * self.z_bD, self.z_BD
            self.limit_b = torch.full_like(self.norm_b, NEAR)
        else:
            weighted_bD = weights_bD * self.z_bD
            self.left_bK = torch.cat([weights_bD, -2 * weighted_bD], 1)
            self.right_BK = torch.cat([self.z_BD.square(), self.z_BD], 1)
            self.own_term_b = (weighted_bD * self.z_bD).sum(1)
            # The pair's scale is Σ_k s_ik (z_ik² + z_jk²); this bound needs no product of its own.
            self.limit_b = NEAR * weights_bD.amax(1)
        # With one value in all rows every distance is an exact 0 already, and nothing needs
        # mending.
        self.largest = self.norm_B.max() if self.norm_B.numel() else self.norm_B.new_zeros(())
        b, B = anchors_bD.shape[0], candidates_BD.shape[0]
        self._buffer_rB = self.left_bK.new_empty(block_rows(b, B), B)

    def blocks(self) -> Iterator[slice]:
        """Slices of the anchors, each as many as `product` has room for."""
        return row_blocks(self.anchors_bD.shape[0], self.candidates_BD.shape[0])

    def product(self, rows: slice) -> Tensor:
        """D² of a block, (r, B), before mending; the next call overwrites it."""
        out_rB = self._buffer_rB[: rows.stop - rows.start]
        if self.weights_bD is None:
            torch.addmm(self.norm_B, self.left_bK[rows], self.right_BK.T, out=out_rB)
            return out_rB.add_(self.norm_b[rows, None])
        return torch.addmm(
            self.own_term_b[rows, None], self.left_bK[rows], self.right_BK.T, out=out_rB
        )

    def mend(self, rows: slice, squared_rB: Tensor) -> tuple[Tensor, Tensor]:
        """Replaces what has cancelled in the block by exact values; returns those pairs (row in
        block, column).

        What must not count as a near-duplicate (a row and itself, say) has been filled with inf
        before.
        """
        limit_r, norm_r = self.limit_b[rows], self.norm_b[rows]
        # One cheap pass finds the rows that may have any; mostly there is none.
        suspect_S = (squared_rB.amin(1) < limit_r * (norm_r + self.largest)).nonzero().squeeze(1)
        pairs = []
        B = self.candidates_BD.shape[0]
        for part in row_blocks(suspect_S.shape[0], B):
            row_S = suspect_S[part]
            limit_SB = (norm_r[row_S, None] + self.norm_B).mul_(limit_r[row_S, None])
            at_S, column_P = torch.le(squared_rB[row_S], limit_SB).nonzero(as_tuple=True)
            pairs.append((row_S[at_S], column_P))
        if not pairs:
            return suspect_S, suspect_S
        row_P = torch.cat([row for row, _ in pairs])
        column_P = torch.cat([column for _, column in pairs])
        squared_rB[row_P, column_P] = self.exact(row_P + rows.start, column_P)
        return row_P, column_P

    def picked(self, rows: slice, squared_rB: Tensor, column_rS: Tensor) -> Tensor:
        """D² of a few columns for each row, (r, S), mended; the block itself stays as it is."""
        picked_rS = squared_rB.gather(1, column_rS)
        if self.largest > 0:
            limit_rS = (self.norm_b[rows, None] + self.norm_B[column_rS]).mul_(
                self.limit_b[rows, None]
            )
            row_P, s_P = torch.le(picked_rS, limit_rS).nonzero(as_tuple=True)
            picked_rS[row_P, s_P] = self.exact(row_P + rows.start, column_rS[row_P, s_P])
        return picked_rS

    def exact(self, anchor_P: Tensor, candidate_P: Tensor) -> Tensor:
        """D² of pairs from their differences, (P,)."""
        exact_P = self.norm_b.new_empty(anchor_P.shape[0])
        for part, diff_PD in self.differences(anchor_P, candidate_P):
            diff_PD.square_()
            if self.weights_bD is not None:
                diff_PD *= self.weights_bD[anchor_P[part]]
            exact_P[part] = diff_PD.sum(1)
        return exact_P

    def differences(self, anchor_P: Tensor, candidate_P: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of P, z_i - z_j) chunk by chunk, from the rows as given: centring would round
        them."""
        for part in chunks(anchor_P.shape[0], self.anchors_bD.shape[1]):
            yield part, self.anchors_bD[anchor_P[part]] - self.candidates_BD[candidate_P[part]]

    def squared(self, rows: slice, *, offset: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A mended block, 0 between a row and itself (row i of all anchors is candidate i +
        offset), and its pairs."""
        squared_rB = self.product(rows)
        own_r = squared_rB.diagonal(rows.start + offset)
        own_r.fill_(math.inf)
        near = self.mend(rows, squared_rB)
        own_r.zero_()
        return squared_rB, near


class Classes:
    """The rows of every anchor's class, from one stable sort; labels in any order."""

    def __init__(self, labels_b: Tensor, labels_B: Tensor):
        sorted_B, self.order_B = torch.sort(labels_B, stable=True)
        self.first_b = torch.searchsorted(sorted_B, labels_b)
        self.last_b = torch.searchsorted(sorted_B, labels_b, right=True) - 1

    def members(self, rows: slice) -> Tensor:
        """Row numbers of the anchors' classes, themselves included, ascending; the last one repeats
        as padding."""
        first_r1, last_r1 = self.first_b[rows, None], self.last_b[rows, None]
        most = int((last_r1 - first_r1).max()) + 1
        return self.order_B[
            torch.minimum(first_r1 + torch.arange(most, device=first_r1.device), last_r1)
        ]
