"""Where the nodes meet: a key-value store in the first node's process, or in torchrun's."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from namr_dist.cluster.deadline import MORE_TIME, Deadline, TooLateError, node_name, within
from namr_dist.errors import InputError
from namr_dist.parallel.ranks import Launch

_CONNECTED = 0.7
"""Share of the limit by which a node has found the first."""
_PREFIX = "namr/preflight"
_POLL_S = 0.1
_LEAVE_S = 2.0


class FirstNodeGoneError(Exception):
    """The first node does not answer, or no longer."""


class Rendezvous:
    """One node's side of it; the first also sees what all others publish.

    Calls raise torch's DistError once the connection is lost. A store in a frozen process answers
    nothing, ever: the deadline then ends this one.
    """

    def __init__(self, launch: Launch, deadline: Deadline) -> None:
        """Raises InputError if the first node cannot open its port, FirstNodeGoneError if another
        does not find it."""
        self.rank, self.size = launch.rank, launch.world_size
        self.address = f"{launch.master_addr}:{launch.master_port}"
        self._deadline = deadline
        deadline.doing = f"meeting the first node at {self.address}: see what it says"
        self._own = self._open(launch)
        self._store = dist.PrefixStore(_PREFIX, self._own)

    def _open(self, launch: Launch) -> dist.Store:
        if self.size == 1:
            return dist.HashStore()
        # It listens at that port itself.
        torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self.rank > 0 or torchruns:
            self._await_listener(launch)

        if not self._deadline.left_s(_CONNECTED):
            raise InputError(
                f"preflight: {node_name()}: took {self._deadline.passed_s:.0f} s to start; put the Python "
                f"environment {sys.prefix} on a faster file system {MORE_TIME}"
            )

        def open_store() -> dist.Store:
            return dist.TCPStore(
                launch.master_addr,
                launch.master_port,
                self.size,
                is_master=self.rank == 0 and not torchruns,
                wait_for_workers=False,
                timeout=timedelta(seconds=self._deadline.left_s(_CONNECTED)),
            )

        try:
            # Not by its own time-out alone, which a listener that says nothing outlasts.
            return within(self._deadline.left_s(_CONNECTED), open_store)
        except (TooLateError, dist.DistError) as error:
            reason = str(error).splitlines()[0] if str(error) else "no answer"
            if self.rank > 0:
                raise FirstNodeGoneError(
                    f"{self.address} does not speak as the first node does ({reason}); see what "
                    "the first node says"
                ) from None
            if "EADDRINUSE" in reason:
                raise InputError(
                    f"preflight: port {launch.master_port} of {launch.master_addr} is taken by another "
                    "program; set NAMR_PORT to a free port, or leave it unset"
                ) from None
            raise InputError(
                f"preflight: the first node cannot listen at {self.address} ({reason}); set MASTER_ADDR "
                "to a name of the first node"
            ) from None

    def _await_listener(self, launch: Launch) -> None:
        while True:
            try:
                socket.create_connection(
                    (launch.master_addr, launch.master_port), timeout=2
                ).close()
                return
            except OSError as error:
                if not self._deadline.left_s(_CONNECTED):
                    raise FirstNodeGoneError(
                        f"the first node does not answer at {self.address} ({error}); look there "
                        f"whether it starts, and between the nodes for a firewall {MORE_TIME}"
                    ) from None
            time.sleep(_POLL_S)

    def begin(self, doing: str) -> None:
        """Say what this node does next, and what it may mean if nothing more is heard of it."""
        self._deadline.doing = doing
        self.publish(f"doing/{self.rank}", doing)

    def publish(self, key: str, value: str) -> None:
        """Let all nodes read it."""
        self._store.set(key, value)

    def read(self, key: str, *, share: float) -> str | None:
        """What a node published, waited for until this share of the limit; None if nothing came."""
        return self.gather([key], share=share).get(key)

    def gather(self, keys: list[str], *, share: float) -> dict[str, str]:
        """The same of many keys, without those that nothing came for."""
        # By looks, not by the store's own wait: that one warns in C++ where a time-out is no
        # surprise.
        while not self._store.check(keys) and self._deadline.left_s(share):
            time.sleep(_POLL_S)
        there = [key for key in keys if self._store.check([key])]
        return (
            {
                key: value.decode()
                for key, value in zip(there, self._store.multi_get(there), strict=True)
            }
            if there
            else {}
        )

    def another_connection(self) -> dist.Store:
        """The store for a process group, whose calls would keep this node's waiting."""
        return dist.PrefixStore(_PREFIX, self._own.clone())  # type: ignore[attr-defined]

    def leave(self, others: int) -> None:
        """The last call of each node. The first, with whom the store ends, waits a moment for so
        many others."""
        left = self._store.add("left", 1 if self.rank > 0 else 0)
        until_s = time.monotonic() + min(_LEAVE_S, self._deadline.left_s(1.0))
        while self.rank == 0 and left < others and time.monotonic() < until_s:
            time.sleep(_POLL_S)
            left = self._store.add("left", 0)
