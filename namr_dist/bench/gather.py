"""`namr bench gather`: bytes and time of a loss over many ranks, beside a gather that autograd
differentiates.

Both sides compute the same loss of the same batch: ours gathers rows and keeps each rank's gradient
at home; the other is torch.distributed.nn.functional.all_gather, whose backward pass sends every
row's gradient back to its rank (reduce-scatter; on gloo a scatter from each rank, which moves as
much), with the whole batch's loss on every rank, as is usual. Bytes are what the kernel counted on
the processes' TCP sockets.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from rich.table import Table
from torch import Tensor

from namr_dist import kernels
from namr_dist.config import LossConfig
from namr_dist.csv_file import write_csv
from namr_dist.parallel.pool import Ranks
from namr_dist.provenance import provenance
from namr_dist.terminal import Console
from namr_dist.train.objective import Objective

_EACH = 4
# <linux/tcp.h>: struct tcp_info, tcpi_bytes_received.
_BYTES_RECEIVED_AT = 128


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One provider on one size; every figure is of a rank and step, the largest over ranks."""

    provider: str
    ranks: int
    rows: int
    width: int
    received_bytes: int
    """On TCP sockets, protocol and all."""
    counted_bytes: int | None
    """As `parallel.gather.Traffic` counts; None for the other provider."""
    median_s: float
    least_s: float
    most_s: float
    gradient_error: float
    """Largest difference to one process, as a share of the gradient's norm."""


def measure(*, ranks: int, rows: int, width: int, steps: int) -> list[Measured]:
    """Both providers on so many CPU ranks (gloo), a batch of `rows` in all, triplet loss with
    multi-cluster ranking."""
    with Ranks(ranks) as pool:
        answers = pool(measure_here, rows, width, steps)
    return [_largest([answer[column] for answer in answers]) for column in range(2)]


def _largest(of_ranks: list[Measured]) -> Measured:
    """Of every figure the largest."""
    fields = ("received_bytes", "counted_bytes", "median_s", "least_s", "most_s", "gradient_error")
    return replace(
        of_ranks[0],
        **{
            field: max(getattr(one, field) for one in of_ranks)
            for field in fields
            if getattr(of_ranks[0], field) is not None
        },
    )


def show(measured: list[Measured]) -> None:
    """Print the figures, each pair with its ratio."""
    table = Table(
        title="a step of triplet + ranking loss with its gradient, a rank", title_justify="left"
    )
    for heading in (
        "ranks",
        "batch",
        "provider",
        "MiB received",
        "of the other",
        "ms (least to most)",
        "gradient error",
    ):
        table.add_column(heading, justify="left" if heading == "provider" else "right")
    for ours, other in zip(measured[::2], measured[1::2], strict=True):
        for one in (ours, other):
            table.add_row(
                str(one.ranks),
                f"{one.rows} × {one.width}",
                one.provider,
                f"{one.received_bytes / 2**20:.2f}",
                f"{one.received_bytes / other.received_bytes:.3f}",
                f"{1e3 * one.median_s:.0f} ({1e3 * one.least_s:.0f} to {1e3 * one.most_s:.0f})",
                f"{one.gradient_error:.0e}",
            )
    Console().print(table)


def to_csv(measured: list[Measured], path: Path) -> None:
    """Write the figures with machine, versions and commit."""
    about = provenance()
    write_csv(path, [{**asdict(one), **about} for one in measured])


def measure_here(rows: int, width: int, steps: int) -> list[Measured]:
    """Both providers as this rank of a process group sees them; every rank calls it."""
    torch.manual_seed(0)
    z_BD, s_BD = torch.randn(rows, width), 0.5 + torch.rand(rows, width)
    labels_B = torch.arange(rows) // _EACH
    world, rank = dist.get_world_size(), dist.get_rank()
    own = slice(rank * rows // world, (rank + 1) * rows // world)
    objective = Objective(LossConfig(), classes=rows // _EACH, images_per_class=_EACH, width=width)

    def ours(z_bD: Tensor, s_bD: Tensor) -> Tensor:
        return objective(z_bD, s_bD, labels_B[own], counts_W=(rows // world,) * world).total

    def with_grad(z_bD: Tensor, s_bD: Tensor) -> Tensor:
        with warnings.catch_warnings():  # newer torch renames it; 2.11 has only this
            warnings.simplefilter("ignore", FutureWarning)
            z, s = (torch.cat(differentiable.all_gather(part)) for part in (z_bD, s_bD))
        labels = torch.cat(_gathered(labels_B[own]))
        return _whole(z, s, labels)

    whole_z, whole_s = z_BD.requires_grad_(), s_BD.requires_grad_()
    want = [
        grad[own]
        for grad in torch.autograd.grad(_whole(whole_z, whole_s, labels_B), (whole_z, whole_s))
    ]
    measured = []
    for name, loss in (("namr", ours), ("gather with grad", with_grad)):
        local = [part.detach()[own].clone().requires_grad_() for part in (z_BD, s_BD)]
        # The mean over ranks that an optimizer takes.
        got = [grad / world for grad in torch.autograd.grad(loss(*local), local)]
        error = max(
            float((one - other).norm() / other.norm()) for one, other in zip(got, want, strict=True)
        )
        objective.traffic.take()
        before = received_bytes()
        times = [_timed(loss, local) for _ in range(steps)]
        received = (received_bytes() - before) // steps
        measured.append(
            Measured(
                provider=name,
                ranks=world,
                rows=rows,
                width=width,
                received_bytes=received,
                counted_bytes=objective.traffic.take() // steps if name == "namr" else None,
                median_s=statistics.median(times),
                least_s=min(times),
                most_s=max(times),
                gradient_error=error,
            )
        )
        dist.barrier()
    return measured


def _whole(z_BD: Tensor, s_BD: Tensor, labels_B: Tensor) -> Tensor:
    config = LossConfig()
    x_BD = z_BD / kernels.mean_pairwise_distance(z_BD)
    return kernels.triplet_loss(
        x_BD, labels_B, margin=config.triplet.margin, most_positives=_EACH - 1
    ) + config.ranking.weight * kernels.multi_cluster_ranking(x_BD, s_BD)


def _gathered(local: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local)
    return parts


def _timed(loss: Callable[..., Tensor], local: list[Tensor]) -> float:
    began = time.perf_counter()
    torch.autograd.grad(loss(*local), local)
    return time.perf_counter() - began


def received_bytes() -> int:
    """Bytes that this process has received on its open TCP sockets, as Linux counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if (
                    one.family in (socket.AF_INET, socket.AF_INET6)
                    and one.type == socket.SOCK_STREAM
                ):
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    total += struct.unpack_from("<Q", info, _BYTES_RECEIVED_AT)[0]
        except OSError:  # closed meanwhile, or not such a socket
            continue
    return total
