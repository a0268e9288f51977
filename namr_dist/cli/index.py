"""`namr index`: build, change, tune and push an index of pictures."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from namr_dist import named_code
from namr_dist.cli.pictures import (
    Embedding,
    add_allow_code,
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
    from namr_dist.gallery.embedder import Embedder
    from namr_dist.gallery.embedding import Embeddings
    from namr_dist.gallery.gallery import Gallery
    from namr_dist.gallery.items import Items

_INDEX = "gallery.index"


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `index` to the `namr` command."""
    index = verbs.add_parser(
        "index",
        help="build and change a searchable index of pictures",
        description="Build an index of pictures, which `namr search` and `namr serve` search, and "
        "whose faiss file any program with faiss can open.",
    )
    actions = index.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    build = actions.add_parser(
        "build",
        help="embed pictures and index them",
        description="Embed pictures and write an index. Started by a launcher, all ranks embed. "
        "Interrupted, the same command resumes.",
    )
    add_run(build)
    add_pictures(build)
    build.add_argument(
        "--out", type=Path, metavar="INDEX", help=f"the folder to make (RUN/{_INDEX})"
    )
    build.add_argument(
        "--overwrite", action="store_true", help="replace the index that is there, once built"
    )
    build.add_argument(
        "--type",
        default="flat",
        metavar="TYPE",
        help="flat (exact), hnsw, ivf, ivfpq, sq8, fp16 or binary (%(default)s)",
    )
    build.add_argument(
        "--mode",
        metavar="MODE",
        help="retrieval mode: structure (where the run has cluster centres), sample, rerank, "
        "adaptive, symmetric or calibrated",
    )
    add_settings(build, "stored as the index's own")
    build.set_defaults(verb=_build)

    add = actions.add_parser("add", help="embed more pictures and add them")
    add_place(add)
    add_pictures(add)
    add_model(add)
    add.set_defaults(verb=_add)

    remove = actions.add_parser("remove", help="remove items")
    add_place(remove)
    remove.add_argument("ids", nargs="*", metavar="ID", help="ids of items")
    remove.add_argument(
        "--ids", dest="file", type=Path, metavar="FILE", help="a file with an id a line"
    )
    remove.set_defaults(verb=_remove)

    info = actions.add_parser("info", help="what an index is of; verifies every byte")
    add_place(info)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(verb=_info)

    _add_tune(actions)
    _add_duplicates(actions)
    _add_push(actions)


def _add_tune(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tune = actions.add_parser(
        "tune",
        help="measure which type and settings suit one's own items",
        description="Measure recall, speed, size and build time of all types of index with one's own "
        "embeddings: held-out items query indexes of the others. Prints a table and advice, and "
        "writes a page with a chart.",
    )
    tune.add_argument("index", type=Path, nargs="?", metavar="INDEX", help="folder of an index")
    tune.add_argument(
        "--run", type=Path, metavar="RUN", help="instead, a run or export, with --vectors"
    )
    tune.add_argument(
        "--vectors", type=Path, metavar="FILE", help="what `namr embed` wrote with that run"
    )
    tune.add_argument("--mode", metavar="MODE", help="with --run: retrieval mode (the run's first)")
    tune.add_argument(
        "--queries", type=int, default=500, metavar="Q", help="held-out items (%(default)s)"
    )
    tune.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="queries at a time (%(default)s)"
    )
    tune.add_argument(
        "--threads", type=int, default=1, metavar="T", help="threads that search (%(default)s)"
    )
    tune.add_argument(
        "--recall",
        type=float,
        default=0.99,
        metavar="R",
        help="recall@10 that the advice is to have (%(default)s)",
    )
    tune.add_argument("--json", action="store_true", help="print JSON")
    tune.add_argument(
        "--html", type=Path, metavar="FILE", help="the page to write (INDEX.tune.html)"
    )
    add_allow_code(tune)
    tune.set_defaults(verb=_tune)


