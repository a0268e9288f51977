"""The `namr` command: one verb, one small function.

Verbs import what they need, so that --help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from namr_dist import __version__, cli_shards
from namr_dist.atomic import check_target
from namr_dist.config import Config
from namr_dist.errors import InputError

_OVERRIDE = "--set."
_PREFLIGHT_S = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for bad input, told in one line on stderr, or 75 for a
    training run that a signal ended and --resume goes on with."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed, overrides = _parse(words)
        return parsed.verb(parsed, overrides) or 0
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of the output (head, less) has left: nobody to tell, and nothing for Python to flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell counts SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _fail(f"{error.strerror}: {error.filename or 'no file named'}"
                     + ("; free some space or give another folder" if full else "; give another path"))
    except KeyboardInterrupt:
        return 130


def _fail(text: str) -> int:
    print(f"namr: error: {text}", file=sys.stderr, flush=True)
    return 2


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="namr", description="Train, evaluate and serve image-retrieval embeddings with NAMR.")
    parser.add_argument("--version", action="version", version=f"namr-dist {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = verbs.add_parser(
        "train", help="train a recipe", description="Train a recipe. Any of its settings can be changed with "
        "--set.SECTION.FIELD VALUE; --settings prints them all.")
    train.add_argument("recipe", metavar="RECIPE", help="name of a recipe, such as homeware")
    # Not --run: torchrun's own parser takes that for a shortened option of its own, wherever it stands.
    train.add_argument("--run-dir", type=Path, help="folder of the run (runs/RECIPE)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    existing.add_argument("--resume", action="store_true", help="go on with the run that is there from its newest "
                          "checkpoint; without one, begin")
    train.add_argument("--settings", action="store_true", help="print every setting with its meaning, and stop")
    train.add_argument("--dry-run", action="store_true", help="check what can be checked without starting, print how "
                       "to start, and stop")
    train.add_argument("--ranks", type=int, metavar="W", help="ranks that --dry-run checks for (as launched)")
    train.set_defaults(verb=_train)

    preflight = verbs.add_parser(
        "preflight", help="check the nodes of a job before it trains",
        description="Check, with one process a node, whether a recipe can train there: srun --ntasks-per-node=1 namr "
        "preflight RECIPE. Ends within 30 s, with exit code 0 or 2 on all nodes.")
    preflight.add_argument("recipe", metavar="RECIPE", help="name of a recipe, with --set… as for namr train")
    preflight.add_argument("--run-dir", type=Path, help="folder of the run (runs/RECIPE)")
    preflight.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks that will train on each node (one a "
                           "GPU, or one)")
    preflight.set_defaults(verb=_preflight)

    top = verbs.add_parser("top", help="watch a run", description="Progress, losses, speed and checkpoints of a run, "
                           "from any machine that sees its folder; live on a terminal, until it is finished or Ctrl-C.")
    top.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    top.add_argument("--once", action="store_true", help="print it once, also on a terminal")
    top.add_argument("--json", action="store_true", help="print it once, as JSON")
    top.set_defaults(verb=_top)

    evaluate = verbs.add_parser("evaluate", help="measure a trained run on its test split",
                                description="Measure a run on its test split: metrics.json, embeddings.safetensors.")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    _add_shards(evaluate)
    evaluate.add_argument("--split", metavar="NAME", help="another test split or subset; its files are "
                          "metrics-NAME.json and embeddings-NAME.safetensors")
    evaluate.add_argument("--recall-at", type=int, nargs="+", default=[], metavar="K", help="the k of R@k (as trained)")
    evaluate.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    evaluate.set_defaults(verb=_evaluate)

    report = verbs.add_parser("report", help="write a run's report.html, or one table over many runs",
                              description="Write a run's report.html. Of several runs, or a folder that holds runs: "
                              "one table with a row a setting, over its seeds, as text and as a page.")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of evaluated runs, or of runs")
    _add_shards(report)
    report.add_argument("--out", type=Path, metavar="FILE.html", help="the table's page (report.html in the folder "
                        "that holds the runs)")
    report.add_argument("--json", action="store_true", help="print the table as JSON")
    report.set_defaults(verb=_report)

    embed = verbs.add_parser("embed", help="embed images with a trained run",
                             description="Embed a split of a shard set, or a folder of images, into a safetensors "
                             "file with z, s (float32) and the images' names in its metadata.")
    embed.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    source = embed.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", metavar="FOLDER", help="a shard set, or its URL")
    source.add_argument("--images", type=Path, metavar="FOLDER", help="image files, searched recursively")
    embed.add_argument("--split", default="test", help="split of the shard set (%(default)s)")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help="the safetensors file to write")
    embed.set_defaults(verb=_embed)

    export = verbs.add_parser("export", help="write a trained network as plain files that need no DeepSpeed",
                              description="Write a trained run's network into a new folder with config.json and a "
                              "model card. Every file is read back and compared with the network.")
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    _add_shards(export)
    formats = ("safetensors", "torch", "onnx")
    export.add_argument("--formats", nargs="+", choices=formats, default=formats, metavar="FORMAT",
                        help="any of safetensors, torch (torch.export) and onnx; by default all")
    export.add_argument("--json", action="store_true", help="print JSON")
    export.set_defaults(verb=_export)

    cli_shards.add_parser(verbs)

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

    doctor = verbs.add_parser("doctor", help="what is installed, which fast paths are on, what to do about the rest")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--parity", action="store_true", help="instead, compare losses and gradients of 1, 2 and 4 CPU "
                        "ranks under DDP and ZeRO 0 to 3 with those of one process (minutes); exit code 1 if one "
                        "differs")
    doctor.add_argument("--csv", type=Path, metavar="FILE", help="write the figures of --parity")
    doctor.set_defaults(verb=_doctor)

    own, overrides = _split_overrides(words)
    parsed = parser.parse_args(own)
    if overrides and parsed.verb not in (_train, _preflight):
        parser.error(f"{overrides[0]} goes with `namr train` and `namr preflight`")
    return parsed, overrides


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", metavar="FOLDER", help="where the run's shard set is now, a folder or a URL (where "
                        "it was trained from)")


def _split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Words of `--set.section.field value…` apart from all others: an override's values end at the next option."""
    own: list[str] = []
    overrides: list[str] = []
    into = own
    for word in words:
        if word.startswith(_OVERRIDE):
            into = overrides
        elif word.startswith("--"):
            into = own
        into.append(word)
    return own, overrides


