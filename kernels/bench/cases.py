"""What is measured: the losses, their data, and the floating-point work that none of them can
avoid.

Shapes: B rows of the batch, D width, C = B/4 classes, R = 3 positives of every row.

Data: B rows, four a class, grouped by class, in loose clusters around random centres, so that
mining has something to choose and every hinge has active and inactive terms.  Rows are scaled to a
mean distance near 1 (multi-cluster ranking and triplets, as training does) or to length 1 (the
others), then rounded to the case's dtype.

Floor.  FLOPs of the matrix products that a loss needs whatever the implementation, over all B²
pairs (no saving from symmetry), as multiples of B²D; proxy-anchor as multiples of BCD:

                             forward     backward
    multi-cluster ranking    2 + 4 = 6   8      gradients of the product of inner width 2D, twice
    margin, triplets         2           none   sparse: gathers of the mined pairs, O(BD)
    multi-similarity         2           4      the products again, and times the gradient matrix
    proxy-anchor             2           4      the gradient matrix times proxies, and times rows

floor = FLOPs / (2B²D / milliseconds of the bare X·Xᵀ in the same dtype, measured in the same
rounds).  In float32 on a GPU the library's product uses no matrix units and ours does, in three
parts: the floor is then no limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..op_table import CLUSTERS as CLUSTERS
from ..op_table import OPS

PER_CLASS = 4
POSITIVES = PER_CLASS - 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "backward", "forward+backward")
_NOISE = 1.5
"""Spread of a class beside that of the centres: positives at about 0.8 of the mean distance."""

Form = Callable[..., Tensor]
"""A loss as a provider writes it: (labels_B, *leaves) -> a scalar."""

LOSSES = {loss.name: loss for op in OPS.values() for loss in op.benchmarks}
"""The benchmarks of all ops, by name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss at one size; plain values only, so that it travels to another process."""

    loss: str
    rows: int
    width: int
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.loss}  B {self.rows}  D {self.width}  {self.dtype}"

    def floor_flops(self, part: str) -> float:
        """FLOPs of the necessary products of a pass; 0 where there is none."""
        loss = LOSSES[self.loss]
        products = {"forward": loss.forward_products, "backward": loss.backward_products}
        columns = self.rows // PER_CLASS if loss.second == "proxies" else self.rows
        return products.get(part, sum(products.values())) * self.rows * columns * self.width

    def matmul_flops(self) -> float:
        """FLOPs of the bare X·Xᵀ."""
        return 2 * self.rows**2 * self.width


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Labels and the tensors that receive a gradient: the rows first, then the loss's second
    argument."""

    labels_B: Tensor
    leaves: tuple[Tensor, ...]

    def head(self, rows: int) -> Batch:
        """The first rows with all that belongs to them; whole classes."""
        share = rows / self.labels_B.shape[0]
        return Batch(
            labels_B=self.labels_B[:rows],
            leaves=tuple(
                leaf if leaf.dim() == 1 else leaf[: round(leaf.shape[0] * share)]
                for leaf in self.leaves
            ),
        )

    def leaf_copy(self, dtype: torch.dtype | None = None) -> Batch:
        """The same values as fresh leaves, in another dtype if one is given."""
        return Batch(
            labels_B=self.labels_B,
            leaves=tuple(
                leaf.detach().to(dtype or leaf.dtype, copy=True).requires_grad_()
                for leaf in self.leaves
            ),
        )


def make_batch(case: Case) -> Batch:
    """The data of a case, made on its device: the same numbers in every process."""
    loss, dtype = LOSSES[case.loss], DTYPES[case.dtype]
    B, D = case.rows, case.width
    C = B // PER_CLASS
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, D, generator=generator, device=case.device)

    labels_B = torch.arange(C, device=case.device).repeat_interleave(PER_CLASS)
    rows_BD = normal(C)[labels_B]
    rows_BD += _NOISE * normal(B)
    if loss.unit:
        rows_BD = torch.nn.functional.normalize(rows_BD)
    else:
        rows_BD /= (2 * D * (1 + _NOISE**2)) ** 0.5
    leaves = [rows_BD]
    if loss.second == "weights":
        leaves.append(0.5 + torch.rand(B, D, generator=generator, device=case.device))
    elif loss.second == "beta":
        leaves.append(torch.full((1,), 1.2, device=case.device))
    elif loss.second == "proxies":
        leaves.append(torch.nn.functional.normalize(normal(C)))
    # The boundary is a parameter of the model and stays in float32.
    return Batch(
        labels_B=labels_B,
        leaves=tuple(
            leaf.to(torch.float32 if leaf.dim() == 1 else dtype).requires_grad_() for leaf in leaves
        ),
    )
