"""The verbs of `namr bench`: one small function each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from namr_dist.atomic import check_target
from namr_dist.errors import InputError


def add_parser(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], words: list[str]
) -> None:
    """Add `bench` and its verbs to the `namr` command.  words: the command line."""
    bench = verbs.add_parser(
        "bench", help="measure kernels, gathering, training, search and the way of images here"
    )
    bench_verbs = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    kernels = bench_verbs.add_parser(
        "kernels", help="time and memory of the losses compared with other implementations"
    )
    # The options live with the benchmark, which imports torch.
    if words[:2] == ["bench", "kernels"]:
        from namr_dist.kernels.bench.options import add_arguments

        add_arguments(kernels)
    kernels.set_defaults(verb=_bench_kernels)
    gather = bench_verbs.add_parser(
        "gather",
        help="bytes and time of a loss over many ranks",
        description="Bytes on the sockets and time of a loss over many CPU ranks, compared with a gather that "
        "autograd differentiates.",
    )
    gather.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="W", help="(2 4)")
    gather.add_argument(
        "--rows", type=int, default=1024, metavar="B", help="rows of the global batch (%(default)s)"
    )
    gather.add_argument(
        "--width", type=int, nargs="+", default=[128, 512], metavar="D", help="(128 512)"
    )
    gather.add_argument("--steps", type=int, default=10, help="measured steps (%(default)s)")
    gather.add_argument("--csv", type=Path, metavar="FILE", help="write the figures")
    gather.set_defaults(verb=_bench_gather)
    data = bench_verbs.add_parser(
        "data",
        help="images a second of one core",
        description="Images a second of one core, from shards to augmented batches, compared with plain WebDataset "
        "and torchvision's ImageFolder.",
    )
    data.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="a shard set (pictures of 320 to 500 px, made for the purpose)",
    )
    data.add_argument(
        "--images", type=int, default=400, metavar="N", help="images of a pass (%(default)s)"
    )
    data.add_argument(
        "--size", type=int, default=224, metavar="PIXELS", help="side of the result (%(default)s)"
    )
    data.add_argument(
        "--repeats", type=int, default=5, metavar="R", help="measured passes (%(default)s)"
    )
    data.add_argument("--csv", type=Path, metavar="FILE", help="write the figures")
    data.add_argument("--json", action="store_true", help="print JSON")
    data.set_defaults(verb=_bench_data)
    _add_train(bench_verbs)
    _add_search(bench_verbs)


def _add_train(bench_verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = bench_verbs.add_parser(
        "train",
        help="training end to end, and where its time goes",
        description="Real runs of `namr train` on this machine's first GPU, or its CPU: images a second, the time of "
        "each phase of a step, waiting for images, memory, and the loss next to its plain PyTorch form. Settings "
        "are changed as those of `namr train`, with --set.SECTION.FIELD VALUE. The smallest batch passes the backbone "
        "at once and larger ones in pieces of that size (--set.train.micro_batch changes it). Weights of timm: "
        "backbones are random.",
    )
    train.add_argument(
        "recipe", nargs="?", default="homeware", metavar="RECIPE", help="(%(default)s)"
    )
    train.add_argument("--shards", type=Path, metavar="FOLDER", help="a shard set (one is made)")
    train.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="training images of the set that is made (on a GPU "
        "59551 as in Stanford Online Products, on a CPU 2000)",
    )
    train.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="B",
        help="images of the global batch (GPU 512 4096 16384, CPU 64 128)",
    )
    train.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps that count, a multiple of 5 (GPU 40, CPU 5); "
        "those that do not come before them",
    )
    train.add_argument(
        "--precision", nargs="+", choices=("bf16", "fp32"), help="(GPU bf16, CPU fp32)"
    )
    train.add_argument("--csv", type=Path, metavar="FILE", help="write the figures, after each run")
    train.add_argument("--json", action="store_true", help="print JSON")
    train.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="profile a few more steps of the first batch; write "
        "a Chrome trace (packed, if the name ends in .gz)",
    )
    train.set_defaults(verb=_bench_train)


def _add_search(bench_verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    search = bench_verbs.add_parser(
        "search",
        help="seconds of an exact search",
        description="Seconds of an exact leave-one-out search among random rows in clusters, by every back end that "
        "works here, compared with faiss's plain index and a bare matrix product with its largest entries.",
    )
    search.add_argument("--queries", type=int, metavar="Q", help="(as many as items)")
    search.add_argument("--items", type=int, default=15000, metavar="N", help="(%(default)s)")
    search.add_argument("--width", type=int, nargs="+", default=[512], metavar="D", help="(512)")
    search.add_argument(
        "-k", type=int, nargs="+", default=[32], metavar="K", help="numbers of neighbours (32)"
    )
    search.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="torch-cpu, torch-gpu, faiss-cpu, faiss-gpu (all that work here)",
    )
    search.add_argument(
        "--repeats", type=int, default=3, metavar="R", help="measured searches (%(default)s)"
    )
    search.add_argument("--csv", type=Path, metavar="FILE", help="write the figures")
    search.add_argument("--json", action="store_true", help="print JSON")
    search.set_defaults(verb=_bench_search)


def _bench_kernels(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.kernels.bench.options import execute
    from namr_dist.kernels.bench.table import RefusedError

    try:
        execute(parsed)
    except RefusedError as error:
        raise InputError(str(error)) from None


def _bench_gather(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.bench.gather import measure, show, to_csv

    if parsed.csv:
        check_target("--csv", parsed.csv)
    for ranks in parsed.ranks:
        if ranks < 2 or parsed.rows % (4 * ranks):
            raise InputError(
                f"--rows {parsed.rows} cannot be shared by --ranks {ranks}; give at least 2 ranks, and "
                f"rows that are a multiple of {4 * max(ranks, 2)}"
            )
    measured = [
        one
        for ranks in parsed.ranks
        for width in parsed.width
        for one in measure(ranks=ranks, rows=parsed.rows, width=width, steps=parsed.steps)
    ]
    show(measured)
    if parsed.csv:
        to_csv(measured, parsed.csv)


def _bench_data(parsed: argparse.Namespace, _: list[str]) -> None:
    for name in ("images", "size", "repeats"):
        if getattr(parsed, name) < 1:
            raise InputError(f"--{name} is {getattr(parsed, name)}; set it to at least 1")
    if parsed.csv:
        check_target("--csv", parsed.csv)
    from namr_dist.bench.data import measure, show, to_csv

    benchmark = measure(
        parsed.folder, images=parsed.images, size=parsed.size, repeats=parsed.repeats
    )
    if parsed.json:
        print(json.dumps(benchmark.to_json(), indent=2))
    else:
        show(benchmark)
    if parsed.csv:
        to_csv(benchmark, parsed.csv)


def _bench_train(parsed: argparse.Namespace, overrides: list[str]) -> None:
    for name in ("csv", "trace"):
        if target := getattr(parsed, name):
            check_target(f"--{name}", target)
    if parsed.shards and parsed.images is not None:
        raise InputError(
            f"--images is {parsed.images}, which goes with a set that is made; leave out it or --shards"
        )
    import torch

    from namr_dist.bench.trace import Summary
    from namr_dist.bench.training import CPU, GPU, Work, measure
    from namr_dist.bench.training_show import show, to_csv, to_json

    usual = GPU if torch.cuda.is_available() else CPU
    work = Work(
        recipe=parsed.recipe,
        overrides=tuple(overrides),
        shards=parsed.shards,
        images=usual.images if parsed.images is None else parsed.images,
        batches=tuple(dict.fromkeys(parsed.batch or usual.batches)),
        steps=usual.steps if parsed.steps is None else parsed.steps,
        precisions=tuple(dict.fromkeys(parsed.precision or usual.precisions)),
        trace=parsed.trace,
    )
    work.check()
    measured, trace = [], None
    for one in measure(work):
        if isinstance(one, Summary):
            trace = one
            continue
        measured.append(one)
        if parsed.csv:
            to_csv(measured, parsed.csv)
    if parsed.json:
        print(json.dumps(to_json(measured, trace), indent=2))
    else:
        show(measured, trace)


def _bench_search(parsed: argparse.Namespace, _: list[str]) -> None:
    if parsed.repeats < 1 or min(parsed.width) < 1:
        raise InputError(
            f"--repeats is {parsed.repeats}, the least --width {min(parsed.width)}; set them to at least "
            "1"
        )
    if parsed.csv:
        check_target("--csv", parsed.csv)
    from namr_dist.bench.search import Case, measure, show, to_csv
    from namr_dist.retrieval.search import usable_backends

    usable = usable_backends()
    for name in parsed.backends or ():
        if name not in usable:
            raise InputError(
                f"--backends has {name}, which does not work here; take from {', '.join(usable)}"
            )
    queries = parsed.items if parsed.queries is None else parsed.queries
    measured = [
        one
        for width in parsed.width
        for k in parsed.k
        for one in measure(
            Case(queries=queries, items=parsed.items, width=width, k=k),
            parsed.backends or usable,
            repeats=parsed.repeats,
        )
    ]
    if parsed.json:
        print(json.dumps([one.to_row() for one in measured], indent=2))
    else:
        show(measured)
    if parsed.csv:
        to_csv(measured, parsed.csv)
