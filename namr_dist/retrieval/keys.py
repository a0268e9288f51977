"""Keys: what a search sorts by, smallest first, with the same bits on every device.

Shapes: Q queries, N items, D width, V width of what is multiplied, B a block's queries, C
candidates, P pairs.

The key of a pair is its squared distance ("l2") or its negated inner product ("ip"): differences
and squares, or products, in float64, summed by halves and rounded once to fp32. Each step is one
IEEE operation on elements, in an order that only the width decides, so a CPU and a GPU find the
same number. A matrix product sums in an order of its own, and comes within a known error of the
key. In float64, all of that interval mostly rounds to one fp32 number, which is the key then: of
unit rows, only a few pairs in 100,000 are left to be summed. In fp32, which takes a CPU half the
time, it says which pairs can matter, and those are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import torch

Metric = Literal["l2", "ip"]
Precision = Literal["fp32", "fp64"]

# Numbers held at once in one temporary. All pairs of a block of queries, in float64: 128 MiB, or 1
# GiB on a GPU.
_BLOCK_NUMBERS = {"cpu": 2**24, "cuda": 2**27}
# The terms of single pairs are gone over some ten times: in few launches on a GPU; on a CPU within
# its cache, and in operations too small for torch to share among threads, which would spend more
# time in waiting for each other.
_TERM_NUMBERS = {"cpu": 2**15, "cuda": 2**27}
# Squares of sums of norms, beyond which an fp32 product may overflow.
_LARGEST_FP32_SQUARE = 1e37


class Keys:
    """The keys of all pairs of some queries and items, which lie on one device."""

    def __init__(self, queries_QD: torch.Tensor, items_ND: torch.Tensor, metric: Metric) -> None:
        """queries_QD, items_ND: finite fp32 on one device."""
        self.queries_QD, self.items_ND, self.metric = queries_QD, items_ND, metric
        self.device = items_ND.device
        self._operands: dict[torch.dtype, torch.Tensor] = {}

    @cached_property
    def _query_norms_Q(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self.queries_QD, dim=1, dtype=torch.float64)

    @cached_property
    def _item_norms_N(self) -> torch.Tensor:
        if self.queries_QD is self.items_ND:
            return self._query_norms_Q
        return torch.linalg.vector_norm(self.items_ND, dim=1, dtype=torch.float64)

    @cached_property
    def _largest_norm(self) -> torch.Tensor:
        return self._item_norms_N.max()

    @cached_property
    def quick(self) -> Precision:
        """What by_product takes least time in, within its error: fp32 on a CPU, unless a training
        run has allowed fewer digits for all fp32 products of the process, or squares may overflow.
        GPUs for computing have fast float64, and TF32 that is switched elsewhere."""
        if self.device.type != "cpu":
            return "fp64"
        backends: Any = torch.backends
        full = backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
        square = float(self._query_norms_Q.max() + self._largest_norm) ** 2
        return "fp32" if full and square < _LARGEST_FP32_SQUARE else "fp64"

    def blocks(self) -> Iterator[torch.Tensor]:
        """(B,) int64 indices of the queries, as many at a time as by_product has room for."""
        yield from self.split(torch.arange(len(self.queries_QD), device=self.device))

    def split(self, rows_M: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Any indices of queries, cut likewise."""
        return rows_M.split(max(1, _BLOCK_NUMBERS[self.device.type] // len(self.items_ND)))

    def _item_operand_NV(self, dtype: torch.dtype) -> torch.Tensor:
        """Items; for "l2" with their squares and a one, so that one product yields squared
        distances."""
        if dtype not in self._operands:
            wide_ND = self.items_ND.to(dtype)
            if self.metric == "l2":
                squares_N1 = self._item_norms_N.square()[:, None].to(dtype)
                wide_ND = torch.cat([wide_ND, squares_N1, torch.ones_like(squares_N1)], dim=1)
            self._operands[dtype] = wide_ND
        return self._operands[dtype]

    def by_product(self, rows_B: torch.Tensor, precision: Precision) -> torch.Tensor:
        """(B, N) float64 or fp32: all keys of some queries by one matrix product, within
        error(precision)."""
        dtype = torch.float64 if precision == "fp64" else torch.float32
        item_operand_NV = self._item_operand_NV(dtype)
        wide_BD = self.queries_QD[rows_B].to(dtype)
        if self.metric == "ip":
            return wide_BD.neg() @ item_operand_NV.T
        squares_B1 = self._query_norms_Q[rows_B, None].square().to(dtype)
        operand_BV = torch.cat([wide_BD * -2, torch.ones_like(squares_B1), squares_B1], dim=1)
        return operand_BV @ item_operand_NV.T

    def error(self, rows_B: torch.Tensor, precision: Precision) -> torch.Tensor:
        """(B,) float64: how far a product of that precision can lie from the key before that is
        rounded.

        With unit roundoff u and ‖q‖, ‖x‖ ≤ X, a sum of D products in any order is off by at most D
        u ‖q‖ X / (1 − D u). fp32 is by_product's or a library's: an inner product, or three such
        terms of a squared distance, with squares that are rounded first, and terms that may be
        flushed to 0. fp64 is by_product: the squares are rounded before they are multiplied, and
        the sum by halves has an error too.
        """
        width = self.items_ND.shape[1]
        norm_B = self._query_norms_Q[rows_B]
        size_B = (
            norm_B * self._largest_norm
            if self.metric == "ip"
            else (norm_B + self._largest_norm).square()
        )
        if precision == "fp64":
            return 2 * (width + 16) * 2.0**-53 * size_B
        share = (width + 8) * 2.0**-24
        return share / (1 - share) * size_B + (width + 8) * torch.finfo(torch.float32).tiny

    def settle(
        self, near_BC: torch.Tensor, rows_B: torch.Tensor, ids_BC: torch.Tensor
    ) -> torch.Tensor:
        """(B, C) fp32 keys from near_BC by_product in float64; +inf stays what it is."""
        error_B1 = self.error(rows_B, "fp64")[:, None]
        keys_BC = (near_BC - error_B1).float()
        row_P, column_P = (keys_BC != (near_BC + error_B1).float()).nonzero(as_tuple=True)
        keys_BC[row_P, column_P] = self.of_pairs(rows_B[row_P], ids_BC[row_P, column_P])
        return keys_BC

    def of_pairs(self, rows_P: torch.Tensor, ids_P: torch.Tensor) -> torch.Tensor:
        """(P,) fp32 keys of chosen pairs, by the definition."""
        keys_P = torch.empty(len(rows_P), dtype=torch.float32, device=self.device)
        step = max(1, _TERM_NUMBERS[self.device.type] // self.items_ND.shape[1])
        for start in range(0, len(rows_P), step):
            part = slice(start, start + step)
            terms_PD = self.items_ND.index_select(0, ids_P[part]).double()
            queries_PD = self.queries_QD.index_select(0, rows_P[part]).double()
            if self.metric == "l2":
                terms_PD.sub_(queries_PD)
                terms_PD.mul_(terms_PD)
            else:
                terms_PD.mul_(queries_PD).neg_()
            keys_P[part] = _sum_by_halves(terms_PD)
        return keys_P


def _sum_by_halves(terms_PD: torch.Tensor) -> torch.Tensor:
    """(P,) sums of rows, which are overwritten: the second half is added to the first until one
    number is left."""
    width = terms_PD.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms_PD[:, : width - half] += terms_PD[:, half:width]
        width = half
    return terms_PD[:, 0]


def pack(keys_BC: torch.Tensor, ids_BC: torch.Tensor) -> torch.Tensor:
    """(B, C) int64 that sort as (key, index) does.  keys_BC: fp32, no NaN; ids_BC: int64 from 0 to
    2³² − 1."""
    bits_BC = (keys_BC + 0.0).view(torch.int32).long()  # −0 becomes 0: they are a tie
    # The bits of a negative float grow as the number falls.
    return (torch.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC) << 32) | ids_BC


def unpack(packed_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (B, C) fp32 and indices (B, C) int64."""
    bits_BC = packed_BC >> 32
    keys_BC = torch.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC).int().view(torch.float32)
    return keys_BC, packed_BC & 0xFFFFFFFF


def rounding(keys_B: torch.Tensor) -> torch.Tensor:
    """How far apart two float64 keys may lie that are a tie once both are rounded to fp32."""
    return 2.0**-22 * keys_B.abs() + torch.finfo(torch.float32).tiny
