"""The largest batch that a loss finishes on a GPU: rows are doubled until its memory is full or a
pass takes too long.

    python tools/largest_batch.py --width 512 --csv docs/results/largest-batch-h200.csv
    python tools/largest_batch.py --width 128 --csv docs/results/largest-batch-h200.csv

At each size one forward and backward pass is timed, after one that is not, and its peak memory
taken, the gradients included. Then the gradient of a few rows is compared with float64 computed for
those rows alone, the way a rank computes its own: blocked PyTorch gets these rows, all candidates,
and what every other row exchanges (statistics, or mined pairs) from the pass itself. Errors are
relative to the largest number; a row beyond BOUND has a near tie decided the other way and is
counted instead, and what the sampled rows exchange themselves is compared too.
"""

from __future__ import annotations

import argparse
import csv
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from namr_dist import kernels
from namr_dist.kernels.bench.cases import (
    CLUSTERS,
    DTYPES,
    PER_CLASS,
    POSITIVES,
    Batch,
    Case,
    make_batch,
)
from namr_dist.kernels.bench.gate import GRADIENT_BOUND
from namr_dist.kernels.bench.machine import describe
from namr_dist.kernels.bench.measure import Stopwatch, clear_gradients, run_pass
from namr_dist.kernels.bench.memory import cuda_peak_mib, resident_peak_mib
from namr_dist.kernels.bench.providers import OURS

SAMPLED = 32
"""Rows whose gradient is compared, from the middle of the batch."""

OfRows = Callable[[Batch, Batch, int, kernels.Gather], tuple[Tensor | None, ...]]
"""(the local rows, all rows, offset, gather) -> loss and gradients of the local rows."""

OF_ROWS: dict[str, OfRows] = {
    "triplet-hardest": lambda some, all_, offset, gather: kernels.triplet_of_rows(
        *some.leaves,
        some.labels_B,
        *all_.leaves,
        all_.labels_B,
        offset=offset,
        gather=gather,
        margin=0.2,
        mining="hardest",
        seed=0,
        most_positives=POSITIVES,
        with_grad=True,
    ),
    "multi-similarity": lambda some, all_, offset, gather: kernels.multi_similarity_of_rows(
        *some.leaves,
        some.labels_B,
        *all_.leaves,
        all_.labels_B,
        offset=offset,
        gather=gather,
        alpha=2.0,
        beta=50.0,
        base=0.5,
        epsilon=0.1,
        with_grad=True,
    ),
    "multi-cluster-ranking": lambda some, all_, offset, gather: kernels.ranking_of_rows(
        *some.leaves,
        *all_.leaves,
        offset=offset,
        gather=gather,
        clusters=CLUSTERS,
        spread=3.0,
        floor=0.2,
        sharpness=10.0,
        statistics="batch",
        with_grad=True,
    ),
}
"""The losses, from the cheapest; with the defaults of the ops."""


@dataclass(frozen=True)
class Measured:
    """One size of one loss, and why the next was not tried; nothing but the note where it did not
    finish."""

    loss: str
    dtype: str
    B: int
    D: int
    seconds: float | None = None
    peak_extra_mib: float | None = None
    gradient_error: float | None = None
    exchanged_error: float | None = None
    rows_compared: int | None = None
    rows_apart: int | None = None
    note: str = ""


class Replay:
    """A gather that answers with what all rows exchanged in another pass, the local rows' own put
    in their place."""

    def __init__(self, exchanged: list[Tensor], rows: slice) -> None:
        self.exchanged, self.rows = iter(exchanged), rows
        self.error = 0.0

    def __call__(self, local: Tensor) -> Tensor:
        """The next tensor that all rows exchanged, with `local` in its place; keeps the largest
        error."""
        whole = next(self.exchanged).to(local.dtype, copy=True)
        if local.is_floating_point():
            self.error = max(self.error, largest_error(whole[self.rows], local))
        whole[self.rows] = local
        return whole


