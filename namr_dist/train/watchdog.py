"""Which rank is in which phase, said by the run itself once it has come to a stop.

A thread of each rank publishes where the rank is, every second, to the key-value store that the
process group was started with, over a connection of its own. The run ends, with one report for all
ranks and EXIT_CODE, or the exit code of the rank that refused to go on, when

- a rank has been in one phase for train.timeout_minutes. Validation begins a phase with every
  batch; one checkpoint, one search of the validation images or one compilation must each take less;
- a rank's connection to another breaks: that one was killed, or its machine is gone;
- another rank has ended by an error of its own. One that is reported in a line, such as an
  InputError, is so once, by the first rank that meets it.

A rank is called silent if it publishes nothing within SILENT_S: then its process is dead, frozen or
cut off. On a GPU, where kernels run behind the thread that issues them, the phase is the one in
which that thread waits. The store lives in the first rank's process or in torchrun's, and may be
lost with it: then the report says so, and what was known READ_EVERY seconds ago.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import asdict, dataclass
from datetime import timedelta
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from namr_dist.errors import exit_code_of, in_one_line
from namr_dist.parallel.host import lost_contact
from namr_dist.parallel.ranks import Rank
from namr_dist.text import printable
from namr_dist.train.phases import STEP_PHASES, Phases
from namr_dist.train.signals import StopRequests

EXIT_CODE = 69
"""Of a rank that the watchdog ends: EX_UNAVAILABLE of sysexits.h."""
BEAT_S = 1.0
READ_EVERY = 10
"""Beats between two looks at the other ranks, while all is well: each rank reads what each
published."""
SILENT_S = 5.0
_ANSWER_S = 5.0
_OTHERS_REPORT_S = 20.0

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is, as it published last. Times are of its machine's clock."""

    rank: int
    host: str
    pid: int
    beat: int
    beat_unix_s: float
    step: int
    phase: str
    since_unix_s: float
    ended: str | None = None
    """What ended the rank's training; "" if nothing was wrong, None while it trains."""
    lost: bool = False
    """It was ended by a broken connection to another rank."""


def backend_timeout(timeout_minutes: float) -> timedelta:
    """How long collectives may wait: somewhat longer than the watchdog, which can say more."""
    return timedelta(minutes=1.25 * timeout_minutes + 1)


