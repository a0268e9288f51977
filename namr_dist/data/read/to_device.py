"""Batches on their way to a GPU, while it computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from namr_dist.data.read.stream import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, with their tensors on `device`; on a CPU, the batches themselves.

    A GPU copies the next batch from pinned memory on a stream of its own while it computes with the
    current one, so that one more batch is on the device than is used. Each is handed out once the
    next has been made.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    coming: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = batch.to(device), side.record_event()
        if coming:
            yield _handed_over(*coming, device)
        coming = copied
    if coming:
        yield _handed_over(*coming, device)


def _handed_over(batch: Batch, arrived: torch.cuda.Event, device: torch.device) -> Batch:
    """The batch, once it has arrived, for use on the current stream."""
    current = torch.cuda.current_stream(device)
    current.wait_event(arrived)
    for tensor in batch.tensors:
        # Its memory belongs to the side stream, which must not reuse it while the current one still
        # reads.
        tensor.record_stream(current)
    return batch
