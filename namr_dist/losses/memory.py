"""Cross-batch memory: embeddings of earlier batches as further candidates (Wang et al. 2020).

Shapes: B rows of a batch of all ranks, Q rows held, N = B + Q candidates, D width, R rows of the
ring.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossBatchMemory(nn.Module):
    """A ring of the latest embeddings, unscaled, with their labels and images.

    rows: R.  width: D.  start_step: batches that are taken before any row is given out.
    Every rank takes the rows of all, so that all hold the same. Buffers hold everything, so a
    checkpoint does, and may be read by another number of ranks.
    """

    z_RD: Tensor
    label_R: Tensor
    index_R: Tensor
    taken: Tensor

    def __init__(self, *, rows: int, width: int, start_step: int) -> None:
        super().__init__()
        self.rows, self.start_step = rows, start_step
        self.register_buffer("z_RD", torch.zeros(rows, width))
        self.register_buffer("label_R", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("index_R", torch.zeros(rows, dtype=torch.int64))
        # Batches and rows so far.
        self.register_buffer("taken", torch.zeros(2, dtype=torch.int64))
        self._read: tuple[Tensor, int, int, int] | None = None

    def behind(self, z_BD: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """All candidates, (N, D) and (N,): the batch and, from start_step on, the rows held behind
        it."""
        batches, rows = self._taken()
        held = min(rows, self.rows) if batches >= self.start_step else 0
        if not held:
            return z_BD, labels_B
        return torch.cat([z_BD, self.z_RD[:held]]), torch.cat([labels_B, self.label_R[:held]])

    @torch.no_grad()
    def moved(self, z_BD: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Mean distance of the batch's rows from what is held of the same images, the newest where
        there are several; and how many rows that is a mean of, 0 if none is held. Scalars of z's
        type; a GPU is not waited for."""
        rows = self._taken()[1]
        held = min(rows, self.rows)
        if not held:
            return z_BD.new_zeros(()), z_BD.new_zeros(())
        # From the oldest to the newest.
        slot_Q = torch.arange(rows - held, rows, device=z_BD.device) % self.rows
        index_Q, order_Q = self.index_R[slot_Q].sort(stable=True)
        newest_B = (
            torch.searchsorted(index_Q, index_B.contiguous(), right=True).sub_(1).clamp_min_(0)
        )
        found_B = index_Q[newest_B] == index_B
        distance_B = torch.linalg.vector_norm(z_BD - self.z_RD[slot_Q[order_Q[newest_B]]], dim=1)
        images = found_B.sum().to(z_BD.dtype)
        return distance_B.where(found_B, 0.0).sum() / images.clamp_min(1), images

    @torch.no_grad()
    def add(self, z_BD: Tensor, labels_B: Tensor, index_B: Tensor) -> None:
        """Take a batch in, in place of the oldest rows. index_B: which image each row is of."""
        batches, rows = self._taken()
        B = len(z_BD)
        last = slice(max(0, B - self.rows), B)
        slot_Q = torch.arange(rows + last.start, rows + B, device=z_BD.device) % self.rows
        for ring, of_batch in (
            (self.z_RD, z_BD),
            (self.label_R, labels_B),
            (self.index_R, index_B),
        ):
            ring.index_copy_(0, slot_Q, of_batch[last].to(ring.dtype))
        self.taken[0] += 1
        self.taken[1] += B
        self._read = (self.taken, self.taken._version, batches + 1, rows + B)

    def _taken(self) -> tuple[int, int]:
        """Batches and rows so far. Reading them waits for a GPU, and is done only where they came
        from elsewhere: another tensor, or a change that `add` did not make."""
        if (
            self._read is None
            or self._read[0] is not self.taken
            or self._read[1] != self.taken._version
        ):
            batches, rows = self.taken.tolist()
            self._read = (self.taken, self.taken._version, batches, rows)
        return self._read[2:]

    def extra_repr(self) -> str:
        """The settings, for repr()."""
        return f"rows={self.rows}, width={self.z_RD.shape[1]}, start_step={self.start_step}"
