"""A pool of real gloo ranks that lives as long as the test session: starting processes costs seconds each."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_TIMEOUT_S = 120


class Ranks:
    """`world_size` processes in one process group. Call it with a function at module level and its arguments."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; a rank's exception fails the test with its traceback."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer within {_TIMEOUT_S} s")
            good, value = pipe.recv()
            if not good:
                raise AssertionError(f"rank {rank}:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
