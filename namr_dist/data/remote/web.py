"""Files behind http and https, by the standard library.

A server may redirect a fetch. It goes on to http and https alone, without the credentials unless
the server is the same, and not to other hosts of this machine's private network: a server elsewhere
must not choose what is asked there. Nor can a server that sends a byte now and then hold a fetch
beyond its deadline.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import http.client
import ipaddress
import math
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from namr_dist import __version__
from namr_dist.data.remote.body import BLOCK_BYTES, RefusedError, TransferError

# Client errors that time mends: time-out, a range that is not there (yet), too early, too many
# requests.
_MENDED_BY_TIME = (408, 416, 425, 429)


def http_host(url: str) -> str | None:
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
        to, before = urlsplit(newurl), urlsplit(req.full_url)
        if to.scheme not in ("http", "https"):
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        if "@" in to.netloc:
            raise RefusedError(
                "it redirects to an address with a user or a password in it; give that address"
            )
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made and to[:2] == before[:2] and req.has_header("Authorization"):
            made.add_unredirected_header("Authorization", str(req.get_header("Authorization")))
        return made


class _Connections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens the connections of one fetch: the first to the source, further ones to where it
    redirects.

    Those of a public source lead to public addresses alone, those of a private source also to its
    own host. Of what a proxy is asked, only addresses that are written as numbers are looked at:
    the proxy alone knows where a name leads.
    """

    def __init__(self, ends: float) -> None:
        """ends: time.monotonic() at which the connection is broken off; infinity: never."""
        super().__init__()
        self._ends = ends
        self._source_host = ""
        self._source_address: str | None = None
        self._latest: socket.socket | None = None
        self._over = False
        self._timer = threading.Timer(max(0.0, ends - time.monotonic()), self._break_off)
        self._timer.daemon = True
        if ends < math.inf:
            self._timer.start()

    def close(self) -> None:
        """Forget the deadline."""
        self._timer.cancel()
        if self._latest:
            self._latest.close()

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(http.client.HTTPConnection, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(http.client.HTTPSConnection, req)

    def _open(
        self, kind: type[http.client.HTTPConnection], req: urllib.request.Request
    ) -> http.client.HTTPResponse:
        host = urlsplit(req.full_url).hostname or ""
        proxied = req.has_proxy() or getattr(req, "_tunnel_host", None) is not None
        if not self._source_host:
            self._source_host = host
            connect = self._to_any if proxied else self._to_source
        else:
            connect = self._to_any if proxied else self._to_other
            if proxied and host != self._source_host:
                with contextlib.suppress(socket.gaierror):  # a name
                    self._addresses(host, None, flags=socket.AI_NUMERICHOST)

        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            made = kind(host, **options)
            # Not `connect`: what follows in it, a proxy's tunnel and TLS, stays the library's.
            made._create_connection = connect  # type: ignore[attr-defined]
            return made

        return self.do_open(connection, req)

    def _to_any(self, address: tuple[str, int], *options: Any) -> socket.socket:
        return self._kept(socket.create_connection(address, *options))

    def _to_source(self, address: tuple[str, int], *options: Any) -> socket.socket:
        made = self._to_any(address, *options)
        self._source_address = made.getpeername()[0]
        return made

    def _to_other(self, address: tuple[str, int], *options: Any) -> socket.socket:
        host, port = address
        trouble: OSError | None = None
        # By number: asked for once more, the name might lead somewhere else.
        for number in self._addresses(host, port):
            try:
                return self._to_any((number, port), *options)
            except OSError as error:
                trouble = error
        raise trouble or OSError(f"{host} has no address")

    def _addresses(self, host: str, port: int | None, *, flags: int = 0) -> list[str]:
        """A host's addresses. Raises RefusedError if a redirect must not lead to one of them."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
        numbers = [str(entry[4][0]) for entry in found]
        source = self._source_address
        at_home = source is not None and not _is_public(source)
        for number in numbers:
            same = number == source or host.lower() == self._source_host
            if not _is_public(number) and not (at_home and same):
                raise RefusedError(
                    f"it redirects to {host} ({number}), another host on a private network; if that is "
                    "where it lies, give its address there"
                )
        return numbers

    def _kept(self, made: socket.socket) -> socket.socket:
        """The connection, which can be broken off from now on."""
        if self._ends < math.inf:
            if self._latest:
                self._latest.close()
            # A second handle of it: the first passes to TLS and to the answer.
            self._latest = made.dup()
            if self._over:
                self._break_off()
        return made

    def _break_off(self) -> None:
        self._over = True
        if self._latest:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                self._latest.shutdown(socket.SHUT_RDWR)


def _is_public(address: str) -> bool:
    """Whether an IP address, as a number, is one of the internet's, not of this machine or of a
    private network (RFC 6890)."""
    number = ipaddress.ip_address(address)
    number = getattr(number, "ipv4_mapped", None) or number
    return number.is_global and not number.is_multicast


class HttpBody:
    """One answer of a server. Every wait for a byte is bounded by `stall_seconds`, and all of them
    together end at `ends`, of time.monotonic()."""

    def __init__(
        self, address: str, start: int, stall_seconds: float, *, ends: float = math.inf
    ) -> None:
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
        timeout_s = min(stall_seconds, max(0.001, ends - time.monotonic()))
        with contextlib.ExitStack() as opened:
            connections = opened.enter_context(contextlib.closing(_Connections(ends)))
            opener = urllib.request.build_opener(_Redirects(), connections)
            with self._troubles():
                self._response = opened.enter_context(opener.open(request, timeout=timeout_s))
            self.start, self.total = self._extent()
            if self.start not in (0, start):
                raise TransferError(
                    f"the server answers with byte {self.start} where {start} was asked for",
                    afresh=True,
                )
            self._opened = opened.pop_all()

    def read(self) -> bytes:
        """The next bytes, as Body has it."""
        with self._troubles():
            # read1 and not read: what has come is kept, whatever becomes of the rest.
            block: bytes = self._response.read1(BLOCK_BYTES)
        if not block and self._response.length:
            raise TransferError(
                f"the connection broke off {self._response.length} bytes before the end"
            )
        return block

    def close(self) -> None:
        """End the connection."""
        self._opened.close()

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
