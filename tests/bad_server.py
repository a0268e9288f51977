"""An HTTP server on this machine that serves a folder and misbehaves as told, one fault a
request."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 8192


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    file: str
    start: int
    """First byte that it asks for."""
    authorization: str | None


class BadServer:
    """Serves FOLDER/NAME at `url`/NAME. `faults[NAME]` are used up in order, one a request; then it
    serves well."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.faults: dict[str, list[Callable[[Answer], None]]] = defaultdict(list)
        self.asked: list[Asked] = []
        self.completed: Counter[str] = Counter()
        """Answers that ended with the last byte of the file."""
        self.lock = threading.Lock()
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    Answer(outer, self).give()
                self.close_connection = True

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://{host}:{self.port}/set"

    def starts(self, file: str) -> list[int]:
        """The first bytes that were asked for, request by request."""
        return [asked.start for asked in self.asked if asked.file == file]

    def __enter__(self) -> BadServer:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class Answer:
    """One request and what becomes of it."""

    def __init__(self, server: BadServer, handler: BaseHTTPRequestHandler) -> None:
        self.server = server
        self.handler = handler
        self.file = handler.path.split("?")[0].rsplit("/", 1)[-1]
        wanted = handler.headers.get("Range")
        self.start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        with server.lock:
            server.asked.append(Asked(self.file, self.start, handler.headers.get("Authorization")))
            faults = server.faults[self.file]
            self._fault = faults.pop(0) if faults else None

    def give(self) -> None:
        path = self.server.folder / self.file
        if self._fault:
            self._fault(self)
        elif path.is_file():
            self.send(path.read_bytes())
        else:
            self.head(404)

    def head(self, status: int, **headers: object) -> None:
        self.handler.send_response(status)
        for name, value in {"Content_Length": 0, **headers}.items():
            self.handler.send_header(name.replace("_", "-"), str(value))
        self.handler.end_headers()

    def send(self, body: bytes, *, until: int | None = None, say: int | None = None) -> None:
        """The body from `start` on; `until` cuts what is sent and `say` the length that is
        announced, both in bytes of the whole body."""
        end = len(body) if until is None else until
        length = (say or len(body)) - self.start
        if self.start:
            self.head(
                206,
                Content_Length=length,
                Content_Range=f"bytes {self.start}-{len(body) - 1}/{len(body)}",
            )
        else:
            self.head(200, Content_Length=length)
        for first in range(self.start, end, _BLOCK_BYTES):
            self.handler.wfile.write(body[first : min(first + _BLOCK_BYTES, end)])
        if until is None:
            with self.server.lock:
                self.server.completed[self.file] += 1

    @property
    def body(self) -> bytes:
        return (self.server.folder / self.file).read_bytes()


def drop(after: int) -> Callable[[Answer], None]:
    """Close the connection once so many bytes of the file are out."""
    return lambda answer: answer.send(answer.body, until=after)


def shorten(after: int) -> Callable[[Answer], None]:
    """Serve a file that ends too early and announce just that."""
    return lambda answer: answer.send(answer.body, until=after, say=after)


def stall(after: int) -> Callable[[Answer], None]:
    """Send so many bytes of the file, then nothing."""

    def fault(answer: Answer) -> None:
        answer.send(answer.body, until=after)
        answer.server.closing.wait(120)

    return fault


def flip(position: int) -> Callable[[Answer], None]:
    """Change one bit."""

    def fault(answer: Answer) -> None:
        body = bytearray(answer.body)
        body[position] ^= 1
        answer.send(bytes(body), until=len(body))

    return fault


def status(code: int, **headers: object) -> Callable[[Answer], None]:
    """Answer with an error."""
    return lambda answer: answer.head(code, **headers)


def whole(answer: Answer) -> None:
    """Take no notice of the range that is asked for."""
    answer.start = 0
    answer.send(answer.body)


def chunked(after: int) -> Callable[[Answer], None]:
    """Announce no length, send so many bytes and break off."""

    def fault(answer: Answer) -> None:
        answer.handler.send_response(200)
        answer.handler.send_header("Transfer-Encoding", "chunked")
        answer.handler.end_headers()
        answer.handler.wfile.write(f"{after:x}\r\n".encode() + answer.body[:after] + b"\r\n")

    return fault


def late(seconds: float) -> Callable[[Answer], None]:
    """Begin after a while."""

    def fault(answer: Answer) -> None:
        answer.server.closing.wait(seconds)
        answer.send(answer.body)

    return fault


def drip(answer: Answer) -> None:
    """Send the whole answer, header and all, but a byte now and then."""
    body = answer.body
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
    _drip(answer, head.encode() + body)


def drip_body(answer: Answer) -> None:
    """The same of the body alone, whose length is not announced."""
    answer.handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    _drip(answer, answer.body)


def _drip(answer: Answer, content: bytes) -> None:
    for byte in content:
        answer.handler.wfile.write(bytes([byte]))
        if answer.server.closing.wait(0.05):
            return
