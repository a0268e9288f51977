"""Files of a folder, read front to back: on a mounted disk, or behind a URL: http and https,
pipe:COMMAND, and what fsspec knows.

What time may mend by itself is a `TransferError` and is tried again; a clear answer, such as "not
there", is a `RefusedError` and is not. Addresses and commands may hold credentials: messages show
them by `shown` alone.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import http.client
import os
import random
import re
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import webdataset
from webdataset.gopen import Pipe

from namr_dist import __version__
from namr_dist.config import RemoteConfig
from namr_dist.errors import InputError

_BLOCK_BYTES = 1 << 20
_LONGEST_READ_BYTES = 1 << 30
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
# Client errors that time mends: time-out, a range that is not there (yet), too early, too many
# requests.
_MENDED_BY_TIME = (408, 416, 425, 429)

Result = TypeVar("Result")


class TransferError(Exception):
    """A try that failed and may be repeated."""

    def __init__(self, text: str, *, afresh: bool = False, wait_s: float = 0.0) -> None:
        """afresh: what has come so far is of no use.  wait_s: what the server asks to wait."""
        super().__init__(text)
        self.afresh = afresh
        self.wait_s = wait_s


class RefusedError(Exception):
    """An answer that another try would not change: cause; remedy."""


class Body(Protocol):
    """A file on its way."""

    start: int
    """First byte that comes; 0 where the source cannot begin in the middle."""
    total: int | None
    """Bytes of the whole file, where the source says so."""

    def read(self) -> bytes:
        """The next bytes; none at the end. Raises TransferError and RefusedError."""

    def close(self) -> None:
        """Let go of connection and processes."""


def is_url(location: str) -> bool:
    """Whether a location is a URL and not a folder's path."""
    return is_command(location) or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def is_command(location: str) -> bool:
    """Whether reading from a location runs a command of a shell."""
    return location.startswith("pipe:")