def largest_error(actual: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float(
        (actual - wanted).abs().max()
        / wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    )


def compare(case: Case, batch: Batch, exchanged: list[Tensor]) -> dict[str, float | int]:
    """The gradients in the batch's leaves beside float64, for SAMPLED rows."""
    first = case.rows // 2
    rows = slice(first, first + min(SAMPLED, case.rows - first))
    exact = Batch(
        labels_B=batch.labels_B, leaves=tuple(leaf.detach().double() for leaf in batch.leaves)
    )
    some = Batch(labels_B=exact.labels_B[rows], leaves=tuple(leaf[rows] for leaf in exact.leaves))
    replay = Replay(exchanged, rows)
    _, *gradients = OF_ROWS[case.loss](some, exact, first, replay)
    errors, apart = [0.0], 0
    for leaf, wanted in zip(batch.leaves, gradients, strict=True):
        assert leaf.grad is not None and wanted is not None
        gradient = leaf.grad[rows].double()
        near = (gradient - wanted).abs().amax(1) <= GRADIENT_BOUND[case.dtype] * wanted.abs().max()
        apart += int((~near).sum())
        if near.any():
            errors.append(largest_error(gradient[near], wanted[near]))
    return {
        "gradient_error": max(errors),
        "exchanged_error": replay.error,
        "rows_apart": apart,
        "rows_compared": len(batch.leaves) * (rows.stop - rows.start),
    }


def measure(case: Case) -> Measured:
    """One size.  Raises OutOfMemoryError."""
    device = torch.device(case.device)
    batch, watch = make_batch(case), Stopwatch(device)
    exchanged: list[Tensor] = []

    def recorded(local: Tensor) -> Tensor:
        exchanged.append(local)
        return local

    detached = Batch(labels_B=batch.labels_B, leaves=tuple(leaf.detach() for leaf in batch.leaves))
    # Loads libraries.
    run_pass(OURS[case.loss], batch.head(min(case.rows, 8 * PER_CLASS)).leaf_copy())
    OF_ROWS[case.loss](detached, detached, 0, recorded)  # also compiles
    timed: list[float] = []

    def one_pass() -> None:
        timed.append(watch(lambda: run_pass(OURS[case.loss], batch)).ms / 1000)

    clear_gradients(batch)
    peak = cuda_peak_mib(one_pass, device) if device.type == "cuda" else resident_peak_mib(one_pass)
    return Measured(
        case.loss,
        case.dtype,
        case.rows,
        case.width,
        timed[0],
        peak,
        **compare(case, batch, exchanged),
    )


def double(
    loss: str,
    *,
    width: int,
    dtype: str,
    rows: int,
    most_rows: int,
    limit_s: float,
    device: str,
    keep: Callable[[Measured], None],
) -> None:
    """Measure a loss at B = rows, 2·rows, …; `keep` gets each size as it is done."""
    while rows <= most_rows:
        case = Case(loss=loss, rows=rows, width=width, dtype=dtype, device=device)
        try:
            measured = measure(case)
        except torch.OutOfMemoryError:
            measured = Measured(loss, dtype, rows, width, note="out of memory")
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        rows *= 2
        if measured.seconds is not None and 4 * measured.seconds > limit_s:  # four times the pairs
            measured = replace(
                measured, note=f"{rows:,} rows would take some {4 * measured.seconds:.0f} s"
            )
        elif measured.seconds is not None and rows > most_rows:
            measured = replace(measured, note="more not tried")
        keep(measured)
        if measured.note:
            return


def main() -> None:
    """Measure the losses one after another, and append a row to the file as each size is done."""
    parser = argparse.ArgumentParser(description="The largest batch that a loss finishes.")
    parser.add_argument("--losses", nargs="+", choices=OF_ROWS, default=list(OF_ROWS), help="(all)")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="(%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument(
        "--rows", type=int, default=65536, metavar="B", help="to begin with (%(default)s)"
    )
    parser.add_argument(
        "--most-rows", type=int, default=2**22, metavar="B", help="to end with (%(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="a pass that would take longer is not tried (%(default)s)",
    )
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    parser.add_argument(
        "--csv", type=Path, required=True, metavar="FILE", help="where rows are appended"
    )
    options = parser.parse_args()
    where = describe(torch.device(options.device))
    options.csv.parent.mkdir(parents=True, exist_ok=True)

    def keep(measured: Measured) -> None:
        line = where | {
            name: "" if value is None else value for name, value in asdict(measured).items()
        }
        with options.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, line, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(line)
        print(measured, flush=True)

    for loss in options.losses:
        double(
            loss,
            width=options.width,
            dtype=options.dtype,
            rows=options.rows,
            most_rows=options.most_rows,
            limit_s=options.seconds,
            device=options.device,
            keep=keep,
        )


if __name__ == "__main__":
    main()
