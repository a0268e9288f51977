"""Pictures → embeddings: here in memory, or on all ranks into chunks that an interrupted build
takes up again.

Shapes: N pictures, D width of z, S of s, b a batch's pictures.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from namr_dist.atomic import write_atomic
from namr_dist.config import Config
from namr_dist.data.read.stream import ImageSource, stream
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.gallery.pictures import Collection, Sparing
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.meeting import Meeting
from namr_dist.parallel.ranks import Rank
from namr_dist.progress import counted
from namr_dist.retrieval.arrays import Float32, Int64
from namr_dist.text import say
from namr_dist.train.checkpoints.verified_file import read_tensors, write_tensors

DEFAULT_BATCH = 64
_FILES_FOR_WORKERS = 512
"""Fewer are decoded before worker processes would have started."""
_CHUNK = 1024
"""Pictures, about, that are lost if a build is killed."""
_PLAN = "plan.json"


class Network(Protocol):
    """What embeds: a gallery.embedder.Embedder."""

    network: EmbeddingNetwork
    """uint8 (b, H, H, 3) → z (b, D), s (b, S)"""
    config: Config
    device: torch.device

    @property
    def width(self) -> int:
        """D"""

    @property
    def structure_width(self) -> int:
        """S"""

    @property
    def digest(self) -> str:
        """what tells one network from another"""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What a network makes of the pictures that are whole."""

    z_ND: Float32
    s_NS: Float32
    kept_N: Int64
    """position of each among the pictures given, ascending"""
    faults: tuple[str, ...] = ()
    """a line for each damaged picture"""


def embed_all(
    model: Network,
    images: ImageSource,
    *,
    batch_size: int = DEFAULT_BATCH,
    workers: int | None = None,
    progress: bool = False,
) -> Embeddings:
    """All pictures, in order, by this process. Raises InputError for one that cannot be read."""
    _check_batch_size(batch_size)
    if not len(images):
        empty = np.empty((0, model.width), dtype=np.float32)
        return Embeddings(
            z_ND=empty,
            s_NS=np.empty((0, model.structure_width), dtype=np.float32),
            kept_N=np.empty(0, dtype=np.int64),
        )
    parts = []
    with counted("embedding", len(images), "pictures", shown=progress) as bar:
        for z_bD, s_bS, index_b, _ in _batches(
            model, images, _cut(range(len(images)), batch_size), workers
        ):
            parts.append((z_bD, s_bS, index_b))
            bar.advance(len(index_b))
    z_ND, s_NS, kept_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Embeddings(z_ND=z_ND, s_NS=s_NS, kept_N=kept_N)


