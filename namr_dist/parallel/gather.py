"""Rows of one rank → rows of all ranks, and how many bytes that took.

A gradient never travels back: every rank computes the whole gradient of its own rows from what it
gathered (train/objective.py). So half the bytes of a gather that autograd differentiates are sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from namr_dist.parallel.ranks import rank_number, world_size


class Traffic:
    """Bytes that this rank received from others in gathers."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self) -> int:
        """Bytes since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken


class RowGather:
    """(b, …) on each rank → (B, …) on all, in the order of ranks; not differentiable.

    counts_W: rows of each rank, some of which may be 0. A call needs rows of that number, and the
    same trailing shape and dtype on all ranks. Rows stand at offset..offset+b of the result.
    """

    def __init__(self, counts_W: Sequence[int], *, traffic: Traffic | None = None) -> None:
        assert len(counts_W) == world_size(), (counts_W, world_size())
        self.counts_W = tuple(counts_W)
        self.offset = sum(self.counts_W[: rank_number()])
        self.traffic = traffic or Traffic()

    @property
    def one_each(self) -> RowGather:
        """The same for one row a rank."""
        return RowGather((1,) * len(self.counts_W), traffic=self.traffic)

    @torch.no_grad()
    def __call__(self, local: Tensor) -> Tensor:
        """The rows of all ranks, which call it together. Raises ValueError for another number of
        rows than counted."""
        world, own, most = len(self.counts_W), self.counts_W[rank_number()], max(self.counts_W)
        if local.shape[0] != own:
            raise ValueError(
                f"rank {rank_number()} has {local.shape[0]} rows, but was counted with {own}"
            )
        if world == 1:
            return local
        # Collectives want equal shares: shorter ones are filled up, and the filling cut off again.
        padded = local.contiguous() if own == most else local.new_zeros((most, *local.shape[1:]))
        if own != most:
            padded[:own] = local
        gathered = local.new_empty((world * most, *local.shape[1:]))
        dist.all_gather(list(gathered.chunk(world)), padded)
        self.traffic.bytes += (world - 1) * math.prod(padded.shape) * padded.element_size()
        if min(self.counts_W) == most:
            return gathered
        return torch.cat(
            [part[:rows] for part, rows in zip(gathered.chunk(world), self.counts_W, strict=True)]
        )


def count_rows(rows: int, device: torch.device) -> tuple[int, ...]:
    """Rows of every rank. A GPU is waited for: where the counts are known, they need not be
    asked."""
    if world_size() == 1:
        return (rows,)
    mine = torch.tensor([rows], device=device)
    return tuple(RowGather((1,) * world_size())(mine).tolist())


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad * world_size()


def for_averaged_gradients(loss: Tensor) -> Tensor:
    """The same loss for an optimizer that averages gradients over ranks, as DeepSpeed, DDP and FSDP
    do.

    What a rank's backward pass computes is its own rows' share of the gradient; the shares add up
    to the gradient. This undoes the division, here and nowhere else.
    """
    return loss if world_size() == 1 else _Averaged.apply(loss)


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        # Each rank used the sum for its own rows: the gradient of the sum is the sum of the ranks'
        # gradients.
        total = grad.clone()
        dist.all_reduce(total)
        return total


def sum_ranks(local: Tensor) -> Tensor:
    """Sum over ranks of equally shaped tensors, differentiable."""
    return local if world_size() == 1 else _SumRanks.apply(local)
