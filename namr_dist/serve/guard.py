"""Around the whole application: who may ask, what every answer says, and the log.

Plain ASGI, outside of FastAPI's own handling of errors, so that nothing is answered without it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from namr_dist.text import say

_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # A page of another site cannot show the pictures, which would tell it which ones there are.
    (b"cross-origin-resource-policy", b"same-origin"),
)
LEFT = 499
"""Status of what is answered when nobody is there any more; it reaches the log alone."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def host_name(header: str) -> str:
    """The name in a Host header, in lower case and without the port; "" for one of another form."""
    name, colon, port = header.strip().lower().rpartition(":")
    if not colon or header.strip().endswith("]"):  # no port; an IPv6 address has its own colons
        return header.strip().lower()
    return name if port.isdecimal() else ""


class Guard:
    """The application, for requests that may reach it.

    Every answer has headers that keep browsers from more than the page needs, and is a line in the
    log. Whatever is raised within is logged, never sent.
    """

    def __init__(self, app: ASGIApp, *, local: bool, names: Iterable[str] = ()) -> None:
        """local: answer only requests whose Host header names this machine, or is one of `names`.
        Otherwise a page anywhere, whose own name its owner points at 127.0.0.1 (DNS rebinding),
        could have its reader's browser ask, and read the answers."""
        self.stopping = False
        """Whether connections end with the answers that they get now."""
        self._app = app
        self._hosts = {*_LOCAL_NAMES, *names} if local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began_s = time.perf_counter()
        status, size = 0, 0

        async def guarded_send(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *_HEADERS]
                if self.stopping:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            size += len(message.get("body", b""))
            await send(message)

        try:
            if self._hosts is None or self._is_for_this_machine(scope):
                await self._app(scope, receive, guarded_send)
            else:
                await _refuse_host(guarded_send)
        except Exception:
            say(*traceback.format_exc().splitlines(), file=sys.stderr)
        finally:
            _log(scope, status, size, time.perf_counter() - began_s)

    def _is_for_this_machine(self, scope: Scope) -> bool:
        assert self._hosts is not None
        return host_name(Headers(scope=scope).get("host", "")) in self._hosts


async def _refuse_host(send: Send) -> None:
    detail = (
        "this service answers requests for localhost only, and the Host header names another; "
        "open it by the address that it printed"
    )
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _log(scope: Scope, status: int, size: int, seconds: float) -> None:
    client = scope["client"][0] if scope["client"] else "-"
    query = scope["query_string"].decode("latin-1")
    target = scope["path"] + (f"?{query}" if query else "")
    said = {0: "no answer", LEFT: "the client left"}.get(status, str(status))
    line = (
        f"{time.strftime('%H:%M:%S')}  {client}  {scope['method']} {target}  {said}  "
        f"{size:,} B  {1000 * seconds:.0f} ms"
    )
    with contextlib.suppress(OSError):  # whoever read the log has left, and the service goes on
        say(line, file=sys.stderr)
