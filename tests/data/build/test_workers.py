"""Tasks on several processes: results, progress, failures and deaths."""

from __future__ import annotations

import os
import signal

import pytest

from namr_dist.data.build.workers import Advance, run_tasks
from namr_dist.errors import InputError

# The processes import this module: it imports little, and each test asks for as few as it can.


def double(task: int, advance: Advance) -> int:
    """Twice the task; 3 is refused, 4 meets what the kernel does to a process that takes too much
    memory, and 5 and 6 end in other ways."""
    advance(1, task)
    if task == 3:
        raise InputError("3 is refused")
    if task == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 5:
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == 6:
        os._exit(9)
    return 2 * task


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_has_its_result_and_tells_how_far_it_is(workers: int) -> None:
    told: list[tuple[int, int]] = []
    results = list(
        run_tasks(
            double, [10, 20, 30], workers=workers, advance=lambda *so_far: told.append(so_far)
        )
    )
    assert sorted(results) == [20, 40, 60] and sorted(told) == [(1, 10), (1, 20), (1, 30)]


def test_no_task_is_no_work() -> None:
    assert list(run_tasks(double, [], workers=2, advance=lambda images, size: None)) == []


@pytest.mark.parametrize(
    ("task", "named"),
    [
        (3, "3 is refused"),
        (4, "a worker process was killed, most likely for want of memory"),
        (5, "a worker process was ended by SIGSEGV; give the same"),
        (6, "a worker process ended with exit code 9; give"),
    ],
)
def test_what_goes_wrong_in_a_process_is_one_clear_error(task: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        list(run_tasks(double, [1, task, 2], workers=2, advance=lambda images, size: None))


def test_what_the_caller_raises_is_its_own() -> None:
    def gone(images: int, size: int) -> None:
        raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError, match="the terminal is gone"):
        list(run_tasks(double, [1, 2], workers=2, advance=gone))