def _add_duplicates(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    duplicates = actions.add_parser(
        "duplicates",
        help="list groups of near-duplicate items",
        description="List groups of items that lie nearly at the same place by plain distance of the "
        "embeddings, the largest group first.",
    )
    add_place(duplicates)
    how = duplicates.add_mutually_exclusive_group()
    how.add_argument("--threshold", type=float, metavar="D", help="distance up to which two count")
    how.add_argument(
        "--ratio",
        type=float,
        metavar="R",
        help="the same as a share of the items' spacing, the median distance to the tenth neighbour",
    )
    duplicates.add_argument("--json", action="store_true", help="print JSON")
    duplicates.add_argument(
        "--html", type=Path, metavar="FILE", help="write a contact sheet of them, in one file"
    )
    duplicates.set_defaults(verb=_duplicates)


def _add_push(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    push = actions.add_parser(
        "push",
        help="copy an index's vectors to Milvus",
        description="Copy an index's vectors, ids, labels, paths and sources to a collection of "
        "Milvus. A token is read from the environment variable MILVUS_TOKEN.",
    )
    add_place(push)
    push.add_argument(
        "uri", metavar="URI", help="http://HOST:19530, https://…, or a file .db of Milvus Lite"
    )
    push.add_argument("--collection", metavar="NAME", help="its name (as the index's)")
    push.add_argument(
        "--overwrite", action="store_true", help="replace the collection that is there"
    )
    push.set_defaults(verb=_push)


def _build(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.gallery.engine import TYPES, SearchSettings
    from namr_dist.gallery.folder import is_index
    from namr_dist.gallery.gallery import build
    from namr_dist.results.export import is_export
    from namr_dist.retrieval.forms import mode_named
    from namr_dist.run.folder import RunFolder

    check_pictures(parsed)
    if parsed.out is None and (is_export(parsed.run) or not RunFolder(parsed.run).config.is_file()):
        raise InputError(f"{parsed.run} is not a run's folder; say by --out where the index goes")
    out: Path = parsed.out or parsed.run / _INDEX
    if parsed.type not in TYPES:
        raise InputError(f"--type is {parsed.type}; take one of {', '.join(TYPES)}")
    if parsed.mode is not None:
        mode_named(parsed.mode)
    settings = settings_of(parsed, SearchSettings())
    if out.exists() and not (parsed.overwrite and is_index(out)):
        raise InputError(
            f"{out} exists already; "
            + (
                "replace it with --overwrite, or add to it with `namr index add`"
                if is_index(out)
                else "give another folder with --out"
            )
        )
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out} lies in a folder that does not exist; make it first")
    embedding = Embedding(parsed, out)
    model = embedding.model(parsed.run)
    with embedding.all_or_none():
        model.geometry.served(parsed.mode)
    if (new := _new_items(parsed, embedding, model)) is None:
        return
    made, items = new
    gallery = build(model, made, items, type=parsed.type, mode=parsed.mode, settings=settings)
    gallery.save(out)
    embedding.finish()
    say(
        f"{len(gallery):,} items, mode {gallery.mode}, {gallery.type}: {out}",
        f"search it: namr search {shlex.quote(str(out))} PICTURE.jpg",
    )


def _new_items(
    parsed: argparse.Namespace, embedding: Embedding, model: Embedder
) -> tuple[Embeddings, Items] | None:
    """What is to be indexed; None but for the first rank."""
    from namr_dist.gallery import vectors_file

    if parsed.vectors is not None:
        with embedding.all_or_none():
            read = vectors_file.read(parsed.vectors, model)
        return read if embedding.rank.first else None
    done = embedding.made(model)
    return None if done is None else (done[0], done[1].items)


def _add(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.gallery import folder

    check_pictures(parsed)
    header = folder.read_header(parsed.index)
    embedding = Embedding(parsed, parsed.index)
    model = embedding.model(parsed.model or Path(header.model_place))
    with embedding.all_or_none():
        header.check_model(model.digest, str(model.place), str(parsed.index))
    if (new := _new_items(parsed, embedding, model)) is None:
        return
    with _changed(parsed.index) as gallery:
        gallery.add(*new)
    embedding.finish()
    say(f"{len(new[0].kept_N):,} items added, {len(gallery):,} in all: {parsed.index}")


def _remove(parsed: argparse.Namespace, _: list[str]) -> None:
    ids = list(parsed.ids)
    if parsed.file is not None:
        try:
            lines = parsed.file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(
                f"--ids {parsed.file} cannot be read ({error}); give an id a line"
            ) from None
        ids += [line.strip() for line in lines if line.strip()]
    if not ids:
        raise InputError("no id is given; give ids, or --ids FILE with one a line")
    with _changed(parsed.index) as gallery:
        gallery.remove(dict.fromkeys(ids))
    say(f"{len(set(ids)):,} items removed, {len(gallery):,} left: {parsed.index}")


@contextlib.contextmanager
def _changed(place: Path) -> Iterator[Gallery]:
    """An index, to be changed by this process alone, and written in the end."""
    from namr_dist.gallery import folder
    from namr_dist.gallery.gallery import open_index

    folder.read_about(place)
    with folder.locked(place):
        gallery = open_index(place)
        yield gallery
        gallery.write(place)


def _info(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.gallery.gallery import open_index

    about = open_index(parsed.index).about()
    if parsed.json:
        print(json.dumps(about, indent=2))
        return
    from rich.table import Table

    from namr_dist.terminal import Console, plain

    table = Table(show_header=False, box=None)
    for name, value in about.items():
        table.add_row(plain(name.replace("_", " ")), plain(str(value)))
    Console().print(table)


def _tune(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.atomic import check_target, write_atomic
    from namr_dist.gallery.tune import HEADINGS, Plan, tune

    plan = Plan(
        queries=parsed.queries,
        batch_size=parsed.batch_size,
        threads=parsed.threads,
        recall=parsed.recall,
    )
    of_run = (parsed.run is not None, parsed.vectors is not None)
    if all(of_run) == (parsed.index is not None) or any(of_run) != all(of_run):
        raise InputError("give an INDEX, or --run RUN with --vectors FILE")
    if parsed.mode is not None and parsed.index is not None:
        raise InputError(f"--mode is {parsed.mode}, which goes with --run: an index has its mode")
    place: Path = parsed.index or parsed.vectors
    page: Path = parsed.html or place.absolute().with_name(f"{place.absolute().name}.tune.html")
    check_target("--html", page)
    tuned = tune(_tuned_gallery(parsed), plan)
    write_atomic(page, tuned.page())
    if parsed.json:
        print(json.dumps(tuned.to_json(), indent=2))
        return
    from rich import box
    from rich.table import Table

    from namr_dist.terminal import Console, plain

    table = Table(title=plain(tuned.about), title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number > 1 else "left", no_wrap=True)
    for row in tuned.rows():
        table.add_row(*map(plain, row))
    Console().print(table)
    say(*(f"left out: {line}" for line in tuned.left_out), tuned.advice, str(parsed.html or page))


def _tuned_gallery(parsed: argparse.Namespace) -> Gallery:
    from namr_dist.gallery import vectors_file
    from namr_dist.gallery.embedder import Embedder
    from namr_dist.gallery.gallery import build, open_index

    if parsed.index is not None:
        return open_index(parsed.index)
    named_code.allow(parsed.allow_code)
    model = Embedder.load(parsed.run)
    made, items = vectors_file.read(parsed.vectors, model)
    return build(model, made, items, mode=parsed.mode)


def _duplicates(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.atomic import check_target, write_atomic
    from namr_dist.gallery.duplicates import near_duplicates
    from namr_dist.gallery.gallery import open_index

    if parsed.html is not None:
        check_target("--html", parsed.html)
    gallery = open_index(parsed.index)
    found = near_duplicates(gallery, threshold=parsed.threshold, ratio=parsed.ratio, progress=True)
    if parsed.html is not None:
        write_atomic(parsed.html, found.page(gallery))
    if parsed.json:
        print(json.dumps(found.to_json(), indent=2))
        return
    from rich.table import Table

    from namr_dist.terminal import Console, plain

    table = Table("", "distance", "label", "id", title=plain(found.about), title_justify="left")
    for number, group in enumerate(found.groups, 1):
        for place, (one, label) in enumerate(zip(group.ids, group.labels, strict=True)):
            first = (str(number), f"{group.least:.3g}–{group.most:.3g}") if not place else ("", "")
            table.add_row(*map(plain, (*first, label or "", one)))
    Console().print(table)
    if parsed.html is not None:
        say(str(parsed.html))


def _push(parsed: argparse.Namespace, _: list[str]) -> None:
    from namr_dist.data.remote.address import shown
    from namr_dist.gallery.gallery import open_index
    from namr_dist.gallery.milvus import push

    gallery = open_index(parsed.index)
    name = push(
        gallery,
        parsed.uri,
        collection=parsed.collection,
        overwrite=parsed.overwrite,
        progress=True,
    )
    say(
        f"{len(gallery):,} items, mode {gallery.mode}: collection {name} of {shown(parsed.uri)}",
        "search it with MilvusClient.search and gallery.queries(pictures): docs/indexes.md",
    )
    if gallery.form.weighs:
        say(
            f"mode {gallery.mode} orders what is found again: ask for {gallery.settings.candidates} and sort "
            "them by gallery.distances, as docs/indexes.md shows"
        )
