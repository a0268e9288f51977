"""The verbs of `namr shards`: one small function each."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from namr_dist import named_code
from namr_dist.atomic import check_target, write_atomic
from namr_dist.errors import InputError
from namr_dist.text import say

if TYPE_CHECKING:
    from namr_dist.data.build.build import Built

_SHOWN_PROBLEMS = 20


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `shards` and its verbs to the `namr` command."""
    shards = verbs.add_parser(
        "shards", help="build, verify and stage shard sets, show their statistics"
    )
    shard_verbs = shards.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_build(shard_verbs)
    verify = shard_verbs.add_parser(
        "verify",
        help="hash every shard, decode every image, compare each tar with the manifest",
        description="Hash "
        "every shard, decode every image, compare every tar with the manifest, and look for images that stand in two "
        "splits. All problems are told.",
    )
    stats = shard_verbs.add_parser("stats", help="count images and classes by split")
    for entry, verb in ((verify, _shards_verify), (stats, _shards_stats)):
        entry.add_argument(
            "folder", nargs="?", metavar="FOLDER", help="the shard set, or its URL (homeware)"
        )
        entry.add_argument("--json", action="store_true", help="print JSON")
        entry.set_defaults(verb=verb)
    stats.add_argument(
        "--images", action="store_true", help="read every image's header for its size"
    )
    stats.add_argument(
        "--near-duplicates",
        action="store_true",
        help="look for images that show what an image of another split shows",
    )
    stats.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="write the histogram of images per class"
    )
    stage = shard_verbs.add_parser(
        "stage",
        help="copy a shard set to this machine's own disk",
        description="Copy a shard set to this machine's "
        "own disk, hash every shard there, and print the folder to train from. What is there and whole is not copied "
        "again.",
    )
    stage.add_argument("folder", metavar="FOLDER", help="the shard set, or its URL")
    stage.add_argument(
        "to",
        type=Path,
        metavar="TO",
        help="a folder on the disk; each set and version has its own in it",
    )
    stage.add_argument(
        "--splits",
        nargs="+",
        default=(),
        metavar="NAME",
        help="splits or subsets whose shards are copied (all)",
    )
    stage.set_defaults(verb=_shards_stage)


def _add_build(shard_verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = shard_verbs.add_parser(
        "build",
        help="make a shard set from an original download or a folder of images",
        description="Make a shard set from an original download, or from a user's own images. Every image is decoded; "
        "those that are upright RGB or greyscale JPEGs keep their bytes. A build that broke off goes on when the same "
        "command is given again.",
    )
    build.add_argument(
        "format",
        metavar="FORMAT",
        help="one of sop, inshop, cub, cars, vehicleid, letters and folder, or "
        "module:NAME for a converter of your own, a function of SOURCE that returns a Listing",
    )
    build.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="the unpacked download; for folder, a folder of class folders or a CSV table; for "
        "letters, a new folder that its pictures are drawn into",
    )
    build.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    build.add_argument(
        "--allow-counts",
        action="store_true",
        help="build what is there, whatever the numbers of images and classes of the full set",
    )
    build.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave broken images out, and list them in skipped.csv",
    )
    build.add_argument("--highres", action="store_true", help="of inshop, the larger images")
    build.add_argument(
        "--size", type=int, metavar="PX", help="shrink images whose shorter side is longer"
    )
    build.add_argument(
        "--quality",
        type=int,
        default=95,
        metavar="Q",
        help="of JPEGs that are encoded again (%(default)s)",
    )
    build.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the training classes that make a split val (%(default)s)",
    )
    build.add_argument(
        "--shard-mib",
        type=float,
        default=128.0,
        metavar="MIB",
        help="about the size of a shard (%(default)s)",
    )
    build.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the order of classes and of those for validation (%(default)s)",
    )
    build.add_argument("--workers", type=int, metavar="N", help="processes (as many as cores)")
    build.add_argument("--json", action="store_true", help="print JSON")
    build.set_defaults(verb=_shards_build)