def embed_resumably(
    model: Network,
    collection: Collection,
    work: Path,
    *,
    batch_size: int = DEFAULT_BATCH,
    workers: int | None = None,
    skip_damaged: bool = False,
    rank: Rank,
    meeting: Meeting,
) -> Embeddings | None:
    """All pictures, by all ranks, which call it together: each embeds every W-th chunk, and writes
    it into the folder `work`. A call that finds chunks of the same pictures, network and batch
    size there takes these as they are. The first rank returns all rows, the others None.

    Batches are those of `embed_all`, whatever the number of ranks, and so is every bit. Unless
    `skip_damaged`, damaged pictures raise InputError, which names them, once all others are
    embedded: nothing is lost by asking again. The caller removes `work`. Ranks on several machines
    need a file system that they share.
    """
    _check_batch_size(batch_size)
    count = len(collection.images)
    rows = max(1, _CHUNK // batch_size) * batch_size
    chunks = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
    plan = json.dumps(_plan(model, collection, batch_size))
    with meeting.all_or_none():
        if rank.first:
            _prepare(work, plan)
    with meeting.all_or_none():
        if _planned(work) != plan:
            raise InputError(
                f"rank {rank.rank} has another network or other pictures than the first one; of a run "
                "that goes on, name a checkpoint, and let nothing change the pictures"
            )
    with meeting.all_or_none(longest=None):  # ranks may differ by hours
        _embed_chunks(model, collection, work, chunks, plan, batch_size, workers, rank)
    if not rank.first:
        return None
    parts = [_read_chunk(work, number, plan) for number in range(len(chunks))]
    faults = tuple(fault for part in parts for fault in part.faults)
    if faults and not skip_damaged:
        say(*(f"damaged: {fault}" for fault in faults), file=sys.stderr)
        raise InputError(
            f"{len(faults):,} of {count:,} pictures cannot be read; repair or remove them, or give "
            f"--skip-damaged, which leaves them out (the others stay embedded in {work})"
        )
    return Embeddings(
        z_ND=np.concatenate([part.z_ND for part in parts]),
        s_NS=np.concatenate([part.s_NS for part in parts]),
        kept_N=np.concatenate([part.kept_N for part in parts]),
        faults=faults,
    )


def _embed_chunks(
    model: Network,
    collection: Collection,
    work: Path,
    chunks: list[range],
    plan: str,
    batch_size: int,
    workers: int | None,
    rank: Rank,
) -> None:
    own = range(rank.rank, len(chunks), rank.world_size)
    missing = [number for number in own if not _is_whole(work, number, plan)]
    done = sum(len(chunks[number]) for number in own) - sum(len(chunks[n]) for n in missing)
    if done and rank.first:
        say(f"{done:,} pictures were embedded before; going on", file=sys.stderr)
    batches = [batch for number in missing for batch in _cut(chunks[number], batch_size)]
    total = sum(len(chunks[number]) for number in missing)
    made = _batches(model, Sparing(collection.images), batches, workers)
    with counted("embedding", total, "pictures", shown=rank.first) as bar:
        for number in missing:
            parts, left = [], len(chunks[number])
            faults: list[str] = []
            while left:
                z_bD, s_bS, index_b, faults_b = next(made)
                parts.append((z_bD[index_b >= 0], s_bS[index_b >= 0], index_b[index_b >= 0]))
                faults += faults_b
                left -= len(index_b)
                bar.advance(len(index_b))
            z_ND, s_NS, kept_N = (np.concatenate(column) for column in zip(*parts, strict=True))
            write_tensors(
                _chunk(work, number),
                {
                    "z": torch.from_numpy(z_ND),
                    "s": torch.from_numpy(s_NS),
                    "kept": torch.from_numpy(kept_N),
                },
                {"faults": json.dumps(faults), "plan": plan},
            )


def _batches(
    model: Network, images: ImageSource, batches: list[list[tuple[int, int]]], workers: int | None
) -> Iterator[tuple[Float32, Float32, Int64, tuple[str, ...]]]:
    if workers is None:
        many = sum(map(len, batches)) >= _FILES_FOR_WORKERS
        workers = model.config.data.workers if many else 0
    with torch.no_grad():
        for batch in stream(images, batches, workers=workers):
            z_bD, s_bS = model.network(batch.images_bHW3.to(model.device))
            yield (
                z_bD.float().cpu().numpy(),
                s_bS.float().cpu().numpy(),
                batch.index_b.numpy(),
                batch.replaced,
            )


def _cut(positions: range, batch_size: int) -> list[list[tuple[int, int]]]:
    return [
        [(position, 0) for position in positions[start : start + batch_size]]
        for start in range(0, len(positions), batch_size)
    ]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; take 1 or more")


def _plan(model: Network, collection: Collection, batch_size: int) -> dict[str, object]:
    ids = hashlib.sha256("\0".join(collection.items.ids).encode(errors="surrogateescape"))
    return {
        "model": model.digest,
        "ids": ids.hexdigest(),
        "pictures": collection.fingerprint,
        "batch_size": batch_size,
        "device": model.device.type,
    }


def _prepare(work: Path, plan: str) -> None:
    if work.exists():
        if _planned(work) == plan:
            return
        say(
            f"{work} was begun with other pictures, another model or batch size; starting over",
            file=sys.stderr,
        )
        shutil.rmtree(work)
    work.mkdir()
    write_atomic(work / _PLAN, plan)


def _planned(work: Path) -> str | None:
    """The plan that the chunks there are of."""
    try:
        return (work / _PLAN).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _chunk(work: Path, number: int) -> Path:
    return work / f"chunk-{number:06d}.safetensors"


def _is_whole(work: Path, number: int, plan: str) -> bool:
    try:
        _read_chunk(work, number, plan)
    except InputError:
        return False
    return True


def _read_chunk(work: Path, number: int, plan: str) -> Embeddings:
    path = _chunk(work, number)
    try:
        tensors, metadata = read_tensors(path)
        if metadata["plan"] != plan:
            raise ValueError("it is of other pictures")
        faults = json.loads(metadata["faults"])
        return Embeddings(
            z_ND=tensors["z"].numpy(),
            s_NS=tensors["s"].numpy(),
            kept_N=tensors["kept"].numpy(),
            faults=tuple(map(str, faults)),
        )
    except (DamagedFileError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); run the same command again") from None