class Watchdog:
    """Within its `with`, the run is watched; see above. Every rank needs one, once the process
    group has started."""

    def __init__(
        self, phases: Phases, rank: Rank, requests: StopRequests, *, timeout_minutes: float
    ) -> None:
        """requests: heard until the watchdog ends the process."""
        self._phases = phases
        self._rank = rank
        self._requests = requests
        self._limit_s = 60 * timeout_minutes
        self._host = socket.gethostname()
        self._store = _Store()
        self._beats = 0
        self._ended: str | None = None
        self._lost = False
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._known: list[Place] = []
        self._began_s = self._error_seen_s = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or not isinstance(error, Exception):
            self._ended = ""
        else:
            self._lost = lost_contact(error)
            self._ended = (
                _first_sentence(error)
                if self._lost
                else f"{type(error).__name__}: {error}".splitlines()[0]
            )
        if self._lost:
            self._wake.set()
            self._thread.join()  # it ends the process
        code = None if error is None else exit_code_of(error)
        if error is not None and code is not None and self._rank.world_size > 1:
            self._refuse(error, code)
        self._stop.set()
        self._wake.set()
        self._thread.join(2 * _ANSWER_S)
        self._exchange(read=False)

    def _watch(self) -> None:
        latest_s = time.monotonic()
        while not self._stop.is_set():
            now_s = time.monotonic()
            if now_s - latest_s > BEAT_S + 2 * _ANSWER_S:
                # This process was suspended, with its clock running: a stopped job has made no
                # progress, and may.
                self._began_s = now_s
            latest_s = now_s
            claimed = self._exchange(read=self._beats % READ_EVERY == 0)
            why = self._trouble(claimed)
            if why is not None and not self._stop.is_set():
                self._end(why)
            self._wake.wait(BEAT_S)

    def _exchange(self, *, read: bool) -> bool:
        """Publish this rank's place, with `read` look at all others'; whether a rank has begun a
        report."""
        self._beats += 1
        mine, ranks = json.dumps(asdict(self._place())), range(self._rank.world_size)

        def talk(store: dist.Store) -> tuple[list[str], bool]:
            store.set(_key(self._rank.rank), mine)
            keys = [_key(rank) for rank in ranks] if read else []
            if keys and not store.check(keys):  # some have not begun: a read would wait for them
                keys = [key for key in keys if store.check([key])]
            return [entry.decode() for entry in store.multi_get(keys)] if keys else [], store.check(
                [_CLAIM]
            )

        entries, claimed = self._store.ask(talk) or ([], False)
        if entries:
            self._known = [Place(**json.loads(entry)) for entry in entries]
        return claimed

    def _place(self) -> Place:
        now_s, unix_s = time.monotonic(), time.time()
        return Place(
            rank=self._rank.rank,
            host=self._host,
            pid=os.getpid(),
            beat=self._beats,
            beat_unix_s=unix_s,
            step=self._phases.step,
            phase=self._phases.broken or self._phases.now,
            since_unix_s=unix_s - (now_s - self._phases.since_s),
            ended=self._ended,
            lost=self._lost,
        )

    def _trouble(self, claimed: bool) -> str | None:
        """What is wrong, or None."""
        here, now_s = f"rank {self._rank.rank}, in {_phase(self._place())}", time.monotonic()
        if self._lost:
            return f"{here}, lost the connection to another rank ({self._ended})"
        if now_s - max(self._phases.since_s, self._began_s) > self._limit_s:
            return f"no progress for {self._limit_s:g} s (train.timeout_minutes), says {here}"
        broken = [place.rank for place in self._known if place.ended and not place.lost]
        if not broken:
            self._error_seen_s = now_s
        # Time to meet the same error, and say so in its own words.
        elif now_s - self._error_seen_s > SILENT_S:
            return f"rank {broken[0]} has ended by an error, says {here}"
        return f"{here}, ends with the others" if claimed else None

    def _end(self, why: str) -> None:
        """Report, or wait for another rank's report, and end the process."""
        self._requests.no_more()
        me = str(self._rank.rank)
        first = self._store.ask(lambda store: store.compare_set(_CLAIM, "", me).decode() == me)
        if first is not False:  # without the store, each rank reports
            self._say(why)
            self._store.ask(lambda store: store.set(_TOLD, me))
            # The store may live here, and the others still have to hear of it.
            deadline_s = time.monotonic() + (3 * BEAT_S if self._rank.world_size > 1 else 0)
        else:
            deadline_s = time.monotonic() + _OTHERS_REPORT_S
        told = False
        while time.monotonic() < deadline_s and not (told and first is False):
            time.sleep(BEAT_S)
            self._exchange(read=False)
            told = bool(self._store.ask(lambda store: store.check([_TOLD])))
        if first is False and not told:
            _print(f"namr: error: {why}")
        os._exit(self._exit_code(default=EXIT_CODE))

    def _refuse(self, error: BaseException, code: int) -> NoReturn:
        """Say an error that is reported in one line, once for all ranks, and end the process; the
        others end with the same exit code."""
        self._requests.no_more()
        me = str(self._rank.rank)
        # Of ranks that meet the same error at the same moment, the one whose code is kept says it.
        mine = f"{code} of rank {me}"
        first = self._store.ask(lambda store: store.compare_set(_CODE, "", mine).decode() == mine)
        self._store.ask(lambda store: store.compare_set(_CLAIM, "", me))
        if first is not False:
            _print(f"namr: error: {in_one_line(error)} (rank {me} on {self._host})")
        self._store.ask(lambda store: store.set(_TOLD, me))
        # The store may live here, and the others still have to hear of it.
        time.sleep(3 * BEAT_S)
        os._exit(self._exit_code(default=code))

    def _exit_code(self, *, default: int) -> int:
        """That of the rank that refused to go on, if one did."""
        there = self._store.ask(lambda store: store.check([_CODE]))
        code = self._store.ask(lambda store: store.get(_CODE)) if there else None
        return int(code.split()[0]) if code else default

    def _say(self, why: str) -> None:
        self._exchange(read=True)
        before = {place.rank: place.beat for place in self._known}
        if self._rank.world_size > 1:
            time.sleep(SILENT_S)
        self._exchange(read=True)
        if self._store.works:
            heard = {
                place.rank
                for place in self._known
                if place.ended is not None or place.beat != before.get(place.rank)
            }
            silent = set(range(self._rank.world_size)) - heard
            trouble = ""
        else:
            silent = set()
            trouble = f"\n  {self._store.address} does not answer: rank 0 or its launcher is dead, frozen or cut off"
        lines = describe(self._known, silent=silent, now_unix_s=time.time())
        known = "" if self._store.works else " (what was known before)"
        _print(
            f"namr: error: {why}; the run ends{trouble}\n"
            + "\n".join(f"  {line}{known}" for line in lines)
            + "\n  the same command with --resume goes on from the last checkpoint"
        )


