"""The positives of each anchor as lists of row numbers, without looking at the device's memory from
the host.

Shapes: b local rows, B rows of the batch, N candidates, the batch's rows first, R slots: the most
positives any anchor may have.
"""

import torch
from torch import Tensor

from .ops import Gather


def most_positives(labels_b: Tensor, labels_N: Tensor, *, gather: Gather) -> int:
    """The most positives any row of the batch has among the candidates; on a GPU this waits for the
    device."""
    labels_b = labels_b.contiguous()
    ordered_N = labels_N.sort().values
    size_b = torch.searchsorted(ordered_N, labels_b, right=True) - torch.searchsorted(
        ordered_N, labels_b
    )
    return int(gather(size_b).max()) - 1


def positives(labels_b: Tensor, labels_N: Tensor, *, offset: int, slots: int) -> Tensor:
    """Candidate numbers of each local row's positives, ascending, -1 behind them: int64 (b, slots).

    A row without any negative has none listed either: it makes no triplet.  labels_b are candidates
    offset..offset+b. A row with more positives than slots raises ValueError on a CPU, and a device
    assertion on a GPU.
    """
    labels_b = labels_b.contiguous()
    ordered_N, order_N = labels_N.sort(stable=True)
    start_b = torch.searchsorted(ordered_N, labels_b)
    size_b = torch.searchsorted(ordered_N, labels_b, right=True) - start_b
    fits = size_b.max() <= slots + 1 if size_b.numel() else size_b.new_ones((), dtype=torch.bool)
    if labels_N.device.type == "cpu":
        if not fits:
            raise ValueError(
                f"most_positives is {slots}, but a class has {int(size_b.max())} rows in the batch, so "
                f"{int(size_b.max()) - 1} positives each; pass that, or None to have it counted"
            )
    else:
        torch._assert_async(
            fits, "a class has more positives in the batch than most_positives says"
        )
    # Where the row itself stands in its class's list: it is left out.
    position_N = torch.empty_like(order_N).scatter_(
        0, order_N, torch.arange(order_N.numel(), device=order_N.device)
    )
    itself_b = position_N[offset : offset + labels_b.shape[0]] - start_b
    slot_R = torch.arange(slots, device=labels_N.device)
    member_bR = start_b[:, None] + slot_R + (slot_R >= itself_b[:, None])
    listed_bR = (slot_R < size_b[:, None] - 1) & (size_b < labels_N.shape[0])[:, None]
    return order_N[member_bR.clamp_max(order_N.numel() - 1)].where(listed_bR, -1)