def _shards_build(parsed: argparse.Namespace, _: list[str]) -> None:
    _check_build(parsed)
    from namr_dist.data.build.build import BuildOptions, build
    from namr_dist.data.build.converters import read_source
    from namr_dist.data.build.normalise import Encoding
    from namr_dist.data.shardset.statistics import statistics

    named_code.allow([parsed.format])
    listing = read_source(parsed.format, parsed.source, highres=parsed.highres)
    if different := listing.differences():
        if not parsed.allow_counts:
            raise InputError(
                f"{parsed.source} is not the full set: {'; '.join(different)}; unpack the download again, "
                "or add --allow-counts to build what is there"
            )
        for line in different:
            say(f"WARNING: {line}", file=sys.stderr)
    for line in listing.notes:
        say(f"WARNING: {line}", file=sys.stderr)
    options = BuildOptions(
        encoding=Encoding(size=parsed.size, quality=parsed.quality),
        shard_mib=parsed.shard_mib,
        seed=parsed.seed,
        validation=parsed.validation,
    )
    built = build(
        listing,
        parsed.out,
        options,
        workers=parsed.workers or len(os.sched_getaffinity(0)),
        skip_broken=parsed.skip_broken,
    )
    rows = statistics(built.manifest)["splits"]
    if built.lost:
        say(
            f"WARNING: {len(built.lost)} classes have no whole image and are left out: {', '.join(built.lost)}",
            file=sys.stderr,
        )
    if parsed.json:
        print(
            json.dumps(
                {
                    "name": listing.name,
                    "description": listing.description,
                    "folder": str(parsed.out),
                    "splits": rows,
                    "treated": built.treated,
                    "skipped": built.skipped,
                    "lost": built.lost,
                    "was_there": built.was_there,
                },
                indent=2,
            )
        )
    else:
        _show_build(built, rows)


def _check_build(parsed: argparse.Namespace) -> None:
    """Raise InputError for options that no build can use."""
    if parsed.highres and parsed.format != "inshop":
        raise InputError(f"--highres goes with inshop, not {parsed.format}; leave it out")
    for name, good, remedy in (
        ("size", parsed.size is None or parsed.size >= 1, "at least 1"),
        ("quality", 1 <= parsed.quality <= 100, "1 to 100"),
        ("validation", 0 <= parsed.validation < 1, "a share of at least 0 and below 1"),
        ("shard-mib", 0.001 <= parsed.shard_mib < 2**20, "at least 0.001 and below 1048576"),
        ("seed", parsed.seed >= 0, "at least 0"),
        ("workers", parsed.workers is None or parsed.workers >= 1, "at least 1"),
    ):
        if not good:
            raise InputError(f"--{name} is {vars(parsed)[name.replace('-', '_')]}; give {remedy}")
    source, out = parsed.source.resolve(), parsed.out.resolve()
    if source in (out, *out.parents) or out in source.parents:
        raise InputError(
            f"--out {parsed.out} and {parsed.source} are one folder or lie one in the other, where the "
            "shards would be among the images; give another folder"
        )


def _show_build(built: Built, rows: dict[str, dict]) -> None:
    from rich.table import Table

    from namr_dist.terminal import Console, plain

    manifest = built.manifest
    if built.was_there:
        say(f"{manifest.folder} holds this very set already; nothing was done")
    table = Table(title=plain(f"{manifest.name}: {manifest.folder}"))
    for column in ("split", "images", "classes", "shards", "MiB"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, row in rows.items():
        counts = (f"{row[name]:,}" for name in ("images", "classes", "shards"))
        table.add_row(plain(split), *counts, f"{row['mib']:,.1f}")
    Console().print(table)
    say(
        "images: "
        + ", ".join(f"{number:,} {treatment}" for treatment, number in built.treated.items())
    )
    if built.skipped:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in built.skipped.items())
        say(f"left out: {kinds}; {manifest.folder / 'skipped.csv'} lists them")


