"""The process that serves: its socket, slow clients, and how it ends.

uvicorn's own end loses requests: it closes connections in which none has begun, also those whose
request is on its way or that the kernel has accepted meanwhile, and then it dies of the signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from namr_dist.errors import InputError
from namr_dist.serve.app import make_app
from namr_dist.serve.guard import Guard
from namr_dist.serve.limits import Limits
from namr_dist.text import say
from namr_dist.train.signals import SAME_S

if TYPE_CHECKING:
    from namr_dist.gallery.gallery import Gallery

_HEAD_SECONDS = 15.0
"""In which a client has to send a request's head, once it is connected or has an answer."""
_MOST_CONNECTIONS = 512
_LATE_SECONDS = 2.0
"""At most, after a signal, for requests that are on their way in connections that are open."""
_TICK_SECONDS = 0.02
_LAST_SECONDS = 60.0
"""After the longest that a picture may take to be sent, for searches that wait then, and for
clients that do not take their answer."""
_BACKLOG = 128
_BLANK = np.zeros((64, 64, 3), dtype=np.uint8)


class _Protocol(H11Protocol):
    """A connection that is closed if no request comes for long, though bytes may."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        # What is still sent after its answer, such as the rest of a picture that is too large, is
        # read for as long, so that the client comes to read the answer.
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """One that answers every request whose connection was accepted before a signal, and then ends
    as a command that has done its work. A second signal ends it at once."""

    def __init__(
        self, guard: Guard, listener: socket.socket, limits: Limits, *, greeting: Sequence[str]
    ) -> None:
        """greeting: lines to print once it listens."""
        config = uvicorn.Config(
            guard,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            # The log is the guard's; uvicorn's own knows no harmless names.
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=round(limits.body_seconds + _LAST_SECONDS),
        )
        super().__init__(config)
        self._guard = guard
        self._listener = listener
        self._greeting = greeting
        self._stopped_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does, instead of uvicorn's way."""
        now_s = time.monotonic()
        if not self.should_exit:
            self.should_exit, self._stopped_s = True, now_s
            _note(f"{signal.Signals(sig).name}: every request is answered, then this ends")
        elif now_s - self._stopped_s > SAME_S:
            _note(f"{signal.Signals(sig).name} again: ended, with requests unanswered")
            os._exit(128 + sig)  # as a shell counts signals

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and then say so."""
        await super().startup(sockets)
        say(*self._greeting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has been accepted."""
        self._guard.stopping = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        for _ in range(5):  # turns of the loop, in which accepted sockets become connections
            await asyncio.sleep(0)
        accepted = _all_accepted(self._listener)
        for server in self.servers:
            server.close()
        for connection in accepted:
            await loop.connect_accepted_socket(self._protocol, connection)
        late_s = loop.time() + _LATE_SECONDS
        while self.server_state.connections and loop.time() < late_s:
            await asyncio.sleep(_TICK_SECONDS)
        await super().shutdown(sockets)

    def _protocol(self) -> _Protocol:
        return _Protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def _note(text: str) -> None:
    # Not by say: a signal may come while it writes.
    with contextlib.suppress(OSError):
        os.write(2, f"namr: {text}\n".encode())


def _all_accepted(listener: socket.socket) -> list[socket.socket]:
    """What the kernel holds ready; closing the listener would reset it."""
    accepted = []
    with contextlib.suppress(OSError):  # BlockingIOError: no more of them
        while True:
            accepted.append(listener.accept()[0])
    for connection in accepted:
        connection.setblocking(False)
    return accepted


def bind(host: str, port: int) -> socket.socket:
    """A socket at the first address of a host that takes it; port 0: any that is free. It does not
    listen yet. Raises InputError, naming the option."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--host {host} is no address of this machine ({error}); give 127.0.0.1, or 0.0.0.0 for "
            "all of its addresses"
        ) from None
    reasons: list[str] = []
    for family, kind, protocol, _, address in found:
        try:
            return _bound(family, kind, protocol, address)
        except OSError as error:
            reasons.append(error.strerror or str(error))
    raise InputError(
        f"--port {port} of --host {host} cannot be had ({', '.join(dict.fromkeys(reasons))}); give another "
        "port, or another host"
    )


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        # A port whose last service has just ended is free.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def serve(open_gallery: Callable[[], Gallery], *, host: str, port: int, limits: Limits) -> None:
    """Serve a gallery until a signal comes; it is opened once the port is there.

    Raises InputError for an address that cannot be had, and whatever opening raises.
    """
    with bind(host, port) as listener:
        gallery = open_gallery()
        # Whatever a first search loads is loaded, and found missing, before anybody waits for it.
        gallery.search(_BLANK, k=1)
        address, number = listener.getsockname()[:2]
        shown = f"[{address}]" if listener.family == socket.AF_INET6 else address
        local = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        guard = Guard(make_app(gallery, limits), local=local, names=(host.lower(), shown))
        greeting = [
            f"{gallery.name} ({len(gallery):,} pictures) is served at http://{shown}:{number}/ until "
            "Ctrl-C"
        ]
        if not local:
            greeting.append(
                f"warning: whoever reaches {shown}:{number} can search and see the pictures: there is "
                "no password and no encryption here"
            )
        Server(guard, listener, limits, greeting=greeting).run([listener])
