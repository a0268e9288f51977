"""Which files of a cache this user has hashed: what others, or a broken disk, have put there is not
trusted for its name and size.

    CACHE/shards/.SHA256-FILE.UID.hashed     inode, bytes, time of the last change

A record holds for the very file that was hashed. It must belong to this user, and nobody else may
write it; where a cache cannot be written, each process hashes for itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from namr_dist.data.shardset.shards import sha256_of

_MOST_BYTES = 100


class HashedFiles:
    """One in each process."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[str, bool]] = {}

    def is_whole(self, path: Path, sha256: str, status: os.stat_result) -> bool:
        """Whether the file has this hash. status: the file's.

        It is read only if this user has not hashed it as it is now. Raises OSError where it cannot
        be read.
        """
        identity = _identity(status)
        known, whole = self._known.get(path, (None, False))
        if known == identity:
            return whole
        if _read(_record(path)) == identity:
            whole = True
        else:
            with open(path, "rb") as file:
                identity = _identity(os.fstat(file.fileno()))
                whole = sha256_of(file) == sha256
            if whole:
                _write(path, identity)
        self._known[path] = identity, whole
        return whole


def note_hashed(path: Path, status: os.stat_result) -> None:
    """Record that this process has hashed the file and found it whole."""
    _write(path, _identity(status))


def forget_hashed(path: Path) -> None:
    """Remove this user's record of a file that is gone."""
    with contextlib.suppress(OSError):
        _record(path).unlink()


def _identity(status: os.stat_result) -> str:
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _record(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.geteuid()}.hashed")


def _read(record: Path) -> str | None:
    try:
        handle = os.open(record, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        by_others = stat.S_IWGRP | stat.S_IWOTH
        if (
            not stat.S_ISREG(status.st_mode)
            or status.st_uid != os.geteuid()
            or status.st_mode & by_others
        ):
            return None
        return file.read(_MOST_BYTES).decode(errors="replace")


def _write(path: Path, identity: str) -> None:
    # A cache that is full or of somebody else's does not keep it: the next process hashes again.
    # A name of its own: with anything added, that of a record could be too long.
    temporary = path.with_name(f".{secrets.token_hex(6)}.tmp")
    with contextlib.suppress(OSError):
        # Whatever the umask: nobody else may write it.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            file.write(identity)
        os.replace(temporary, _record(path))
