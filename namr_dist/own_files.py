"""Files and folders of this user, where others may write too: what another user planted there is
never written through, and never taken for this user's own."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from io import FileIO
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, or take the one that is there.

    One in a folder that everybody can write, such as /tmp, is private, and has to be this user's or
    root's: its name can be known before. Elsewhere, whoever may write in the folder above is
    trusted, but for links to other places. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for_all = path.parent.stat().st_mode & stat.S_IWOTH
    try:
        path.mkdir(mode=0o700 if for_all else 0o777, exist_ok=True)
    except FileExistsError:  # a file, or a link to nothing
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    status = path.lstat()
    if (for_all or stat.S_ISLNK(status.st_mode)) and status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f"{path} was made by another user", str(path))


def open_unfollowed(path: Path) -> FileIO:
    """A file for reading and appending, made if it is not there. Raises OSError, for a symbolic
    link too."""
    # Unbuffered: nothing is left to be written once a lock is gone.
    try:
        return open(path, "a+b", buffering=0, opener=_without_following)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = f"{path} is a link, which another user may have planted"
        raise


def open_own(path: Path) -> FileIO:
    """The same with a lock on it, and of this user.

    What else stands there is removed: links, and files of others. Raises BlockingIOError if a lock
    is held already, and OSError. The lock is of the kind that belongs to the open file and not to
    the process, so that a rank's threads exclude each other too.
    """
    for _ in range(2):
        try:
            file = open_unfollowed(path)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            path.unlink(missing_ok=True)
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_own(file):
                return file
            path.unlink(missing_ok=True)
        except OSError:
            file.close()
            raise
        file.close()
    raise PermissionError(errno.EPERM, f"{path} does not stay this user's own", str(path))


def _without_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _is_own(file: FileIO) -> bool:
    """Whether it is a regular file of this user, with no second name elsewhere (a hard link)."""
    status = os.fstat(file.fileno())
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink <= 1
