"""What verbs for pictures share: how pictures and models are named on the command line, and how
pictures are embedded."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from namr_dist import named_code
from namr_dist.errors import InputError
from namr_dist.text import say

if TYPE_CHECKING:
    from namr_dist.gallery.embedder import Embedder
    from namr_dist.gallery.embedding import Embeddings
    from namr_dist.gallery.engine import SearchSettings
    from namr_dist.gallery.pictures import Collection

_SETTINGS = ("ef_search", "nprobe", "candidates")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The run, checkpoint or export to embed with."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of a run, one of its checkpoints, or of an export",
    )
    add_allow_code(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """The folder of an index."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Where the model of an index is now."""
    parser.add_argument(
        "--model", type=Path, metavar="RUN", help="the run or export it was built with, if moved"
    )
    add_allow_code(parser)


def add_allow_code(parser: argparse.ArgumentParser) -> None:
    """Code that may be imported."""
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="import this code, which the run was trained with; may be given again",
    )


def add_pictures(parser: argparse.ArgumentParser, *, vectors: bool = True) -> None:
    """What is embedded, and how."""
    parser.add_argument(
        "pictures",
        type=Path,
        nargs="*",
        metavar="IMAGES",
        help="folders, searched recursively, image files, or text files (.txt) with a path a line",
    )
    # As it was called when it took one folder alone.
    parser.add_argument("--images", type=Path, action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument(
        "--shards", metavar="SET", help="instead, a shard set: a folder, a URL, or homeware"
    )
    parser.add_argument("--split", default="test", help="of the shard set (%(default)s)")
    if vectors:
        parser.add_argument(
            "--vectors", type=Path, metavar="FILE", help="instead, what `namr embed` wrote"
        )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="pictures at a time (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode (as trained)"
    )
    parser.add_argument(
        "--skip-damaged", action="store_true", help="leave pictures out that cannot be read"
    )


def add_settings(parser: argparse.ArgumentParser, when: str) -> None:
    """How hard an approximate index looks. when: what they hold for."""
    for name, text in (
        ("ef_search", "hnsw: candidates that a walk keeps"),
        ("nprobe", "ivf, ivfpq: cells that are looked through"),
        ("candidates", "ivfpq, binary, rerank: items that are ordered by exact distance"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{text}; {when}"
        )


def settings_of(parsed: argparse.Namespace, base: SearchSettings) -> SearchSettings:
    """`base` with what the command line says."""
    given = {name: value for name in _SETTINGS if (value := getattr(parsed, name)) is not None}
    return dataclasses.replace(base, **given)


def check_pictures(parsed: argparse.Namespace) -> None:
    """Raise InputError unless pictures of one kind are given."""
    given = [*parsed.pictures, *parsed.images]
    vectors = getattr(parsed, "vectors", None)
    kinds = sum([bool(given), parsed.shards is not None, vectors is not None])
    if kinds != 1:
        raise InputError(
            f"{kinds or 'no'} kinds of pictures are given; give image files and folders, or --shards"
            + (", or --vectors" if hasattr(parsed, "vectors") else "")
        )


def _collection(parsed: argparse.Namespace, model: Embedder) -> Collection:
    from namr_dist.gallery.pictures import collect, of_shards

    if parsed.shards is not None:
        return of_shards(parsed.shards, parsed.split, model.transform, model.config.data.remote)
    return collect([*parsed.pictures, *parsed.images], model.transform)


class Embedding:
    """One command that embeds, on all ranks that a launcher started."""

    def __init__(self, parsed: argparse.Namespace, out: Path) -> None:
        from namr_dist.parallel.meeting import Meeting
        from namr_dist.parallel.ranks import discover

        self._parsed = parsed
        self.rank = discover()
        self._meeting = Meeting(self.rank, until="embedding ended")
        self._out = out
        self._work = out.absolute().with_name(f".{out.name}.partial")
        self._lock_path = self._work.with_name(f"{self._work.name}.lock")

    def model(self, place: Path) -> Embedder:
        """Loaded by all ranks, or by none."""
        from namr_dist.gallery.embedder import Embedder

        with self._meeting.all_or_none():
            named_code.allow(self._parsed.allow_code)
            return Embedder.load(place, device=self.rank.device)

    def all_or_none(self) -> contextlib.AbstractContextManager[None]:
        """As `Meeting` has it."""
        return self._meeting.all_or_none()

    def made(self, model: Embedder) -> tuple[Embeddings, Collection] | None:
        """What the pictures of the command line become; None but for the first rank."""
        from namr_dist.gallery.embedding import embed_resumably

        with self._meeting.all_or_none():
            if self.rank.first:
                self._claim()
            collection = _collection(self._parsed, model)
        made = embed_resumably(
            model,
            collection,
            self._work,
            batch_size=self._parsed.batch_size,
            workers=self._parsed.workers,
            skip_damaged=self._parsed.skip_damaged,
            rank=self.rank,
            meeting=self._meeting,
        )
        if made is None:
            return None
        for fault in made.faults:
            say(f"left out: {fault}", file=sys.stderr)
        return made, collection

    def _claim(self) -> None:
        """Keep others from embedding for the same place, as long as this process lives."""
        from namr_dist.gallery.folder import lock

        self._lock = open(self._lock_path, "ab")  # noqa: SIM115 (open until this process ends)
        if not lock(self._lock):
            raise InputError(
                f"another process embeds pictures for {self._out}; wait until it has ended"
            )

    def finish(self) -> None:
        """Remove what an interrupted command would have gone on from."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
