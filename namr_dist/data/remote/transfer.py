"""Files of a folder, read front to back: on a mounted disk, or behind a URL: http and https
(web.py), pipe:COMMAND, and stores that fsspec opens.

What time may mend by itself is a `TransferError` and is tried again; a clear answer, such as "not
there", is a `RefusedError` and is not. Addresses and commands may hold credentials: messages show
them by `shown` alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import webdataset
from webdataset.gopen import Pipe

from namr_dist.config import RemoteConfig
from namr_dist.data.remote.address import check_scheme, is_command, is_http, is_url, shown
from namr_dist.data.remote.body import BLOCK_BYTES, Body, RefusedError, TransferError
from namr_dist.data.remote.web import HttpBody, http_host
from namr_dist.errors import InputError, TransientError
from namr_dist.text import say

_LONGEST_READ_BYTES = 1 << 30
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A folder, by its absolute path or its URL. Raises InputError if it can be none."""

    url: str
    remote: RemoteConfig

    def __post_init__(self) -> None:
        if is_command(self.url):
            if "{}" not in self.url:
                raise InputError(
                    f"{shown(self.url)} has no {{}} where the file's name belongs; put it there"
                )
            return
        if is_url(self.url):
            check_scheme(self.url)
        if is_http(self.url) and not http_host(self.url):
            raise InputError(
                f"{shown(self.url)} is no URL; give a folder or a URL such as https://HOST/FOLDER"
            )

    def shown(self, file: str) -> str:
        """The file's address without credentials."""
        return (
            f"{file} from {shown(self.url)}" if is_command(self.url) else shown(self._address(file))
        )

    def open(self, file: str, start: int, *, ends: float = math.inf) -> Body:
        """A file's bytes from `start` on, or from 0. Raises TransferError and RefusedError.

        ends: time.monotonic() at which a server or a command is waited for no longer.
        """
        address = self._address(file)
        if is_command(address):
            return _PipeBody(address[5:], self.remote.stall_seconds, ends=ends)
        if is_http(self.url):
            return HttpBody(address, start, self.remote.stall_seconds, ends=ends)
        if not is_url(address):
            return _FileBody(address, start)
        # The name comes from a manifest, and would name a file system of another kind.
        if "::" in file:
            raise RefusedError(f"a store has no file of such a name ({file!r}); rename the shard")
        return _FsspecBody(address, start)

    def read(self, file: str, *, remedy: str) -> bytes:
        """A whole file of at most 1 GiB, tried as often as `repeated` does, within
        data.remote.manifest_seconds in all. Raises what that does, and TransientError where time
        runs out."""
        ends = time.monotonic() + self.remote.manifest_seconds

        def in_time() -> bytes:
            try:
                if time.monotonic() < ends:
                    body = attempt()
                    # An answer of no stated length ends as if it were whole.
                    if time.monotonic() < ends:
                        return body
            except TransferError:
                if time.monotonic() < ends:
                    raise
            raise TransientError(
                f"{self.shown(file)} cannot be fetched: it has not come within {self.remote.manifest_seconds:g} s "
                "(data.remote.manifest_seconds), all tries together; check the server and the network, or "
                "set that higher"
            )

        def attempt() -> bytes:
            blocks, size = [], 0
            with contextlib.closing(self.open(file, 0, ends=ends)) as body:
                while block := body.read():
                    if time.monotonic() >= ends:
                        raise TransferError("it came too slowly")
                    size += len(block)
                    if size > _LONGEST_READ_BYTES:
                        raise RefusedError(
                            f"it has more than {_LONGEST_READ_BYTES / 2**30:g} GiB; check the address"
                        )
                    blocks.append(block)
            return b"".join(blocks)

        return self.repeated(in_time, file, remedy=remedy, ends=ends)

    def repeated(
        self, attempt: Callable[[], Result], file: str, *, remedy: str, ends: float = math.inf
    ) -> Result:
        """What `attempt` returns once it raises no TransferError, with growing pauses between, none
        beyond `ends` of time.monotonic().

        After data.remote.retries repetitions raises TransientError, or InputError where the file is
        another than expected each time; InputError for a RefusedError at once.
        """
        tries = self.remote.retries + 1
        for number in range(1, tries + 1):
            try:
                return attempt()
            except RefusedError as error:
                raise InputError(
                    f"{self.shown(file)} cannot be fetched: {shown(str(error))}"
                ) from None
            except TransferError as error:
                last, wait_s, wrong = shown(str(error)), error.wait_s, error.afresh
            if number < tries:
                # The operating system's generator: equally seeded ranks would all come back at
                # once.
                backoff_s = (
                    _FIRST_WAIT_S
                    * 2 ** min(number - 1, 6)
                    * random.SystemRandom().uniform(0.75, 1.25)
                )
                left_s = max(0.0, ends - time.monotonic())
                pause_s = min(_LONGEST_WAIT_S, max(backoff_s, wait_s), left_s)
                say(
                    f"namr: {self.shown(file)}: {last}; try {number + 1} of {tries} in {pause_s:.1f} s",
                    file=sys.stderr,
                )
                time.sleep(pause_s)
        # What arrives whole and wrong each time is wrong there.
        kind = InputError if wrong else TransientError
        raise kind(
            f"{self.shown(file)} cannot be fetched: {tries} {'try' if tries == 1 else 'tries'}, the last "
            f"said: {last}; {remedy}"
        )

    def _address(self, file: str) -> str:
        if is_command(self.url):
            # The name comes from a manifest, the command goes to a shell.
            if not re.fullmatch(r"[\w.-]+", file, re.ASCII):
                raise RefusedError(
                    f"a command can take no name with such characters ({file!r}); rename the shard"
                )
            return self.url.replace("{}", file)
        if not is_http(self.url):
            return f"{self.url.rstrip('/')}/{file}"
        parts = urlsplit(self.url)
        return urlunsplit(
            (parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quote(file)}", parts.query, "")
        )


