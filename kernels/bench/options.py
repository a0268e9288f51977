"""The command line of the benchmark, shared by `namr bench kernels` and `python -m
namr_dist.kernels.bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from .cases import DTYPES, LOSSES, PASSES, PER_CLASS, Case
from .providers import PROVIDERS, available
from .table import RefusedError, check_csv, render

DESCRIPTION = (
    "Time and memory of the losses beside plain PyTorch, torch.compile, loops and pytorch-metric-learning: "
    "interleaved, and only after each has shown that it computes the same."
)
ROWS = {"cuda": [4096, 16384], "cpu": [512, 2048]}
WIDTHS = {"cuda": [128, 512], "cpu": [128]}


def _rows(text: str) -> int:
    rows = _count(text)
    if rows < 2 * PER_CLASS or rows % PER_CLASS:
        raise argparse.ArgumentTypeError(
            f"{rows} rows are no whole classes of {PER_CLASS} images, two classes at "
            f"least; give a multiple of {PER_CLASS} from {2 * PER_CLASS} on"
        )
    return rows


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ROWS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device of this benchmark; give cpu or cuda"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"there is no {text} here (GPUs: {torch.cuda.device_count()}); give cpu"
        )
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "--rows",
        type=_rows,
        nargs="+",
        metavar="B",
        help="batch sizes (cpu 512 2048, cuda 4096 16384)",
    )
    parser.add_argument(
        "--width", type=_count, nargs="+", metavar="D", help="widths (cpu 128, cuda 128 512)"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), nargs="+", default=["float32"], help="(float32)"
    )
    parser.add_argument(
        "--losses", choices=list(LOSSES), nargs="+", default=list(LOSSES), help="(all)"
    )
    parser.add_argument(
        "--providers",
        choices=PROVIDERS,
        nargs="+",
        default=list(available()),
        help="(all that are installed)",
    )
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=list(PASSES), help="(all)")
    parser.add_argument(
        "--samples", type=_count, default=30, metavar="N", help="rounds (%(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=_count,
        default=10,
        metavar="SECONDS",
        help="what the rounds of one provider may take in a case; a slower one takes part in fewer "
        "(%(default)s)",
    )
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        default=Path("runs/bench/kernels.csv"),
        metavar="FILE",
        help="where rows are appended (%(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the rows as JSON instead of the table"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="measure nothing; draw this CSV")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where plots go (the CSV's folder)"
    )


def execute(options: argparse.Namespace) -> None:
    """Do what the options say.  Raises RefusedError, in one line, for what cannot be done."""
    if options.plot:
        from .plot import draw

        for path in draw(options.plot, options.out or options.plot.parent):
            print(path)
        return
    if options.out:
        raise RefusedError("--out goes with --plot; rows are written to --csv")
    if "pml" in options.providers and "pml" not in available():
        raise RefusedError(
            "pml needs pytorch-metric-learning: pip install 'namr-dist[bench]', or leave it out"
        )
    check_csv(options.csv)
    from .run import run

    kind = torch.device(options.device).type
    cases = [
        Case(loss=loss, rows=rows, width=width, dtype=dtype, device=options.device)
        for dtype in options.dtype
        for loss in options.losses
        for width in options.width or WIDTHS[kind]
        for rows in options.rows or ROWS[kind]
    ]
    rows = run(
        cases,
        options.providers,
        passes=[part for part in PASSES if part in options.passes],
        samples=options.samples,
        budget_s=options.budget,
        csv=options.csv,
    )
    print(json.dumps(rows, indent=1) if options.json else f"{_title(rows[0])}\n{render(rows)}")


def _title(row: dict[str, str | int | float | None]) -> str:
    return f"{row['device']}, {row['platform']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}"
