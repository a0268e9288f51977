"""Tasks on several processes, which tell how far they are and end when the command that started
them does."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from namr_dist.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int, int], None]
"""Called with the images and bytes that have been read since the last call."""


def run_tasks(
    work: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    advance: Advance,
) -> Iterator[Result]:
    """The result of `work` for each task, in the order in which they are ready; one worker is this
    process itself.

    `work`, tasks and results are pickled. What `work` raises is raised here, and InputError if a
    process ends. All processes have ended by the time this returns or raises. To be called by the
    main thread.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield work(task, advance)
        return
    waiting = iter(tasks)
    processes: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            pipe, process = _start(work)
            processes[pipe] = process
        busy = set(processes)
        for pipe, process in processes.items():
            with _alive(process):
                pipe.send(next(waiting))
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                with _alive(processes[ready]):
                    kind, answer = ready.recv()
                if kind == "advance":
                    advance(*answer)
                elif kind == "failed":
                    raise answer
                else:
                    yield answer
                    try:
                        with _alive(processes[ready]):
                            ready.send(next(waiting))
                    except StopIteration:
                        busy.remove(ready)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


@contextlib.contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """For the use of its pipe. Raises InputError, with how it ended, if nobody is at the other
    end."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join()
        code = process.exitcode or 0
        if code == -signal.SIGKILL:
            raise InputError(
                "a worker process was killed, most likely for want of memory; give the same command again "
                "with fewer --workers: finished shards are kept"
            ) from None
        end = (
            f"was ended by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        raise InputError(
            f"a worker process {end}; give the same command again: finished shards are kept"
        ) from None


def _start(work: Callable[[Any, Advance], Any]) -> tuple[Connection, BaseProcess]:
    # Not forked: a copy of this process would hold the other workers' pipes open after its end.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    # Ctrl-C reaches all, and is for the command alone, which then ends its workers: what is ignored
    # is inherited.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()
    return ours, process


def _serve(pipe: Connection, work: Callable[[Any, Advance], Any]) -> None:
    try:
        while True:
            task = pipe.recv()
            try:
                answer = (
                    "done",
                    work(task, lambda images, size: pipe.send(("advance", (images, size)))),
                )
            except ConnectionError:
                raise
            except Exception as error:
                answer = ("failed", error)
            pipe.send(answer)
    except (EOFError, ConnectionError):  # the command was killed
        pass
