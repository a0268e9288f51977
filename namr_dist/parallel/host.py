"""Messages between ranks that stay on the hosts: no device waits for them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from namr_dist.parallel.ranks import world_size


class HostGroup:
    """All ranks, over gloo, whatever the devices speak. Every rank must make it and make each call,
    in one order."""

    def __init__(self, timeout: timedelta | None = None) -> None:
        """timeout: how long one waits for the others; None: gloo's own."""
        self._alone = world_size() == 1
        # A group of its own, on CPUs too: its messages cannot be taken for a gradient.
        self._group = None if self._alone else dist.new_group(backend="gloo", timeout=timeout)

    def largest(self, *values: int) -> tuple[int, ...]:
        """Of each value, the largest that any rank brings."""
        if self._alone:
            return values
        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group)
        return tuple(numbers.tolist())

    def from_first(self, value: Any) -> Any:
        """What the first rank brings, on every rank."""
        if self._alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]

    def of_all(self, value: Any) -> list[Any]:
        """What each rank brings, in the order of ranks."""
        if self._alone:
            return [value]
        values = [None] * world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The CPU tensors of all ranks, in the order of ranks: of one shape and dtype."""
        if self._alone:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(tensors, tensor, group=self._group)
        return tensors

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' CPU tensors, of one shape and dtype."""
        if self._alone:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def broadcast(self, tensor: Tensor, *, source: int) -> None:
        """Overwrite a CPU tensor by the source's, in place."""
        if not self._alone:
            dist.broadcast(tensor, src=source, group=self._group)


def lost_contact(error: BaseException) -> bool:
    """Whether an exception says that the connection to another rank broke, or waited too long."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    )