def configure(recipe: str, overrides: Sequence[str], *, show_help: bool = False) -> Config:
    """The recipe with its overrides.

    A wrong field or value ends the program with tyro's message and code 2, `show_help` with all settings and 0.
    """
    import tyro

    from namr_dist import recipes

    @dataclasses.dataclass(frozen=True)
    class Settings:
        set: Config

    base = recipes.find(recipe)
    words = ["--help"] if show_help else list(overrides)
    return tyro.cli(Settings, args=words, default=Settings(set=base), prog=f"namr train {recipe}",
                    config=(tyro.conf.FlagConversionOff,)).set


def _train(parsed: argparse.Namespace, overrides: list[str]) -> int:
    config = configure(parsed.recipe, overrides, show_help=parsed.settings)
    if parsed.dry_run:
        _dry_run(parsed, overrides, config)
        return 0
    if parsed.ranks is not None:
        raise InputError(f"--ranks is {parsed.ranks}, which goes with --dry-run; torchrun, deepspeed, srun or mpirun "
                         "say how many ranks train")
    from namr_dist.parallel.ranks import discover, shut_down
    from namr_dist.train.interrupt import EXIT_CODE
    from namr_dist.train.loop import train

    finished = train(config, parsed.run_dir or Path("runs") / config.recipe, discover(), overwrite=parsed.overwrite,
                     resume=parsed.resume)
    code = 0 if finished else EXIT_CODE
    shut_down(code)
    return code


def _dry_run(parsed: argparse.Namespace, overrides: list[str], config: Config) -> None:
    from namr_dist.parallel.ranks import read_launch
    from namr_dist.train.dry_run import dry_run

    launch = read_launch(os.environ)
    words = [parsed.recipe, *(["--run-dir", str(parsed.run_dir)] if parsed.run_dir else []),
             *(["--overwrite"] if parsed.overwrite else []), *(["--resume"] if parsed.resume else []), *overrides]
    lines = dry_run(config, parsed.run_dir or Path("runs") / config.recipe,
                    ranks=launch.world_size if parsed.ranks is None else parsed.ranks,
                    overwrite=parsed.overwrite, resume=parsed.resume, words=words)
    if launch.rank == 0:
        print("\n".join(lines))


