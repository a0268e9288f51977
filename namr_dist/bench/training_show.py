"""The figures of `namr bench train` for people and for programs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from namr_dist.bench.trace import Summary
from namr_dist.bench.training import Measured, Value
from namr_dist.csv_file import write_csv
from namr_dist.kernels.bench.machine import describe
from namr_dist.kernels.bench.measure import Spread
from namr_dist.terminal import Console

_BUSY = 0.95
"""Below this share of the time without waiting for images, it is said what limits training."""
_NAME_WIDTH = 100
_WIDTH = 160


def rows(measured: Sequence[Measured]) -> list[dict[str, Value]]:
    """A row a run, with the columns that say where it was made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about: dict[str, Value] = {**describe(device), "cores": len(os.sched_getaffinity(0))}
    return [{**about, **one.row()} for one in measured]


def to_csv(measured: Sequence[Measured], path: Path) -> None:
    """Write the rows, whole, in place of those before."""
    write_csv(path, rows(measured))


def to_json(measured: Sequence[Measured], trace: Summary | None) -> dict[str, Any]:
    """The rows, and what the trace says."""
    return {"rows": rows(measured), "trace": trace and dataclasses.asdict(trace)}


def show(measured: Sequence[Measured], trace: Summary | None) -> None:
    """Print the figures: medians, and 20th to 80th percentile of the speed."""
    config, about = measured[0].config, rows(measured[:1])[0]
    # A file or a pipe has no width, and Rich would take 80 columns.
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    table = Table(
        title=f"{config.recipe}: {config.model.backbone}, {config.data.image_size} px, "
        f"{config.data.workers} workers; {about['device']}, {about['cores']} cores, torch {about['torch']}",
        title_justify="left",
    )
    for heading in (
        "batch",
        "type",
        "images/s",
        "ms/step",
        "data",
        "forward",
        "heads",
        "gather",
        "loss",
        "backward",
        "optimizer",
        "waits",
        "GiB",
        "loss share",
        "eager",
    ):
        table.add_column(heading, justify="right")
    for one in measured:
        table.add_row(*_cells(one))
    console.print(table)
    console.print(
        f"The workers alone make {measured[0].workers_img_per_s:.0f} images/s. waits: share of the time "
        "without an image to train on. eager: the loss's share, were it the plain PyTorch form.",
        highlight=False,
    )
    for line in (line for one in measured for line in _remarks(one)):
        console.print(line, highlight=False, markup=False)
    if trace:
        _show_trace(console, trace)


def _cells(one: Measured) -> list[str]:
    figures = one.figures
    if figures is None:
        return [str(one.batch), one.precision, "–"]
    share, eager_share = one.loss_shares
    speed = figures.img_per_s
    return [
        str(one.batch),
        one.precision,
        f"{speed.median:.0f} [{speed.p20:.0f}–{speed.p80:.0f}]",
        _ms(figures.step_ms),
        *(_ms(spread) for spread in figures.phases_ms.values()),
        f"{100 * figures.idle_share:.1f} %",
        f"{figures.peak_mib / 1024:.2f}",
        *("–" if part is None else f"{100 * part:.1f} %" for part in (share, eager_share)),
    ]


def _ms(spread: Spread) -> str:
    return f"{spread.median:.0f}" if spread.median >= 10 else f"{spread.median:.2g}"


def _remarks(one: Measured) -> list[str]:
    """What a reader should know of a run, a line each."""
    name, figures, note = f"batch {one.batch}, {one.precision}: ", one.figures, one.row()["note"]
    lines = [f"{name}{note}"] if note else []
    if figures and figures.idle_share > 1 - _BUSY:
        lines.append(
            f"{name}waits for images: without that it would train {figures.device_img_per_s:.0f} images/s, "
            f"and the workers alone make {one.workers_img_per_s:.0f}"
        )
    return lines


def _show_trace(console: Console, trace: Summary) -> None:
    kind = (
        "kernels and copies of the GPU"
        if trace.on_device
        else "operators on the CPU, without those they call"
    )
    table = Table(
        title=f"{trace.steps} steps under the profiler, {trace.span_ms:.0f} ms: {kind}; one or more ran "
        f"{100 * trace.busy_share:.1f} % of the time",
        title_justify="left",
    )
    for heading in ("name", "calls", "ms", "share"):
        table.add_column(heading, justify="left" if heading == "name" else "right")
    for one in trace.top:
        table.add_row(
            escape(one.name[:_NAME_WIDTH]),
            str(one.calls),
            f"{one.ms:.1f}",
            f"{100 * one.share:.1f} %",
        )
    console.print(table)
    if torch.cuda.is_available() and not trace.on_device:
        console.print(
            "The profiler saw nothing of the GPU; its library (CUPTI) may not be allowed to."
        )