def describe(places: Sequence[Place], *, silent: set[int], now_unix_s: float) -> list[str]:
    """A line for each group of ranks that are at one place: the silent ones first, then those that
    ended by an error, then by how far they are; `silent` may name ranks that never published."""
    known = {place.rank: place for place in places}
    groups: dict[tuple, list[int]] = {}
    texts: dict[tuple, str] = {}
    for rank in sorted(known.keys() | silent):
        place = known.get(rank)
        if place is None:
            key, text = (0, 0, 0, ""), "never published anything"
        else:
            order = (
                STEP_PHASES.index(place.phase) if place.phase in STEP_PHASES else len(STEP_PHASES)
            )
            kind = (
                0
                if rank in silent
                else 3
                if place.ended == "" or place.lost
                else 2
                if place.ended is None
                else 1
            )
            # Each of the first two kinds has a line of its own.
            key = (
                kind,
                place.step,
                order,
                place.phase + str(place.ended) + (str(rank) if kind < 2 else ""),
            )
            text = _state(place, silent=rank in silent, now_unix_s=now_unix_s)
        groups.setdefault(key, []).append(rank)
        texts.setdefault(key, text)
    return [f"{_names(groups[key], known)}: {texts[key]}" for key in sorted(groups)]


def _state(place: Place, *, silent: bool, now_unix_s: float) -> str:
    if silent:
        return (
            f"silent for {now_unix_s - place.beat_unix_s:.0f} s (dead, frozen or cut off); last heard of in "
            f"{_phase(place)}"
        )
    if place.ended is None:
        return f"in {_phase(place)} for {now_unix_s - place.since_unix_s:.0f} s"
    return f"ended in {_phase(place)}" + (f" by {place.ended}" if place.ended else "")


def _names(ranks: Sequence[int], known: dict[int, Place]) -> str:
    if len(ranks) == 1:
        place = known.get(ranks[0])
        return f"rank {ranks[0]}" + (f" on {place.host} (pid {place.pid})" if place else "")
    # 0, 1, 2, 5 → 0-2, 5
    parts, first = [], ranks[0]
    for rank, following in zip(ranks, [*ranks[1:], -1], strict=True):
        if following != rank + 1:
            parts.append(f"{first}-{rank}" if first < rank else str(rank))
            first = following
    return f"ranks {', '.join(parts)}"


def _phase(place: Place) -> str:
    return f"'{place.phase}' of step {place.step}"


def _first_sentence(error: BaseException) -> str:
    """gloo's errors begin with a source file in brackets and end with advice."""
    return (str(error).splitlines() or [""])[0].split("] ", 1)[-1].split(". ")[0]


def _print(text: str) -> None:
    # A progress bar hides the cursor, and this process is about to end without showing it again.
    cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    print(cursor + printable(text, keep="\n"), file=sys.stderr, flush=True)


_CLAIM, _TOLD, _CODE = "namr/report", "namr/told", "namr/code"


def _key(rank: int) -> str:
    return f"namr/rank/{rank}"


class _Store:
    """The process group's store over another connection, used by a thread of its own: a store in a
    frozen process answers nothing, ever, and no time-out of torch ends all its calls."""

    def __init__(self) -> None:
        # A copy, so that no collective waits for these calls, nor they for one. There is no public
        # way to it.
        self._store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.works = True
        self.address = (
            f"the store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        )
        self._calls: SimpleQueue[tuple[Callable[[dist.Store], Any], Future]] = SimpleQueue()
        threading.Thread(target=self._serve, name="watchdog store", daemon=True).start()

    def ask(self, function: Callable[[dist.Store], _T]) -> _T | None:
        """What the function returns; None if the store does not answer, or still owes another
        answer."""
        if not self.works:
            return None
        future: Future[_T] = Future()
        self._calls.put((function, future))
        try:
            return future.result(_ANSWER_S)
        except NoAnswer:
            self.works = future.done()
            return None
        except dist.DistError:
            return None

    def _serve(self) -> None:
        while True:
            function, future = self._calls.get()
            try:
                result = function(self._store)
            except dist.DistError as error:
                self.works = False  # for good: the connection is broken
                future.set_exception(error)
            else:
                self.works = True
                future.set_result(result)
