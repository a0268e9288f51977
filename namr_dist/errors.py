"""The exceptions that commands turn into a single line for the user, and their exit codes."""

from __future__ import annotations

import errno

_TRANSIENT = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,  # how Linux leaves a file system that had errors
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
    }
)


class ReportedError(Exception):
    """What a command says in one line, before it ends with `exit_code`."""

    exit_code = 2


class InputError(ReportedError, ValueError):
    """Bad input: what, which value, what to do. The same command would fail again."""


class DamagedFileError(ValueError):
    """The bytes of a file are not those that were written. Says how that shows; whoever reads the
    file names it, and the remedy."""


class TransientError(ReportedError):
    """The input is right and the world was in the way: a killed process, storage or a network that
    does not answer, a full disk. The same command may succeed later, so jobs are queued again."""

    exit_code = 74
    """EX_IOERR of sysexits.h."""


def is_transient(error: OSError) -> bool:
    """Whether an operating-system error says nothing about the input."""
    return error.errno in _TRANSIENT


def in_one_line(error: BaseException) -> str:
    """What `namr` prints of an exception that it reports in one line."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or give another folder"
    elif is_transient(error):
        remedy = "look what is wrong there, and try again"
    else:
        remedy = "give another path"
    return f"{error.strerror}: {error.filename or 'no file named'}; {remedy}"


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of `namr` for an exception that it reports in one line; None for any other."""
    if isinstance(error, ReportedError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return TransientError.exit_code if is_transient(error) else InputError.exit_code
    return None
