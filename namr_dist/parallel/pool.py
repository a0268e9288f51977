"""A pool of gloo ranks on this machine: starting processes costs seconds, so torch is imported once
for all of them, and they are kept for many calls."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

_TIMEOUT_S = 240.0
# Once a rank has failed, the others stand in a collective that it will not join.
_AFTER_FAILURE_S = 10.0


class RankError(RuntimeError):
    """A function failed on a rank; the message has that rank's traceback."""


class Ranks:
    """`world_size` processes in one process group, one thread each. They start at the first call.

    Call it with a function at module level and its arguments. If a rank does not answer, all end,
    and the next call starts others.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank.

        Raises RankError with the first failure's traceback, TimeoutError if a rank gives no answer.
        """
        if not all(process.is_alive() for process in self._processes):
            self.close()
        if not self._processes:
            self._start()
        answers: dict[int, Any] = {}
        failures: list[str] = []
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            deadline = time.monotonic() + _TIMEOUT_S
            while waiting := {
                pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers
            }:
                ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for pipe, rank in ((pipe, rank) for pipe, rank in waiting.items() if pipe in ready):
                    good, answers[rank] = _receive(pipe)
                    if not good:
                        failures.append(f"rank {rank}:\n{answers[rank]}")
                        deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_S)
        except BaseException:
            self.close()
            raise
        missing = [rank for rank in range(self.world_size) if rank not in answers]
        if missing:
            self.close()
        if failures:
            raise RankError(failures[0])
        if missing:
            raise TimeoutError(f"ranks {missing} gave no answer within {_TIMEOUT_S:.0f} s")
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes. The pool can be called again."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        # Not forked from this process, which may run threads and hold a GPU. Where a server runs
        # already, it stays, whatever it has imported.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, port, there, dict(os.environ)),
                daemon=True,
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process ended without an answer"


def _serve(
    rank: int, world_size: int, port: int, pipe: Connection, environment: dict[str, str]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act on
    # Libraries log to stdout, which belongs to the results of whoever started the pool.
    sys.stdout.flush()
    os.dup2(2, 1)
    # The server has that of its own start.
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    while True:
        function, arguments = pipe.recv()
        try:
            answer = (True, function(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _end_with_parent() -> None:
    """A killed parent cannot end its ranks, and one of them may wait in a collective for
    another."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
