"""The whole check of a shard set: everything that is wrong with it, not only the first."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from namr_dist.data.shardset.manifest import Manifest, Shard
from namr_dist.data.shardset.shards import shard_problems
from namr_dist.errors import InputError, ReportedError
from namr_dist.json_file import parse_json

_MOST_META_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found in a set, a line each, in the order of the shards."""

    problems: list[str]
    """Where the set is not as its manifest says."""
    shared: list[str]
    """Images that two splits hold byte for byte. Published sets have such pairs, and are what they
    are."""


def verify(
    manifest: Manifest, *, decode: bool = True, advance: Callable[[int], None] = lambda images: None
) -> Verified:
    """Hash each shard, decode each image (unless told not to), compare each tar's members with the
    manifest's keys, labels and byte ranges, and look for images that are in two splits.

    Shards that lie elsewhere are fetched. Runs on all cores; `advance` is told the images of each
    shard that is done. That splits share no class is checked when a manifest is loaded.
    """

    def of_shard(shard: Shard) -> tuple[list[str], list[bytes]]:
        return _examine(manifest, shard, decode=decode)

    lines: list[str] = []
    first_by_split: dict[bytes, dict[str, str]] = {}
    # Threads: hashing and decoding, nearly all of the work, let others run meanwhile.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for shard, (problems, digests) in zip(
            manifest.shards, pool.map(of_shard, manifest.shards), strict=True
        ):
            lines += problems
            for key, digest in zip(shard.keys, digests, strict=False):
                first_by_split.setdefault(digest, {}).setdefault(shard.split, key)
            advance(len(shard.keys))
    shared = [
        " and ".join(f"{key}.jpg of {split}" for split, key in keys.items()) + " are the same image"
        for keys in first_by_split.values()
        if len(keys) > 1
    ]
    return Verified(problems=lines, shared=shared)


def unnamed_tars(manifest: Manifest) -> list[str]:
    """Tars beside the manifest, whole or in part, that it does not name: a pattern such as
    train-*.tar would read them.

    None for a set that lies elsewhere.
    """
    if manifest.source:
        return []
    named = {shard.file for shard in manifest.shards}
    return sorted(
        path.name
        for path in manifest.folder.iterdir()
        if ".tar" in path.name and path.name not in named
    )


def _examine(manifest: Manifest, shard: Shard, *, decode: bool) -> tuple[list[str], list[bytes]]:
    """The shard's problems, and a digest of each image; no digests where the tar is missing or of
    another size."""
    try:
        path = manifest.path(shard)
    except ReportedError as error:
        return [str(error)], []
    lines = list(shard_problems(path, shard, decode=decode))
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return lines, []
    with open(path, "rb") as stream:
        lines += _member_problems(stream, shard, path)
        return lines, [
            hashlib.sha256(_read(stream, offset, length)).digest()
            for offset, length in zip(shard.offsets, shard.lengths, strict=True)
        ]


def _member_problems(stream: BinaryIO, shard: Shard, path: Path) -> Iterator[str]:
    """What the tar's own headers say, beside the manifest."""
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.name in members:
                    yield f"{path} holds {member.name} twice; rebuild the shard set"
                members[member.name] = member
    except OSError:
        raise
    except Exception as error:  # damaged headers raise whatever tarfile runs into
        why = str(error) or type(error).__name__
        yield f"{path} cannot be read as a tar ({why}); copy it again or rebuild the shard set"
        return
    for key, label, offset, length in zip(
        shard.keys, shard.labels, shard.offsets, shard.lengths, strict=True
    ):
        image, meta = members.pop(f"{key}.jpg", None), members.pop(f"{key}.json", None)
        if image is None or meta is None:
            yield f"{path} has no {key}.{'json' if image else 'jpg'}; rebuild the shard set"
        elif (image.offset_data, image.size) != (offset, length):
            yield (
                f"{key}.jpg in {path} is at byte {image.offset_data} and has {image.size} bytes, its manifest says "
                f"{offset} and {length}; rebuild the shard set"
            )
        elif (stated := _label(_read(stream, meta.offset_data, _meta_bytes(meta)))) != label:
            yield f"{key}.json in {path} says label {stated!r}, its manifest says {label}; rebuild the shard set"
    for name in members:
        yield f"{path} holds {name}, which its manifest does not name; rebuild the shard set"


def _meta_bytes(meta: tarfile.TarInfo) -> int:
    """Of a KEY.json; none of a size that only a damaged header states."""
    return meta.size if 0 <= meta.size <= _MOST_META_BYTES else 0


def _label(meta: bytes) -> object:
    try:
        return parse_json(meta, "the label", "")["label"]
    except (InputError, KeyError, TypeError):
        return None


def _read(stream: BinaryIO, offset: int, length: int) -> bytes:
    stream.seek(offset)
    return stream.read(length)
