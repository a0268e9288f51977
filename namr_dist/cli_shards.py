"""The verbs of `namr shards`: one small function each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `shards` and its verbs to the `namr` command."""
    shards = verbs.add_parser("shards", help="build and verify shard sets, show their statistics")
    shard_verbs = shards.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, verb, text in (("verify", _shards_verify, "hash every shard and decode every image"),
                             ("stats", _shards_stats, "count images and classes by split")):
        entry = shard_verbs.add_parser(name, help=text)
        entry.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="the shard set (homeware)")
        entry.add_argument("--json", action="store_true", help="print JSON")
        entry.set_defaults(verb=verb)


def _shards_verify(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.data.location import open_shards
    from namr_dist.data.shards import verify_shards

    manifest = open_shards(parsed.folder)
    images = verify_shards(manifest, manifest.splits, decode=True)
    if parsed.json:
        print(json.dumps({"name": manifest.name, "shards": len(manifest.shards), "images": images}))
    else:
        print(f"{manifest.name}: {images} images in {len(manifest.shards)} shards, all as the manifest says")


def _shards_stats(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.data.location import open_shards
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
