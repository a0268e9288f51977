"""All ranks before there is a process group: each says that it is here, and whether it can go on.

A process group is made by all ranks or by none: if one never comes, the others wait for half an
hour. So they meet first, on a key-value store at the same address. A rank that cannot go on says
why, once for all that have the same to say, and all end with its exit code; so they do if one on
the same machine is killed meanwhile. Evaluation and embedding meet so until their end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from namr_dist.errors import InputError, TransientError, exit_code_of, in_one_line
from namr_dist.parallel.host import lost_contact
from namr_dist.parallel.ranks import Rank
from namr_dist.text import say

_SHORTEST_POLL_S = 0.02
_LONGEST_POLL_S = 0.5
_COME = timedelta(minutes=10)
"""For a rank to come at all: as long as torchrun waits for nodes."""
_TIMEOUT = timedelta(minutes=30)
"""For one that is here, and verifies the shards meanwhile."""
_LEAVE_S = 60.0
_SAY_AFTER_S = 30.0
_WATCH_S = 1.0
_PREFIX = "namr/meeting"
_ENDED = "{} has ended before {}; see what ended it, and start all ranks again"


class Meeting:
    """One rank's side of it. Alone, it changes nothing."""

    def __init__(self, rank: Rank, *, until: str = "training began") -> None:
        """Finds the first rank, and says that this one is here.

        until: what the ranks need each other for, as an end of "it has ended before …".
        Raises InputError if the first rank's port is taken, TransientError if the first rank does
        not answer there.
        """
        self._rank = rank
        self._ranks = range(rank.world_size)
        self._host = socket.gethostname()
        self._stage = 0
        self._until = until
        self._refused = False
        if rank.world_size == 1:
            return
        self._address, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun listens at that port itself, also for ranks that it starts once more.
        torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._listens = rank.first and not torchruns
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"{_PREFIX}/{attempt}", self._connected())
        self._kernel = _kernel()
        here = {"host": self._host, "kernel": self._kernel, "pid": os.getpid()}
        try:
            self._store.set(_here(rank.rank), json.dumps(here))
            self._end_with_the_others()
        except dist.DistError as error:
            raise self._lost(error) from None

    def _connected(self) -> dist.Store:
        try:
            return self._connect(timedelta(seconds=_SAY_AFTER_S))
        except dist.DistError as error:
            if self._listens:
                raise InputError(
                    f"port {self._port} of {self._address}, at which the ranks meet, cannot be used "
                    f"({_first_line(error)}); set MASTER_PORT to a free port of that machine"
                ) from None
        say(
            f"rank {self._rank.rank} on {self._host} waits for the first rank, at {self._address}:{self._port}",
            file=sys.stderr,
        )
        try:
            return self._connect(_COME - timedelta(seconds=_SAY_AFTER_S))
        except dist.DistError as error:
            raise self._lost(error) from None

    def _connect(self, timeout: timedelta) -> dist.Store:
        # Of several tenants, since the process group will listen at the same port.
        store = dist.TCPStore(
            self._address,
            self._port,
            self._rank.world_size,
            is_master=self._listens,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set_timeout(_TIMEOUT)
        return store

    @contextlib.contextmanager
    def all_or_none(self, *, longest: timedelta | None = _TIMEOUT) -> Iterator[None]:
        """Afterwards all ranks have come so far, and none met an error that ends it; else all end,
        with one exit code, and each different error is printed once.

        longest: for how long a rank that is done waits for one that is here but not done; None, for
        work of any length: until it is done or, on the same machine, has died. Ten minutes, as
        always, for one that has never been here.
        """
        if self._rank.world_size == 1:
            yield
            return
        self._stage += 1
        try:
            yield
            self._await_all(longest)
        except dist.DistError as error:
            raise self._lost(error) from None
        except Exception as error:
            code = exit_code_of(error)
            if code is None:
                self._refuse(None, 1)
                raise  # with its traceback
            raise SystemExit(self._refuse(in_one_line(error), code)) from None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, a rank that is killed ends the others of its machine, and those that lose a
        connection by it, and one that cannot go on ends all: while a process group is made, or in
        its collectives, they would wait for it half an hour."""
        if self._rank.world_size == 1:
            yield
            return
        left = threading.Event()
        thread = threading.Thread(target=self._watch, args=(left,), name="meeting", daemon=True)
        thread.start()
        try:
            yield
        except Exception as error:
            if not lost_contact(error):
                raise
            with contextlib.suppress(dist.DistError):
                self._end_with_the_others()  # which have said why
            raise SystemExit(
                self._refuse(
                    f"a connection to another rank broke before {self._until} ({_first_line(error)}); "
                    "see what ended it, and start all ranks again",
                    TransientError.exit_code,
                )
            ) from None
        finally:
            left.set()
            thread.join()

    def _watch(self, left: threading.Event) -> None:
        gone: set[int] = set()
        while not left.wait(_WATCH_S) and not self._refused:
            code, why = None, None
            try:
                if self._store.check(["code"]):
                    code = int(self._store.get("code"))
                else:
                    seen, gone = gone, {rank for rank in self._ranks if self._has_died(rank)}
                    lost = sorted(seen & gone)
                    why = self._ended(lost) if lost else None
            except dist.DistError as error:
                why = str(self._lost(error))
            # Ranks that refuse to begin end one after the other, and this one may be the next.
            if (code is None and why is None) or left.wait(_WATCH_S) or self._refused:
                continue
            if code is not None:
                self._leave()
                os._exit(code)
            assert why is not None
            os._exit(self._refuse(why, TransientError.exit_code))

    def _refuse(self, text: str | None, code: int) -> int:
        """Say what is wrong, unless a rank has said the same, and have all end with one exit code:
        that which was given first, returned here."""
        self._refused = True
        text_hash = hashlib.sha256((text or "").encode()).hexdigest()
        where = f"rank {self._rank.rank} on {self._host}"
        first = True
        try:
            first = self._store.add(f"said/{text_hash}", 1) == 1
            code = int(self._store.compare_set("code", "", str(code)))
        except dist.DistError:  # the first rank has gone
            pass
        if text is not None and first:
            say(f"namr: error: {text} ({where})", file=sys.stderr)
        self._leave()
        return code

    def _leave(self) -> None:
        """What each rank does before it ends; the store is lost with the process that has it, and
        the others still have to hear of the end, or to come."""
        with contextlib.suppress(dist.DistError):
            self._store.set(f"left/{self._rank.rank}", "")
            until_s = time.monotonic() + (_LEAVE_S if self._listens else 0)
            while time.monotonic() < until_s and self._lacks("left/{}".format):
                time.sleep(_LONGEST_POLL_S / 5)

    def _let_all_see(self) -> None:
        """What each rank does once it has seen that all are ready: after the last stage the first
        one may end, and the store with it, while the others have yet to look."""
        self._store.set(self._seen(self._rank.rank), "")
        if not self._listens:
            return  # and look no more: the store may be gone
        until_s = time.monotonic() + _LEAVE_S
        while time.monotonic() < until_s and self._lacks(self._seen):
            self._end_with_the_others()
            time.sleep(_SHORTEST_POLL_S)
        self._end_with_the_others()  # one may have given up just before all were ready

    def _lacks(self, key: Callable[[int], str]) -> bool:
        """Whether another rank, not known to be dead, has yet to set its key."""
        return not self._store.check([key(rank) for rank in self._ranks]) and not all(
            self._store.check([key(rank)]) or self._has_died(rank)
            for rank in self._ranks
            if rank != self._rank.rank
        )

    def _await_all(self, longest: timedelta | None) -> None:
        began_s, said, poll_s = time.monotonic(), False, _SHORTEST_POLL_S
        self._store.set(self._ready(self._rank.rank), "")
        while missing := self._missing():
            self._end_with_the_others()
            waited_s = time.monotonic() - began_s
            if self._rank.first and waited_s > _SAY_AFTER_S and not said:
                said = True
                say(f"waiting for {self._described(missing)}", file=sys.stderr)
            for one in missing:
                # It may have said why, or become ready, in its last moment.
                if self._has_died(one) and one in self._missing():
                    self._end_with_the_others()
                    raise TransientError(self._ended([one]))
            limit = longest if all(self._place(one) for one in missing) else _COME
            if limit is not None and waited_s > limit.total_seconds():
                raise TransientError(
                    f"{self._described(missing)} did not come within {waited_s:.0f} s; see what keeps "
                    "them, and start all ranks again"
                )
            time.sleep(poll_s)
            poll_s = min(1.5 * poll_s, _LONGEST_POLL_S)
        self._end_with_the_others()
        self._let_all_see()

    def _end_with_the_others(self) -> None:
        if self._store.check(["code"]):
            code = int(self._store.get("code"))
            self._leave()
            raise SystemExit(code)

    def _missing(self) -> list[int]:
        """Ranks that are not ready yet."""
        if self._store.check([self._ready(rank) for rank in self._ranks]):
            return []
        return [rank for rank in self._ranks if not self._store.check([self._ready(rank)])]

    def _ready(self, rank: int) -> str:
        return f"ready/{self._stage}/{rank}"

    def _seen(self, rank: int) -> str:
        return f"seen/{self._stage}/{rank}"

    def _place(self, rank: int) -> dict | None:
        """Where a rank is, if it has come."""
        if not self._store.check([_here(rank)]):
            return None
        place: dict = json.loads(self._store.get(_here(rank)))
        return place

    def _has_died(self, rank: int) -> bool:
        """Whether a rank of this machine was here and is no more."""
        place = self._place(rank)
        if place is None or place["kernel"] != self._kernel:
            return False
        try:
            with open(f"/proc/{place['pid']}/stat", encoding="utf-8", errors="replace") as file:
                ended = file.read().rpartition(")")[2].split()[0] in "ZX"  # nobody has asked yet
        except FileNotFoundError:
            ended = True
        except OSError:
            return False
        return ended

    def _ended(self, ranks: list[int]) -> str:
        return _ENDED.format(self._described(ranks), self._until)

    def _described(self, ranks: list[int]) -> str:
        """Ranks, with their machines where they have come."""
        names = []
        for rank in ranks[:4]:
            place = self._place(rank)
            names.append(
                f"rank {rank} on {place['host']} (pid {place['pid']})"
                if place
                else f"rank {rank}, not heard of yet"
            )
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return "; ".join(names) + more

    def _lost(self, error: Exception) -> TransientError:
        return TransientError(
            f"rank {self._rank.rank}: the first rank does not answer at {self._address}:{self._port} "
            f"({_first_line(error)}); see what it says, and start all ranks again"
        )


def _here(rank: int) -> str:
    return f"here/{rank}"


def _kernel() -> str:
    """Where a process's number means the same process: this boot of this machine, and the
    container in it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