def _shards_verify(parsed: argparse.Namespace, _: list[str]) -> int:
    from namr_dist.data.location import open_shards
    from namr_dist.data.shardset.statistics import statistics
    from namr_dist.data.shardset.verify import unnamed_tars, verify

    manifest = open_shards(parsed.folder)
    rows = statistics(manifest)["splits"]
    images = sum(row["images"] for row in rows.values())
    with _bar("images", images) as advance:
        verified = verify(manifest, advance=advance)
    problems = verified.problems
    strays = unnamed_tars(manifest)
    for file in strays:
        say(
            f"WARNING: {manifest.folder / file} is not in the manifest; move it elsewhere",
            file=sys.stderr,
        )
    for line in verified.shared[:_SHOWN_PROBLEMS]:
        say(f"WARNING: {line}", file=sys.stderr)
    if len(verified.shared) > _SHOWN_PROBLEMS:
        say(f"WARNING: {len(verified.shared)} images are in two splits in all", file=sys.stderr)
    if parsed.json:
        print(
            json.dumps(
                {
                    "name": manifest.name,
                    "shards": len(manifest.shards),
                    "images": images,
                    "splits": {
                        split: {name: row[name] for name in ("images", "classes", "shards")}
                        for split, row in rows.items()
                    },
                    "problems": problems,
                    "shared_images": verified.shared,
                    "unnamed_tars": strays,
                },
                indent=2,
            )
        )
    if problems:
        if len(problems) == 1:
            raise InputError(problems[0])
        say(
            f"namr: error: {len(problems)} problems in {manifest.folder}:",
            *(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]),
            *(["  …"] if len(problems) > _SHOWN_PROBLEMS else []),
            file=sys.stderr,
        )
        return 2
    if not parsed.json:
        say(
            f"{manifest.name}: {images} images in {len(manifest.shards)} shards, all as the manifest says"
        )
        for split, row in rows.items():
            say(
                f"  {split}: images {row['images']:,}, classes {row['classes']:,}, shards {row['shards']:,}"
            )
    return 0


def _shards_stats(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.data.location import open_shards
    from namr_dist.data.shardset.statistics import statistics

    if parsed.picture:
        check_target("--picture", parsed.picture)
    manifest = open_shards(parsed.folder)
    figures = statistics(manifest, sizes=parsed.images)
    if parsed.near_duplicates:
        from namr_dist.data.shardset.near_duplicates import near_duplicates

        with _bar("images", sum(row["images"] for row in figures["splits"].values())) as advance:
            figures["near_duplicates"] = near_duplicates(manifest, advance=advance)
    if parsed.picture:
        from namr_dist.data.shardset.histogram import histogram_svg

        write_atomic(parsed.picture, histogram_svg(figures))
    if parsed.json:
        print(json.dumps(figures, indent=2))
    else:
        _show_stats(figures)


def _show_stats(figures: dict[str, Any]) -> None:
    from namr_dist.data.shardset.show import near_duplicate_tables, statistics_tables
    from namr_dist.terminal import Console

    console = Console()
    for table in statistics_tables(figures):
        console.print(table)
    if "near_duplicates" in figures:
        for table in near_duplicate_tables(figures["near_duplicates"]):
            console.print(table)


def _shards_stage(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.data.staging import stage

    began = time.perf_counter()
    staged = stage(parsed.folder, parsed.to, parsed.splits)
    say(
        f"staged {staged.images:,} images, {staged.bytes / 2**20:,.1f} MiB, in {time.perf_counter() - began:.1f} s; "
        f"{staged.were_there} of {staged.shards} shards were there already",
        file=sys.stderr,
    )
    print(staged.folder)  # alone on stdout, and as it is: for a shell's $(…)


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, if stderr is a terminal; gives what moves it on."""
    from namr_dist.terminal import transient_bar

    with transient_bar() as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.advance(task, done)
