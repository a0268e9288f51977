"""Gathering rows: order, uneven and empty ranks, and the bytes it takes, read from the sockets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from namr_dist.parallel.gather import RowGather, Traffic, count_rows


def gathered(
    counts: list[int], dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...], int, int, Tensor]:
    import torch.distributed as dist

    rank = dist.get_rank()
    traffic = Traffic()
    local = (100 * rank + torch.arange(counts[rank] * 3)).view(-1, 3).to(dtype)
    gather = RowGather(counts, traffic=traffic)
    return (
        gather(local),
        count_rows(len(local), local.device),
        gather.offset,
        traffic.take(),
        gather.one_each(local.new_full((1, 2), rank)),
    )


@pytest.mark.dist
@pytest.mark.parametrize("counts", [[4, 4], [5, 2], [0, 3], [3, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_of_all_ranks_in_order(
    two_ranks: Callable, counts: list[int], dtype: torch.dtype
) -> None:
    want = torch.cat(
        [(100 * rank + torch.arange(count * 3)).view(-1, 3) for rank, count in enumerate(counts)]
    )
    for rank, (rows, counted, offset, received, one_each) in enumerate(
        two_ranks(gathered, counts, dtype)
    ):
        assert torch.equal(rows, want.to(dtype)) and rows.dtype == dtype
        assert counted == tuple(counts) and offset == (counts[0] if rank else 0)
        # From the one other rank, filled up to the longer of the two.
        assert received == max(counts) * 3 * want.to(dtype).element_size()
        assert torch.equal(one_each, torch.tensor([[0, 0], [1, 1]], dtype=dtype))


def test_one_process_is_itself() -> None:
    rows = torch.randn(3, 2)
    assert RowGather((3,))(rows) is rows
    with pytest.raises(ValueError, match="has 3 rows, but was counted with 4"):
        RowGather((4,))(rows)


@pytest.mark.dist
@pytest.mark.parametrize("width", [128, 512])
def test_half_the_bytes_of_a_gather_with_grad(two_ranks: Callable, width: int) -> None:
    """Counted by the kernel on each process's sockets; the gradients of both ways are one
    process's."""
    from namr_dist.bench.gather import measure_here

    # With fewer rows, what the protocol adds, a little different each time, takes the share to the
    # bound.
    for ours, other in two_ranks(measure_here, 512, width, 2):
        assert ours.received_bytes <= 0.55 * other.received_bytes
        # What the log says is what arrives, but for the protocol's own few bytes.
        assert 1 <= ours.received_bytes / ours.counted_bytes < 1.05
        assert max(ours.gradient_error, other.gradient_error) < 1e-5