def _preflight(parsed: argparse.Namespace, overrides: list[str]) -> None:
    from namr_dist.cluster.deadline import Deadline

    deadline = Deadline(_PREFLIGHT_S)  # before torch is imported, which may take long from a slow file system
    if parsed.ranks_per_node is not None and parsed.ranks_per_node < 1:
        raise InputError(f"--ranks-per-node is {parsed.ranks_per_node}; set it to at least 1")
    config = _configure_quietly(parsed.recipe, overrides)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # one line says what is wrong, and not torch's traces in C++
    from namr_dist.cluster.preflight import preflight

    try:
        code = preflight(config, parsed.run_dir or Path("runs") / parsed.recipe, ranks_per_node=parsed.ranks_per_node,
                         deadline=deadline)
    except InputError as error:
        code = _fail(str(error))
    sys.stderr.flush()
    os._exit(code)  # a call that hangs has left a thread behind, which the usual end would wait for


def _configure_quietly(recipe: str, overrides: list[str]) -> Config | InputError:
    """`configure`, but a mistake is returned in one line, for many nodes to tell once."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return configure(recipe, overrides)
    except InputError as error:
        return error
    except SystemExit:
        return InputError(re.sub(r"[\s─-╿]+", " ", said.getvalue()).strip())  # out of tyro's box


def _top(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.cluster.top import top

    top(parsed.run, once=parsed.once, as_json=parsed.json)


def _evaluate(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.retrieval.run import evaluate_run

    metrics = evaluate_run(parsed.run, shards=parsed.shards, split=parsed.split, recall_at=tuple(parsed.recall_at))
    if parsed.json:
        print(json.dumps(metrics, indent=2))
        return
    from rich.console import Console

    from namr_dist.retrieval.tables import results_table

    Console().print(results_table(metrics))


def _report(parsed: argparse.Namespace, _: list[str]) -> None:
    if len(parsed.runs) > 1 or any(parsed.runs[0].glob("*/config.json")) and not _is_run(parsed.runs[0]):
        _compare(parsed)
        return
    if parsed.out or parsed.json:
        raise InputError(f"{'--out' if parsed.out else '--json'} goes with several runs; {parsed.runs[0]} is one, or "
                         "holds none: give more, or leave it out")
    from namr_dist.retrieval.run import report_run

    print(report_run(parsed.runs[0], shards=parsed.shards))


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _compare(parsed: argparse.Namespace) -> None:
    if parsed.shards:
        raise InputError(f"--shards is {parsed.shards}, which goes with one run; leave it out")
    if parsed.out is None and len(parsed.runs) > 1:
        raise InputError("the table of several runs needs a place; give --out FILE.html")
    out = parsed.out or parsed.runs[0] / "report.html"
    check_target("--out", out)
    from namr_dist.retrieval.compare import compare, find_runs
    from namr_dist.retrieval.comparison_page import print_comparison, write_comparison

    comparison = compare(find_runs(parsed.runs))
    write_comparison(comparison, out)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(comparison), indent=2))
        return
    print_comparison(comparison)
    print(out)


def _embed(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.retrieval.run import embed_folder, embed_shards

    check_target("--out", parsed.out)
    count = (embed_shards(parsed.run, parsed.shards, parsed.split, parsed.out) if parsed.shards is not None
             else embed_folder(parsed.run, parsed.images, parsed.out))
    print(f"{count} images → {parsed.out}")


def _export(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.retrieval.export import export_run

    exported = export_run(parsed.run, parsed.out, parsed.formats, shards=parsed.shards)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(exported), indent=2, default=str))
        return
    for file, size in exported.size_bytes.items():
        compared = f"  differs from the network by {exported.differences[file]:.1e} at most" \
            if file in exported.differences else ""
        print(f"{exported.folder / file}  {size / 2**20:.1f} MiB{compared}")


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


def _doctor(parsed: argparse.Namespace, _: list[str]) -> int:
    from namr_dist import doctor

    if parsed.parity:
        return doctor.parity(as_json=parsed.json, csv=parsed.csv)
    if parsed.csv:
        raise InputError(f"--csv is {parsed.csv}, which goes with --parity; add it")
    findings = doctor.examine()
    if parsed.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        doctor.show(findings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
