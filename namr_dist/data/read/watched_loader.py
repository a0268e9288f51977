"""A DataLoader whose worker processes are watched: none dies, hangs or outlives its parent
unnoticed."""

from __future__ import annotations

import atexit
import ctypes
import math
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, TypeVar

from torch.utils.data import DataLoader

from namr_dist.errors import TransientError

LOOK_S = 1.0
"""Seconds between two looks at the workers while a batch is waited for: the DataLoader's own
time-out."""

_DYING_S = 5.0
_TIMED_OUT = "DataLoader timed out"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_T = TypeVar("_T")


class WatchedLoader(Generic[_T]):
    """Within its `with`, the batches of a DataLoader by `next`. It is left with no worker alive."""

    def __init__(self, made: DataLoader[_T], *, timeout_s: float) -> None:
        """made: if it has workers, with a time-out of LOOK_S or less, and with `set_up_worker`."""
        self._made = made
        self._timeout_s = timeout_s
        self._workers: list[BaseProcess] = []

    def __enter__(self) -> WatchedLoader[_T]:
        before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        self._batches: Iterator[_T] = iter(self._made)
        self._workers = [
            child for child in multiprocessing.active_children() if child not in before
        ]
        # An error elsewhere may keep this open in its traceback, and at its end Python would wait
        # for the workers.
        atexit.register(self._kill)
        if threading.current_thread() is threading.main_thread():
            # DataLoader's handler raises a RuntimeError wherever this process may be when a worker
            # dies, in the middle of a step as well.
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Without references to it, DataLoader asks its workers to end, and waits for each for
        # seconds.
        del self._batches
        # One that is blocked in a read heeds neither that nor SIGTERM, and Python waits for it at
        # its own end.
        self._kill()
        atexit.unregister(self._kill)

    def next(self, files: Callable[[], list[str]]) -> _T | TransientError | None:
        """The next batch; None after the last; a TransientError if a worker has died, or if none
        came for `timeout_s`.

        files: those that the batch is read from, to be named then.
        """
        # Looks are counted, and not seconds, of which a suspended process has any number.
        for _ in range(max(1, math.ceil(self._timeout_s / LOOK_S))):
            try:
                return next(self._batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                timed_out = str(error).startswith(_TIMED_OUT)
                # A worker's connections break before it can be seen to have ended.
                if dead := self._dead(within_s=0 if timed_out else _DYING_S):
                    return TransientError(_obituary(dead))
                if not timed_out:
                    raise
        # Now, or DataLoader would wait for them. All are blocked or idle, so none holds a lock that
        # it needs.
        self._kill()
        named = files()
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return TransientError(
            f"no batch came for {self._timeout_s:g} s (data.batch_minutes); its images are read from "
            f"{', '.join(named[:3])}{more}; check that storage answers, or raise data.batch_minutes, and "
            "go on with --resume"
        )

    def _dead(self, *, within_s: float) -> BaseProcess | None:
        ending = connection.wait([worker.sentinel for worker in self._workers], timeout=within_s)
        for worker in self._workers:
            if worker.sentinel in ending:
                worker.join(_DYING_S)  # how it has ended is known only after its files are closed
        return next((worker for worker in self._workers if worker.exitcode is not None), None)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()


def set_up_worker(number: int) -> None:
    """What each worker does first."""
    # Launchers and terminals signal the whole process group; a parent that wants to end in good
    # order still needs its batches.
    for request in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(request, signal.SIG_IGN)
    # A worker looks for its parent between two batches only, and a read may hang for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _obituary(worker: BaseProcess) -> str:
    code = worker.exitcode
    assert code is not None
    end = (
        f"was ended by signal {-code} ({signal.Signals(-code).name})"
        if code < 0
        else f"ended with exit code {code}"
    )
    remedy = (
        "enlarge /dev/shm (docker run --shm-size) or lower data.workers"
        if code == -signal.SIGBUS
        else "lower data.workers or check memory"
    )
    return f"a data worker process ({worker.pid}) {end}; {remedy}, then go on with --resume"
