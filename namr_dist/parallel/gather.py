"""Rows of one rank → rows of all ranks, differentiably."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from namr_dist.parallel.ranks import world_size


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, local_bD: Tensor) -> Tensor:
        parts = [torch.empty_like(local_bD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local_bD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_BD: Tensor) -> Tensor:
        # Every rank computes the same loss from the same gathered rows, so its own rows' slice is already their
        # whole gradient and nothing has to be sent. The factor undoes the mean that the optimizer takes over
        # ranks: a parameter's gradient is the *sum* of what the ranks' rows contribute.
        world, rank = dist.get_world_size(), dist.get_rank()
        rows = grad_BD.shape[0] // world
        return grad_BD[rank * rows : (rank + 1) * rows] * world


def gather_rows(local_bD: Tensor) -> Tensor:
    """(b, …) on each rank → (W·b, …) on all, in the order of ranks. Every rank must pass the same shape.

    Exact when every rank computes the same loss from the result and gradients are averaged over ranks, as
    DeepSpeed does.
    """
    return local_bD if world_size() == 1 else _GatherRows.apply(local_bD)


class _SumRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        # Each rank used the sum for its own rows: the gradient of the sum is the sum of the ranks' gradients.
        total = grad.clone()
        dist.all_reduce(total)
        return total


def sum_ranks(local: Tensor) -> Tensor:
    """Sum over ranks of equally shaped tensors, differentiable."""
    return local if world_size() == 1 else _SumRanks.apply(local)
