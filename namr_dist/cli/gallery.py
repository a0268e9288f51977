"""`namr embed` and `namr search`: pictures of one's own and a trained run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from namr_dist import named_code
from namr_dist.cli.pictures import (
    Embedding,
    add_model,
    add_pictures,
    add_place,
    add_run,
    add_settings,
    check_pictures,
    settings_of,
)
from namr_dist.errors import InputError
from namr_dist.text import say

if TYPE_CHECKING:
    from namr_dist.gallery.items import Hit


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `embed` and `search` to the `namr` command."""
    _add_embed(verbs)
    _add_search(verbs)


def _add_embed(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    embed = verbs.add_parser(
        "embed",
        help="embed pictures with a trained run",
        description="Embed pictures, or a split of a shard set, into a file: .safetensors or .parquet "
        "with z, s, names and the model's hash, or .npy with z alone. Started by a launcher, on all ranks. "
        "Interrupted, the same command resumes.",
    )
    add_run(embed)
    add_pictures(embed, vectors=False)
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    embed.set_defaults(verb=_embed)


def _add_search(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    search = verbs.add_parser(
        "search",
        help="find an index's nearest items of pictures",
        description="Find the nearest items of pictures: image files, folders, or text files that "
        "list some.",
    )
    add_place(search)
    search.add_argument("pictures", type=Path, nargs="+", metavar="IMAGE", help="what to look for")
    search.add_argument("-k", type=int, default=10, metavar="K", help="neighbours (%(default)s)")
    search.add_argument("--json", action="store_true", help="print JSON")
    search.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page that shows them, in one file"
    )
    add_model(search)
    add_settings(search, "for this search")
    search.set_defaults(verb=_search)


def _embed(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.gallery import vectors_file

    check_pictures(parsed)
    vectors_file.check_file(parsed.out)
    embedding = Embedding(parsed, parsed.out)
    model = embedding.model(parsed.run)
    if (done := embedding.made(model)) is None:
        return
    made, collection = done
    vectors_file.write(parsed.out, made, collection, model)
    embedding.finish()
    say(f"{len(made.kept_N)} images → {parsed.out}")


def _search(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.atomic import check_target, write_atomic
    from namr_dist.data.read.augment import TestTransform
    from namr_dist.gallery.gallery import open_index
    from namr_dist.gallery.pictures import collect

    if parsed.html is not None:
        check_target("--html", parsed.html)
    if parsed.k < 1:
        raise InputError(f"-k is {parsed.k}; ask for at least one neighbour")
    asked = collect(parsed.pictures, TestTransform(size=1, crop_share=1.0)).items
    paths = [asked.path(position) for position in range(len(asked))]
    named_code.allow(parsed.allow_code)
    gallery = open_index(parsed.index, model=parsed.model)
    gallery.settings = settings_of(parsed, gallery.settings)
    found = gallery.search(list(paths), parsed.k)
    if parsed.html is not None:
        write_atomic(parsed.html, gallery.page(paths, found))
    if parsed.json:
        told = [
            {"query": path, "hits": [dataclasses.asdict(hit) for hit in hits]}
            for path, hits in zip(paths, found, strict=True)
        ]
        print(json.dumps(told, indent=2))
    else:
        _print_hits(paths, found)
    if parsed.html is not None and not parsed.json:
        say(str(parsed.html))


def _print_hits(paths: list[str], found: list[list[Hit]]) -> None:
    from rich.table import Table

    from namr_dist.terminal import Console, plain

    console = Console()
    for path, hits in zip(paths, found, strict=True):
        title = plain(_short(path))
        table = Table("", "distance", "label", "picture", title=title, title_justify="left")
        for rank, hit in enumerate(hits, 1):
            table.add_row(
                str(rank), f"{hit.distance:.4g}", plain(hit.label or ""), plain(_short(hit.path))
            )
        console.print(table)


def _short(path: str) -> str:
    """For people: from the working folder on, if it lies there."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)
