"""The verbs of `namr bench`: one small function each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from namr_dist.atomic import check_target
from namr_dist.errors import InputError


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser], words: list[str]) -> None:
    """Add `bench` and its verbs to the `namr` command.  words: the command line."""
    bench = verbs.add_parser("bench", help="measure kernels, gathering and the way of images on this machine")
    bench_verbs = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    kernels = bench_verbs.add_parser("kernels", help="time and memory of the losses beside other implementations")
    if words[:2] == ["bench", "kernels"]:  # the options live with the benchmark, which imports torch
        from namr_dist.kernels.bench.options import add_arguments

        add_arguments(kernels)
    kernels.set_defaults(verb=_bench_kernels)
    gather = bench_verbs.add_parser(
        "gather", help="bytes and time of a loss over many ranks",
        description="Bytes on the sockets and time of a loss over many CPU ranks, beside a gather that autograd "
        "differentiates.")
    gather.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="W", help="(2 4)")
    gather.add_argument("--rows", type=int, default=1024, metavar="B", help="rows of the global batch (%(default)s)")
    gather.add_argument("--width", type=int, nargs="+", default=[128, 512], metavar="D", help="(128 512)")
    gather.add_argument("--steps", type=int, default=10, help="measured steps (%(default)s)")
    gather.add_argument("--csv", type=Path, metavar="FILE", help="write the figures")
    gather.set_defaults(verb=_bench_gather)
    data = bench_verbs.add_parser(
        "data", help="images a second of one core",
        description="Images a second of one core, from shards to augmented batches, beside plain WebDataset and "
        "torchvision's ImageFolder.")
    data.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="a shard set (pictures of 320 to 500 px, "
                      "made for the purpose)")
    data.add_argument("--images", type=int, default=400, metavar="N", help="images of a pass (%(default)s)")
    data.add_argument("--size", type=int, default=224, metavar="PIXELS", help="side of the result (%(default)s)")
    data.add_argument("--repeats", type=int, default=5, metavar="R", help="measured passes (%(default)s)")
    data.add_argument("--csv", type=Path, metavar="FILE", help="write the figures")
    data.add_argument("--json", action="store_true", help="print JSON")
    data.set_defaults(verb=_bench_data)


def _bench_kernels(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.kernels.bench.options import execute
    from namr_dist.kernels.bench.table import Refused

    try:
        execute(parsed)
    except Refused as error:
        raise InputError(str(error)) from None


def _bench_gather(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.train.bench_gather import measure, show, to_csv

    if parsed.csv:
        check_target("--csv", parsed.csv)
    for ranks in parsed.ranks:
        if ranks < 2 or parsed.rows % (4 * ranks):
            raise InputError(f"--rows {parsed.rows} cannot be shared by --ranks {ranks}; give at least 2 ranks, and "
                             f"rows that are a multiple of {4 * max(ranks, 2)}")
    measured = [one for ranks in parsed.ranks for width in parsed.width
                for one in measure(ranks=ranks, rows=parsed.rows, width=width, steps=parsed.steps)]
    show(measured)
    if parsed.csv:
        to_csv(measured, parsed.csv)


def _bench_data(parsed: argparse.Namespace, _: list[str]) -> None:
    for name in ("images", "size", "repeats"):
        if getattr(parsed, name) < 1:
            raise InputError(f"--{name} is {getattr(parsed, name)}; set it to at least 1")
    if parsed.csv:
        check_target("--csv", parsed.csv)
    from namr_dist.data.bench.measure import measure, show, to_csv

    benchmark = measure(parsed.folder, images=parsed.images, size=parsed.size, repeats=parsed.repeats)
    if parsed.json:
        print(json.dumps(benchmark.to_json(), indent=2))
    else:
        show(benchmark)
    if parsed.csv:
        to_csv(benchmark, parsed.csv)
