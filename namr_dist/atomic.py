"""Files that are either the old version or the whole new one, never a half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from namr_dist.errors import InputError


def check_target(option: str, path: Path) -> None:
    """Raise InputError, naming the command's option, if no file can be made at `path`: before hours
    of work for it."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path} is not a file in a folder that exists; give one")


def write_atomic(path: Path, data: bytes | str, *, private: bool = False) -> None:
    """Replace `path` by `data` (text is stored as UTF-8), also across a crash or a power cut.

    private: nobody else may read it.

    A temporary file in the same folder is written and flushed to disk, then renamed over `path`.
    The folder must exist. Raises OSError where writing fails; the old file then still stands and
    the temporary one is gone.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb", opener=_private if private else None) as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # The file the caller knows, not the temporary one, or none at all.
            error.filename = str(path)
        raise
    flush(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder of files next to `path`, which does not exist, that gets this name at the
    end, flushed to disk; on any error it is gone. Raises OSError."""
    temporary = path.absolute().with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for each in (*temporary.iterdir(), temporary):
            flush(each)
        os.rename(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the folder the caller knows
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(path.absolute().parent)


def flush(path: Path) -> None:
    """Write a file, or a folder's list of names, to disk. Only once a folder is there does a rename
    in it survive a power cut. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, so that it is never seen with a part of that. What
    cannot be removed stays under a temporary name, as files do that a killed process was writing.

    Raises OSError where it cannot get such a name; the folder then stays as it is.
    """
    aside = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(6)}.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
