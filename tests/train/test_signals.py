"""Requests to stop, as people, terminals, launchers and schedulers make them, in a process of
steps."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

from namr_dist.train.signals import STOP_SIGNALS

# Steps of 20 ms; the fifth, if the word is "hangs", never ends and runs no Python, as a collective
# without its other ranks. The "checkpoint" takes a while, and so does the end of the process.
STEPS = """
import ctypes, sys, time
from pathlib import Path
from namr_dist.train.signals import EXIT_CODE, StopRequests

def run():
    with StopRequests(until_exit=True) as requests:
        for step in range(10**9):
            Path("step").write_text(str(step))
            if step == 5 and sys.argv[1] == "hangs":
                libc = ctypes.CDLL(None)
                while True:
                    libc.sleep(1000)
            time.sleep(0.02)
            if requests.signal:
                time.sleep(0.05)
                requests.no_more()
                Path("checkpoint").write_text(str(requests.signal))
                return EXIT_CODE

code = run()
time.sleep(0.5)
sys.exit(code)
"""


class Steps:
    """The process, in a folder of its own."""

    def __init__(self, folder: Path, word: str, *ignored: signal.Signals) -> None:
        self.folder = folder
        program = folder / "steps.py"
        program.write_text(STEPS)

        def ignore() -> None:  # and nothing else, however the tests were started
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, program, word],
            cwd=folder,
            env=ENVIRONMENT,
            text=True,
            stderr=subprocess.PIPE,
            preexec_fn=ignore,
        )
        self.until(lambda: self.step >= 5)

    @property
    def step(self) -> int:
        """Steps done."""
        path = self.folder / "step"
        return int(path.read_text() or 0) if path.exists() else 0

    def until(self, condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 180
        while not condition():
            assert self.process.poll() is None and time.monotonic() < give_up
            time.sleep(0.01)

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and the lines on stderr."""
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said.splitlines()


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Callable[..., Steps]]:
    started: list[Steps] = []

    def start(word: str, *ignored: signal.Signals) -> Steps:
        started.append(Steps(tmp_path, word, *ignored))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda one: one.name)
def test_the_first_asks_and_those_after_the_checkpoint_change_nothing(
    steps: Callable[..., Steps], number: signal.Signals
) -> None:
    run = steps("goes on")
    while run.process.poll() is None:  # a storm, until the process has ended
        run.process.send_signal(number)
        time.sleep(0.01)
    assert run.end() == (75, [])
    assert (run.folder / "checkpoint").read_text() == str(int(number))


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM], ids=lambda one: one.name
)
def test_a_second_one_within_the_step_ends_it_at_once(
    steps: Callable[..., Steps], number: signal.Signals
) -> None:
    run = steps("hangs")
    run.process.send_signal(number)
    assert run.process.stderr
    lines = [run.process.stderr.readline()]
    run.process.send_signal(number)
    code, more = run.end()
    lines += more
    assert code == 128 + number and not (run.folder / "checkpoint").exists()
    assert len(lines) == 2 and all(number.name in line for line in lines)
    assert "another one ends the run at once" in lines[0] and "--resume" in lines[1]


def test_what_schedulers_and_launchers_repeat_is_one_request(steps: Callable[..., Steps]) -> None:
    run = steps("hangs")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # to the job, and passed on
        run.process.send_signal(number)
    for _ in range(15):  # a notice, however often
        time.sleep(0.1)
        run.process.send_signal(signal.SIGUSR1)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 128 + signal.SIGINT


def test_what_was_ignored_at_the_start_stays_ignored(steps: Callable[..., Steps]) -> None:
    """By nohup, or by a shell that starts a background job; launchers ignore USR1 until ranks hear
    it."""
    run = steps("goes on", signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    for number in (signal.SIGHUP, signal.SIGINT):
        run.process.send_signal(number)
    later = run.step + 20
    run.until(lambda: run.step >= later)
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == (75, [])