def shown(location: str) -> str:
    """A location or message for the user's eyes: of a command the program alone, of URLs neither
    user nor query."""
    if is_command(location):
        # A word such as TOKEN=… sets a variable, and where it ends is the shell's to say.
        program = re.match(r"pipe:\s*([\w./+-]*)(?!\S)", location)
        return f"pipe:{program[1]} …" if program and program[1] else "pipe:…"
    # A password may hold any character, so that an @ behind a ? leaves open which of them begins
    # the query.
    without_both = re.sub(r"(\w://)[^\s?#]*[?#]\S*@\S*", r"\1…", location)
    without_user = re.sub(r"://\S*@", "://…@", without_both)
    return re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1?…", without_user)


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
        if self._is_http and not _http_host(self.url):
            raise InputError(
                f"{shown(self.url)} is no URL; give a folder or a URL such as https://HOST/FOLDER"
            )

    def shown(self, file: str) -> str:
        """The file's address without credentials."""
        return (
            f"{file} from {shown(self.url)}" if is_command(self.url) else shown(self._address(file))
        )

    def open(self, file: str, start: int) -> Body:
        """A file's bytes from `start` on, or from 0. Raises TransferError and RefusedError."""
        address = self._address(file)
        if is_command(address):
            return _PipeBody(address[5:], self.remote.stall_seconds)
        if self._is_http:
            return _HttpBody(address, start, self.remote.stall_seconds)
        return _FsspecBody(address, start) if is_url(address) else _FileBody(address, start)

    def read(self, file: str, *, remedy: str) -> bytes:
        """A whole file of at most 1 GiB, tried as often as `repeated` does. Raises InputError."""

        def attempt() -> bytes:
            blocks, size = [], 0
            with contextlib.closing(self.open(file, 0)) as body:
                while block := body.read():
                    size += len(block)
                    if size > _LONGEST_READ_BYTES:
                        raise RefusedError(
                            f"it has more than {_LONGEST_READ_BYTES / 2**30:g} GiB; check the address"
                        )
                    blocks.append(block)
            return b"".join(blocks)

        return self.repeated(attempt, file, remedy=remedy)

    def repeated(self, attempt: Callable[[], Result], file: str, *, remedy: str) -> Result:
        """What `attempt` returns once it raises no TransferError, with growing pauses between.

        Raises InputError after data.remote.retries repetitions, and for a RefusedError at once.
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
                last, wait_s = shown(str(error)), error.wait_s
            if number < tries:
                # The operating system's generator: equally seeded ranks would all come back at
                # once.
                backoff_s = (
                    _FIRST_WAIT_S
                    * 2 ** min(number - 1, 6)
                    * random.SystemRandom().uniform(0.75, 1.25)
                )
                pause_s = min(_LONGEST_WAIT_S, max(backoff_s, wait_s))
                print(
                    f"namr: {self.shown(file)}: {last}; try {number + 1} of {tries} in {pause_s:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(pause_s)
        raise InputError(
            f"{self.shown(file)} cannot be fetched: {tries} {'try' if tries == 1 else 'tries'}, the last "
            f"said: {last}; {remedy}"
        )

    @property
    def _is_http(self) -> bool:
        return re.match("https?://", self.url, re.IGNORECASE) is not None

    def _address(self, file: str) -> str:
        if is_command(self.url):
            # The name comes from a manifest, the command goes to a shell.
            if not re.fullmatch(r"[\w.-]+", file, re.ASCII):
                raise RefusedError(
                    f"a command can take no name with such characters ({file!r}); rename the shard"
                )
            return self.url.replace("{}", file)
        if not self._is_http:
            return f"{self.url.rstrip('/')}/{file}"
        parts = urlsplit(self.url)
        return urlunsplit(
            (parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{quote(file)}", parts.query, "")
        )


def _http_host(url: str) -> str | None:
    """The server that a URL names; None if none can be."""
    try:
        parts = urlsplit(url)
        unescaped = re.search(r"[^!-~]", url) is not None
        return None if unescaped or parts.port == 0 else parts.hostname
    except ValueError:  # a port that is no number, brackets without an address
        return None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http and https alone; credentials go with it only to the same server."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if (
            made
            and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]
            and req.has_header("Authorization")
        ):
            made.add_unredirected_header("Authorization", str(req.get_header("Authorization")))
        return made


class _HttpBody:
    """One answer of a server, by the standard library. Every wait for a byte is bounded by
    `stall_seconds`."""

    def __init__(self, address: str, start: int, stall_seconds: float) -> None:
        parts = urlsplit(address)
        user, at, host = parts.netloc.rpartition("@")
        # Any other encoding would compress the bytes that a range counts.
        headers = {"User-Agent": f"namr-dist/{__version__}", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
        if at:
            request.add_unredirected_header(
                "Authorization", "Basic " + base64.b64encode(unquote(user).encode()).decode()
            )
        self._stall_seconds = stall_seconds
        with self._troubles():
            self._response = urllib.request.build_opener(_Redirects()).open(
                request, timeout=stall_seconds
            )
        self.start, self.total = self._extent()
        if self.start not in (0, start):
            self.close()
            raise TransferError(
                f"the server answers with byte {self.start} where {start} was asked for",
                afresh=True,
            )

    def read(self) -> bytes:
        with self._troubles():
            # read1 and not read: what has come is kept, whatever becomes of the rest.
            block: bytes = self._response.read1(_BLOCK_BYTES)
        if not block and self._response.length:
            raise TransferError(
                f"the connection broke off {self._response.length} bytes before the end"
            )
        return block

    def close(self) -> None:
        self._response.close()

    def _extent(self) -> tuple[int, int | None]:
        if self._response.status == 206:
            match = re.match(
                r"bytes (\d+)-\d+/(\d+|\*)", self._response.headers.get("Content-Range", "")
            )
            if not match:
                raise TransferError(
                    "the server answers with a range and does not say which", afresh=True
                )
            return int(match[1]), None if match[2] == "*" else int(match[2])
        return 0, self._response.length

    @contextlib.contextmanager
    def _troubles(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            error.close()
            raise _refusal(error.code, error.headers) from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise RefusedError(
                    f"its certificate is not trusted ({cause.verify_message}); check the address, or "
                    "set SSL_CERT_FILE to the authority's certificate"
                ) from None
            raise TransferError(self._words(cause)) from None
        except ValueError as error:  # of a host such as a..b, given or redirected to
            raise RefusedError(f"it is no URL ({error}); check the address") from None

    def _words(self, cause: object) -> str:
        if isinstance(cause, TimeoutError):
            return f"no byte came for {self._stall_seconds:g} s"
        if isinstance(cause, socket.gaierror):
            return f"its host is not known ({cause.strerror})"
        if isinstance(cause, http.client.IncompleteRead):
            return "the connection broke off before the end"
        return str(cause) or type(cause).__name__


def _refusal(code: int, headers: Message) -> Exception:
    """What an HTTP status other than success means."""
    answer = f"the server answers {code} {http.client.responses.get(code, '')}".rstrip()
    if code >= 500 or code in _MENDED_BY_TIME:
        return TransferError(
            answer, afresh=code == 416, wait_s=_asked_wait(headers.get("Retry-After", ""))
        )
    if code in (401, 403, 407):
        return RefusedError(
            f"{answer}; check the credentials in the address or the proxy's, and that they may read it"
        )
    if code in (404, 410):
        return RefusedError(f"{answer}; check the address, or copy the file there")
    if code < 400:
        return RefusedError(
            f"{answer}, without end or to something other than http; check the address"
        )
    return RefusedError(f"{answer}; check the address")


def _asked_wait(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for: a number of them or a date."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        until = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, (until - datetime.datetime.now(until.tzinfo)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


class _PipeBody:
    """Output of a shell command, as WebDataset runs it for its pipe: URLs."""

    start = 0
    total: int | None = None

    def __init__(self, command: str, stall_seconds: float) -> None:
        if webdataset.utils.enforce_security:
            raise RefusedError("WDS_SECURE forbids commands; unset it, or give another URL")
        self._stall_seconds = stall_seconds
        # A session of its own, so that what the shell starts can be ended with it; unbuffered, so
        # that the selector sees every byte.
        self._pipe = Pipe(command, mode="rb", shell=True, bufsize=0, start_new_session=True)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._pipe.stream, selectors.EVENT_READ)

    def read(self) -> bytes:
        if not self._selector.select(self._stall_seconds):
            raise TransferError(f"no byte came for {self._stall_seconds:g} s")
        block: bytes = self._pipe.stream.read(_BLOCK_BYTES)
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
            return self._file.read(_BLOCK_BYTES) or b""

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
    """A file of a store that fsspec knows; time-outs are those of the store's own package."""

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
            block: bytes = self._file.read(_BLOCK_BYTES)
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
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise RefusedError(
                "nothing here reads such URLs; give one of http, https, s3, gs or pipe:COMMAND"
            ) from None
        raise TransferError(str(error) or type(error).__name__) from None
