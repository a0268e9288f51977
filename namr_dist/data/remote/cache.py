"""Shards that lie behind a URL, kept in a folder of this machine that all its processes share.

    CACHE/manifests/HASH OF THE URL/manifest.json
    CACHE/shards/SHA256-FILE, .SHA256-FILE.BYTES.part (unfinished), .lock, records (hashed.py)

A shard's name holds its hash: an old version is never taken for a new one, and a set with two
addresses is kept once. A name proves nothing: every user hashes a shard before reading it. When a
shard was last used is its time of access; that of its last change stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from namr_dist.atomic import write_atomic
from namr_dist.config import RemoteConfig
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.data.remote.body import TransferError
from namr_dist.data.remote.hashed import HashedFiles, forget_hashed, note_hashed
from namr_dist.data.remote.transfer import Origin
from namr_dist.data.shardset.manifest import FILE_NAME, Manifest, Shard
from namr_dist.data.shardset.shards import sha256_of
from namr_dist.errors import InputError, ReportedError, TransientError, is_transient
from namr_dist.own_files import make_folder, open_own, open_unfollowed

_POLL_S = 0.1
_WHOLE = re.compile(r"[0-9a-f]{32}-.+", re.DOTALL)
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}-.+\.(\d+)\.part", re.DOTALL)


def open_remote(url: str, remote: RemoteConfig) -> Manifest:
    """The shard set behind a URL; its tars are fetched as they are asked for.

    The manifest is asked for each time. Raises TransientError if it cannot be had for now,
    InputError if never or if it is none.
    """
    cache = cache_folder(remote)
    folder = cache / "manifests" / hashlib.sha256(url.encode()).hexdigest()[:32]
    origin = Origin(url=url, remote=remote)
    body = origin.read(FILE_NAME, remedy="check the address and the network")
    try:
        for made in (cache, folder.parent, folder, cache / "shards"):
            make_folder(made)
        write_atomic(folder / FILE_NAME, body)
    except OSError as error:
        raise _unusable(cache, error) from None
    try:
        manifest = Manifest.load(folder)
    except InputError as error:
        raise InputError(f"{origin.shown(FILE_NAME)}, fetched as {error}") from None
    for shard in manifest.shards:
        # Names a file of the cache, so it may hold nothing that leads out of it.
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise InputError(
                f"{origin.shown(FILE_NAME)}: {shard.file} has sha256 {shard.sha256!r}, not 64 hex digits; "
                "rebuild the shard set"
            )
    return dataclasses.replace(manifest, source=ShardCache(origin, cache / "shards"))


def cache_folder(remote: RemoteConfig) -> Path:
    """The folder for remote shards: the one that is set, or namr-dist in the user's cache
    folder."""
    return (
        remote.cache
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "namr-dist"
    )


def is_cache(folder: Path) -> bool:
    """Whether remote shards were kept in a folder before."""
    return all((folder / name).is_dir() for name in ("manifests", "shards"))


def check_cache(training_set: TrainingSet, *, world_size: int, ranks_here: int) -> None:
    """Raise InputError if the cache cannot hold what `ranks_here` of `world_size` ranks read at a
    time.

    With `shuffle` "classes", any batch may need any shard; with "shards", each of the P slots reads
    one and has the next fetched meanwhile. Local sets pass.
    """
    manifest, sampling = training_set.manifest, training_set.sampling
    if not isinstance(manifest.source, ShardCache):
        return
    sizes = [manifest.shards[number].bytes for number in np.unique(training_set.index.shard_N)]
    need, limit = sum(sizes), manifest.source.limit_bytes
    if sampling.shuffle == "shards":
        slots = sampling.classes_per_batch // world_size * ranks_here
        need = min(need, 2 * min(slots, len(sizes)) * max(sizes))
    if need > limit:
        other = "" if sampling.shuffle == "shards" else "data.shuffle to shards, or "
        raise InputError(
            f"training reads {_gib(need)} GiB of shards at a time, more than data.remote.cache_gib "
            f"({limit / 2**30:g}), so that each would be fetched again and again; set {other}"
            f"data.remote.cache_gib to at least {_gib(need)}"
        )


class ShardCache:
    """Fetches each shard once for all processes of this machine, and drops those not used for
    longest."""

    def __init__(self, origin: Origin, folder: Path) -> None:
        """folder: where the tars are; it exists."""
        self._origin = origin
        self._folder = folder
        self._hashed = HashedFiles()
        self.limit_bytes = int(origin.remote.cache_gib * 2**30)

    def path(self, shard: Shard) -> Path:
        """The shard's local file, fetched and checked against its size and hash if it is not there.

        One that is there is hashed as well, once by each user; a damaged one is replaced. It may be
        dropped again before it is opened: then ask once more. Raises TransientError if it cannot be
        had or kept for now, InputError if never.
        """
        there = self._folder / f"{shard.sha256[:32]}-{shard.file}"
        try:
            if self._used(there, shard):
                return there
        except OSError as error:
            raise _unusable(self._folder.parent, error) from None
        if shard.bytes > self.limit_bytes:
            raise InputError(
                f"shard {self._origin.shown(shard.file)} has {_gib(shard.bytes)} GiB, more than "
                f"data.remote.cache_gib ({self.limit_bytes / 2**30:g}); set it to at least "
                f"{_gib(shard.bytes)}"
            )
        try:
            while not self._used(there, shard):
                if part := self._claim(shard, there):
                    with _unlocking(part):
                        fetch(
                            self._origin,
                            shard,
                            part,
                            remedy="check the network and the file there; training goes "
                            "on with --resume",
                        )
                        with self._locked_folder():
                            os.replace(part.name, there)
                            note_hashed(there, os.fstat(part.fileno()))
                else:
                    time.sleep(_POLL_S)
        except OSError as error:
            raise _unusable(self._folder.parent, error) from None
        return there

    def _claim(self, shard: Shard, there: Path) -> FileIO | None:
        """The shard's unfinished file, locked; None while another process has it, or what others
        fetch leaves no room.

        A process that dies leaves the file unlocked, for the next to go on with.
        """
        part = self._folder / f".{there.name}.{shard.bytes}.part"
        with self._locked_folder():
            if self._used(there, shard) or not self._make_room(shard.bytes, part):
                return None
            return _open_locked(part)

    def _make_room(self, need_bytes: int, part: Path) -> bool:
        """Drop what has not been used for longest so that `part` can grow to so many bytes; False,
        with nothing dropped, if others are being fetched and leave no room. Unfinished files count
        in full, files that are none of the cache's do not: nobody may ever remove them. Needs the
        folder's lock."""
        others = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                unfinished = _UNFINISHED.fullmatch(entry.name)
                if entry.name != part.name and (unfinished or _WHOLE.fullmatch(entry.name)):
                    status = entry.stat(follow_symlinks=False)
                    others.append(
                        (
                            max(status.st_atime_ns, status.st_mtime_ns),
                            int(unfinished[1]) if unfinished else status.st_size,
                            Path(entry.path),
                        )
                    )
        total = need_bytes + sum(size for _, size, _ in others)
        dropped = []
        for _, size, path in sorted(others):
            if total <= self.limit_bytes:
                break
            if not _is_being_fetched(path):
                dropped.append(path)
                total -= size
        if total > self.limit_bytes:
            return False
        for path in dropped:
            path.unlink()
            forget_hashed(path)
        return True

    def _used(self, path: Path, shard: Shard) -> bool:
        """Whether the whole shard is there, and no link to something, as this user has found by
        hashing it; if so, its time of access says that it is in use."""
        try:
            status = path.lstat()
            if (
                not stat.S_ISREG(status.st_mode)
                or status.st_size != shard.bytes
                or not self._hashed.is_whole(path, shard.sha256, status)
            ):
                return False
        except FileNotFoundError:
            return False
        # Another user's file in a shared cache may be read and not touched.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns), follow_symlinks=False)
        return True

    @contextlib.contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Held for moments: where names appear and go, never during a transfer."""
        with open_unfollowed(self._folder / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _unlocking(lock):
                yield


def fetch(
    origin: Origin,
    shard: Shard,
    part: FileIO,
    *,
    remedy: str,
    told: Callable[[int], object] = lambda have: None,
) -> None:
    """Append to `part`, a file open for appending, what it lacks of a shard; check size and hash;
    flush to disk.

    remedy: of an error that outlasts all tries.  told: called with the bytes of the shard that
    `part` has, as they come. Raises InputError or TransientError if the shard cannot be had,
    OSError if `part` cannot be written.
    """

    def attempt() -> None:
        try:
            _receive(origin, shard, part, told)
            _check(shard, part)
        except TransferError as error:
            if error.afresh:
                told(part.truncate(0))
            raise

    origin.repeated(attempt, shard.file, remedy=remedy)
    os.fsync(part.fileno())


def _receive(origin: Origin, shard: Shard, part: FileIO, told: Callable[[int], object]) -> None:
    """Append what is missing."""
    have = part.seek(0, os.SEEK_END)
    if have > shard.bytes:
        have = part.truncate(0)
    if have == shard.bytes:
        return
    with contextlib.closing(origin.open(shard.file, have)) as body:
        if body.total not in (None, shard.bytes):
            raise TransferError(
                f"it has {body.total} bytes there, its manifest says {shard.bytes}", afresh=True
            )
        if body.start != have:
            have = part.truncate(0)
        while have < shard.bytes and (block := body.read()):
            _write(part, block)
            have += len(block)
            told(have)
    if have < shard.bytes:
        raise TransferError(f"it ended after {have} of {shard.bytes} bytes")


def _gib(size_bytes: int) -> str:
    """Rounded up, so that a limit of so many GiB suffices."""
    return f"{math.ceil(size_bytes / 2**30 * 1000) / 1000:g}"


def _write(part: FileIO, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[part.write(rest) :]


def _check(shard: Shard, part: FileIO) -> None:
    part.seek(0)
    digest = sha256_of(part)
    if digest != shard.sha256:
        raise TransferError(
            f"it has sha256 {digest[:12]}…, its manifest says {shard.sha256[:12]}…", afresh=True
        )


def _open_locked(path: Path) -> FileIO | None:
    """This user's file, for appending, with a lock on it; None if it is locked already."""
    try:
        return open_own(path)
    except BlockingIOError:
        return None


def _is_being_fetched(path: Path) -> bool:
    """Of a shard or an unfinished one. If not, nobody begins to while the folder is locked."""
    if not _UNFINISHED.fullmatch(path.name):
        return False
    unfinished = _open_locked(path)
    if unfinished is not None:
        with _unlocking(unfinished):
            pass
    return unfinished is None


@contextlib.contextmanager
def _unlocking(file: FileIO) -> Iterator[None]:
    with file:
        try:
            yield
        finally:
            # Not left to closing: a worker process that was forked meanwhile holds the same open
            # file.
            fcntl.flock(file, fcntl.LOCK_UN)


def _unusable(cache: Path, error: OSError) -> ReportedError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TransientError(
            f"cache folder {cache} is full ({error.strerror}); free some space, or have the "
            "cache on a larger disk by data.remote.cache or the environment's XDG_CACHE_HOME"
        )
    kind = TransientError if is_transient(error) else InputError
    return kind(
        f"cache folder {cache} cannot be used ({error.strerror}); name a folder on a disk of this "
        "machine that can be written, by data.remote.cache or the environment's XDG_CACHE_HOME"
    )
