"""The latest embeddings of training, from which centres are fitted before training has ended.

Shapes: B rows of a batch of all ranks, R rows of the ring, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecentRows(nn.Module):
    """A ring of the latest R embeddings of all ranks, the same on each. Its buffers hold
    everything, so a checkpoint does."""

    z_RD: Tensor
    taken: Tensor

    def __init__(self, *, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("z_RD", torch.zeros(rows, width))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, z_BD: Tensor) -> None:
        """Take a batch in, in place of the oldest rows. A GPU is not waited for."""
        last_BD = z_BD[-len(self.z_RD) :]
        slot_B = torch.arange(len(last_BD), device=z_BD.device).add_(self.taken) % len(self.z_RD)
        self.z_RD.index_copy_(0, slot_B, last_BD.to(self.z_RD.dtype))
        self.taken += len(last_BD)

    def full(self) -> bool:
        """Whether the ring holds R rows. Waits for a GPU."""
        return int(self.taken) >= len(self.z_RD)

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        return f"rows={self.z_RD.shape[0]}, width={self.z_RD.shape[1]}"