class _PipeBody:
    """Output of a shell command, as WebDataset runs it for its pipe: URLs."""

    start = 0
    total: int | None = None

    def __init__(self, command: str, stall_seconds: float, *, ends: float) -> None:
        if webdataset.utils.enforce_security:
            raise RefusedError("WDS_SECURE forbids commands; unset it, or give another URL")
        self._stall_seconds = stall_seconds
        self._ends = ends
        # A session of its own, so that what the shell starts can be ended with it; unbuffered, so
        # that the selector sees every byte.
        self._pipe = Pipe(command, mode="rb", shell=True, bufsize=0, start_new_session=True)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe.stream, selectors.EVENT_READ)

    def read(self) -> bytes:
        left_s = max(0.0, self._ends - time.monotonic())
        if not self._selector.select(min(self._stall_seconds, left_s)):
            raise TransferError(f"no byte came for {self._stall_seconds:g} s")
        block: bytes = self._pipe.stream.read(BLOCK_BYTES)
        if not block:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._pipe.proc.wait(self._stall_seconds)
            if status := self._pipe.proc.poll():
                raise TransferError(f"the command ended with exit code {status}")
        return block

    def close(self) -> None:
        self._selector.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pipe.proc.pid, signal.SIGKILL)
        self._pipe.ignore_errors = True
        self._pipe.close()


class _FileBody:
    """A file of a folder; what the system itself repeats, as NFS does, is not bounded."""

    def __init__(self, path: str, start: int) -> None:
        self.start = start
        with _file_troubles():
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (`close` closes it)
            self.total: int | None = self._file.seek(0, os.SEEK_END)
            self._file.seek(start)

    def read(self) -> bytes:
        with _file_troubles():
            return self._file.read(BLOCK_BYTES) or b""

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _file_troubles() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise RefusedError("it is not there; copy it there or rebuild the shard set") from None
    except (PermissionError, IsADirectoryError) as error:
        raise RefusedError(f"{error.strerror}; make it a file that can be read") from None
    except OSError as error:
        raise TransferError(str(error.strerror)) from None


class _FsspecBody:
    """A file of a store that fsspec opens; time-outs are those of the store's own package."""

    total: int | None = None

    def __init__(self, address: str, start: int) -> None:
        import fsspec

        self.start = start
        with _fsspec_troubles():
            store, path = fsspec.core.url_to_fs(address)
            self._file: Any = store.open(path, "rb")
            self._file.seek(start)

    def read(self) -> bytes:
        with _fsspec_troubles():
            block: bytes = self._file.read(BLOCK_BYTES)
        return block

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._file.close()


@contextlib.contextmanager
def _fsspec_troubles() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise RefusedError(f"a package is missing: {error}") from None
    except FileNotFoundError:
        raise RefusedError("it is not there; check the address, or copy the file there") from None
    except PermissionError as error:
        raise RefusedError(f"access is refused ({error}); check the store's credentials") from None
    except Exception as error:  # each store has exceptions of its own
        raise TransferError(str(error) or type(error).__name__) from None
