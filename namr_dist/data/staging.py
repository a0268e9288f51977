"""A shard set copied to this machine's own disk and checked there, before training reads it.

    TO/NAME-HASH/FILE …, .FILE.part (unfinished), manifest.json (written last), .lock

HASH is of the manifest: other sets, and other versions of this one, lie beside it and are never
mixed with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from namr_dist.atomic import write_atomic
from namr_dist.config import RemoteConfig
from namr_dist.data.build.progress import BuildProgress
from namr_dist.data.location import open_shards
from namr_dist.data.remote.cache import fetch
from namr_dist.data.remote.transfer import Origin
from namr_dist.data.shardset.manifest import FILE_NAME, Manifest, Shard
from namr_dist.data.shardset.shards import shard_problems
from namr_dist.errors import InputError, TransientError, is_transient
from namr_dist.own_files import make_folder, open_own, open_unfollowed
from namr_dist.text import say

_AT_ONCE = 4
"""Copies: one alone does not fill the way to a file server."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What `stage` leaves: a shard set for `data.path`."""

    folder: Path
    shards: int
    were_there: int
    """Shards that had been staged before and are whole."""
    images: int
    bytes: int
    """Of all the shards."""


def stage(location: str, to: Path, splits: Sequence[str] = ()) -> Staged:
    """Copy the shard set at `location`, a folder or a URL, into a folder of its own in `to`; all of
    it, or the shards of some splits or subsets.

    Every shard that is there afterwards has been hashed. Shards that are there and whole stay, a
    copy that broke off goes on where it was; of several processes that stage the same set, one
    copies while the others wait. Raises InputError for a location that is no shard set, a shard
    that is missing or damaged there, and a `to` that lies in the set's folder, cannot be written or
    is too small.
    """
    manifest = open_shards(location)
    place = to.resolve()
    if manifest.source is None and manifest.folder.resolve() in (place, *place.parents):
        raise InputError(
            f"{place} is the shard set's own folder or lies in it; give a folder on this machine's own disk"
        )
    shards = manifest.shards_of(*splits) if splits else manifest.shards
    body = (manifest.folder / FILE_NAME).read_bytes()
    folder = place / f"{_plain(manifest.name)}-{hashlib.sha256(body).hexdigest()[:12]}"
    try:
        make_folder(to)
        make_folder(folder)
        with _alone(folder):
            whole = _whole(folder, shards)
            _copy(
                _origin(location, manifest),
                folder,
                [shard for shard in shards if shard.file not in whole],
            )
            # Not once more: on a disk that is full by now, a set that is whole can be used.
            if _size(folder / FILE_NAME) != len(body) or (folder / FILE_NAME).read_bytes() != body:
                write_atomic(folder / FILE_NAME, body)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TransientError(
                f"{folder} is full ({error.strerror}); free some space, or stage into a folder on a "
                "larger disk"
            ) from None
        kind = TransientError if is_transient(error) else InputError
        raise kind(
            f"{folder} cannot be used ({error.strerror}); stage into a folder on a disk of this machine "
            "that can be written"
        ) from None
    return Staged(
        folder=folder,
        shards=len(shards),
        were_there=len(whole),
        images=sum(len(shard.keys) for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
    )


def _plain(name: str) -> str:
    """A set's name, which may be any text, as the beginning of a folder's."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:60]


def _origin(location: str, manifest: Manifest) -> Origin:
    if manifest.source:
        return Origin(url=location, remote=RemoteConfig())
    # A second try is for an unfinished copy that a crash has left damaged; a mounted disk repeats
    # what it can itself.
    return Origin(url=str(manifest.folder.resolve()), remote=RemoteConfig(retries=1))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it for one that dies."""
    with open_unfollowed(folder / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"namr: another process stages into {folder}; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _whole(folder: Path, shards: Sequence[Shard]) -> set[str]:
    """Files of those shards that are in the folder as the manifest says: disks rot, so each is
    hashed."""
    there = [shard for shard in shards if _size(folder / shard.file) == shard.bytes]
    if not there:
        return set()

    def is_whole(shard: Shard) -> bool:
        try:
            return not any(
                shard_problems(folder / shard.file, shard, decode=False, hashes_alone=True)
            )
        except OSError:  # a bad block
            return False

    intact = set()
    images, size = sum(len(shard.keys) for shard in there), sum(shard.bytes for shard in there)
    with (
        BuildProgress(f"check {folder.name}", images=images, size=size) as progress,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        for shard, whole in zip(there, pool.map(is_whole, there), strict=True):
            progress.read(len(shard.keys), shard.bytes)
            if whole:
                intact.add(shard.file)
    return intact


def _copy(origin: Origin, folder: Path, shards: Sequence[Shard]) -> None:
    """Copy the shards in place of what has their names. Checks first that there is room."""
    if not shards:
        return
    parts = {shard.file: folder / f".{shard.file}.part" for shard in shards}
    had = {shard.file: min(_size(parts[shard.file]), shard.bytes) for shard in shards}
    need = sum(shard.bytes - had[shard.file] for shard in shards)
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if need > free:
        raise InputError(
            f"{folder} needs {need / 2**20:,.1f} MiB more and its disk has {free / 2**20:,.1f} MiB free; "
            "free some space, or stage into a folder on a larger disk"
        )
    telling = threading.Lock()

    def copy(shard: Shard) -> None:
        def told(have: int) -> None:
            with telling:
                progress.read(
                    _images(shard, have) - _images(shard, had[shard.file]), have - had[shard.file]
                )
                had[shard.file] = have

        with open_own(parts[shard.file]) as part:
            fetch(
                origin,
                shard,
                part,
                told=told,
                remedy="check the file there or rebuild the shard set; staging goes "
                "on with the same command",
            )
        # A damaged one is replaced and not removed before: whoever reads it still has a file until
        # then.
        os.replace(parts[shard.file], folder / shard.file)

    images = sum(len(shard.keys) - _images(shard, had[shard.file]) for shard in shards)
    with (
        BuildProgress(f"copy {folder.name}", images=images, size=need) as progress,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        for _ in pool.map(copy, shards):
            pass


def _images(shard: Shard, have: int) -> int:
    """Images of a shard that begin in its first `have` bytes."""
    return bisect_left(shard.offsets, have)


def _size(path: Path) -> int:
    """In bytes; 0 if there is no such file, or a link."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
