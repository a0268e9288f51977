"""The `namr` command: one verb, one small function.

Verbs import what they need, so that --help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from namr_dist import __version__
from namr_dist.config import Config
from namr_dist.errors import InputError

_OVERRIDE = "--set."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, or 2 for bad input, told in one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed, overrides = _parse(words)
        parsed.verb(parsed, overrides)
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _fail(f"{error.strerror}: {error.filename or 'no file named'}"
                     + ("; free some space or give another folder" if full else "; give another path"))
    except KeyboardInterrupt:
        return 130
    return 0


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
    train.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    train.add_argument("--settings", action="store_true", help="print every setting with its meaning, and stop")
    train.set_defaults(verb=_train)

    evaluate = verbs.add_parser("evaluate", help="measure a trained run on its test split",
                                description="Measure a run on its test split: metrics.json, embeddings.safetensors.")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    evaluate.add_argument("--json", action="store_true", help="print metrics.json instead of a table")
    evaluate.set_defaults(verb=_evaluate)

    report = verbs.add_parser("report", help="write a run's report.html")
    report.add_argument("run", type=Path, metavar="RUN", help="folder of an evaluated run")
    report.set_defaults(verb=_report)

    embed = verbs.add_parser("embed", help="embed images with a trained run",
                             description="Embed a split of a shard set, or a folder of images, into a safetensors "
                             "file with z, s (float32) and the images' names in its metadata.")
    embed.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    source = embed.add_mutually_exclusive_group(required=True)
    source.add_argument("--shards", type=Path, metavar="FOLDER", help="a shard set")
    source.add_argument("--images", type=Path, metavar="FOLDER", help="image files, searched recursively")
    embed.add_argument("--split", default="test", help="split of the shard set (%(default)s)")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help="the safetensors file to write")
    embed.set_defaults(verb=_embed)

    shards = verbs.add_parser("shards", help="verify shard sets, show their statistics")
    shard_verbs = shards.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, verb, text in (("verify", _shards_verify, "hash every shard and decode every image"),
                             ("stats", _shards_stats, "count images and classes by split")):
        entry = shard_verbs.add_parser(name, help=text)
        entry.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="the shard set (homeware)")
    export = verbs.add_parser("export", help="write a trained network as plain files that need no DeepSpeed",
                              description="Write a trained run's network into a new folder with config.json and a "
                              "model card. Every file is read back and compared with the network.")
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    formats = ("safetensors", "torch", "onnx")
    export.add_argument("--formats", nargs="+", choices=formats, default=formats, metavar="FORMAT",
                        help="any of safetensors, torch (torch.export) and onnx; by default all")
    export.add_argument("--json", action="store_true", help="print JSON")
    export.set_defaults(verb=_export)

        entry.add_argument("--json", action="store_true", help="print JSON")
        entry.set_defaults(verb=verb)

    bench = verbs.add_parser("bench", help="measure the kernels on this machine")
    bench_verbs = bench.add_subparsers(title="commands", metavar="COMMAND", required=True)
    kernels = bench_verbs.add_parser("kernels", help="time and memory of the losses beside other implementations")
    if words[:2] == ["bench", "kernels"]:  # the options live with the benchmark, which imports torch
        from namr_dist.kernels.bench.options import add_arguments

        add_arguments(kernels)
    kernels.set_defaults(verb=_bench_kernels)

    doctor = verbs.add_parser("doctor", help="what is installed, which fast paths are on, what to do about the rest")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(verb=_doctor)

    own, overrides = _split_overrides(words)
    parsed = parser.parse_args(own)
    if overrides and parsed.verb is not _train:
        parser.error(f"{overrides[0]} goes with `namr train`")
    return parsed, overrides


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


def _train(parsed: argparse.Namespace, overrides: list[str]) -> None:
    config = configure(parsed.recipe, overrides, show_help=parsed.settings)
    from namr_dist.parallel.ranks import discover, shut_down
    from namr_dist.train.loop import train

    train(config, parsed.run_dir or Path("runs") / config.recipe, discover(), overwrite=parsed.overwrite)
    shut_down()


def _evaluate(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.retrieval.run import evaluate_run

    metrics = evaluate_run(parsed.run)
    if parsed.json:
        print(json.dumps(metrics, indent=2))
        return
    from rich.console import Console

    from namr_dist.retrieval.tables import results_table

    Console().print(results_table(metrics))


def _report(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.retrieval.run import report_run

    print(report_run(parsed.run))


def _embed(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.retrieval.run import embed_folder, embed_shards

    if parsed.out.is_dir() or not parsed.out.parent.is_dir():
        raise InputError(f"--out {parsed.out} is not a file in a folder that exists; give one")
    count = (embed_shards(parsed.run, parsed.shards, parsed.split, parsed.out) if parsed.shards
             else embed_folder(parsed.run, parsed.images, parsed.out))
    print(f"{count} images → {parsed.out}")


def _shards_verify(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.data.formats.homeware import open_shards
    from namr_dist.data.shards import verify_shards

    manifest = open_shards(parsed.folder)
    images = verify_shards(manifest, manifest.splits, decode=True)
    if parsed.json:
        print(json.dumps({"name": manifest.name, "shards": len(manifest.shards), "images": images}))
    else:
        print(f"{manifest.name}: {images} images in {len(manifest.shards)} shards, all as the manifest says")


def _shards_stats(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.data.formats.homeware import open_shards
    from namr_dist.data.manifest import statistics

    figures = statistics(open_shards(parsed.folder))
    if parsed.json:
        print(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(figures["name"]))
    rows = figures["splits"]
    for column in ("split", *next(iter(rows.values()))):
        table.add_column(column.replace("_", " "), justify="left" if column == "split" else "right")
    for split, row in rows.items():
        table.add_row(split, *(f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    Console().print(table)


def _bench_kernels(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.kernels.bench.options import execute
    from namr_dist.kernels.bench.table import Refused

    try:
        execute(parsed)
    except Refused as error:
        raise InputError(str(error)) from None

def _export(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.retrieval.export import export_run

    exported = export_run(parsed.run, parsed.out, parsed.formats)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(exported), indent=2, default=str))
        return
    for file, size in exported.size_bytes.items():
        compared = f"  differs from the network by {exported.differences[file]:.1e} at most" \
            if file in exported.differences else ""
        print(f"{exported.folder / file}  {size / 2**20:.1f} MiB{compared}")



def _doctor(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist import doctor

    findings = doctor.examine()
    if parsed.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        doctor.show(findings)


if __name__ == "__main__":
    sys.exit(main())
