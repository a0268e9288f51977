"""Commands and programs as processes that a test may signal and kill, started from one process that
has imported all.

A start from nothing takes seconds, most of them imports; a fork of such a process, a tenth of that.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path

from namr_dist.train.signals import STOP_SIGNALS

_TIMEOUT_S = 120.0
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "160",
}
# From faiss on: what a run imports while it begins, DeepSpeed most of it when it is given an
# optimizer.
_IMPORTS = [
    "namr_dist.cli.main",
    "namr_dist.train.run",
    "namr_dist.results.evaluate_run",
    "namr_dist.api",
    "sklearn.cluster",
    "tyro",
    "deepspeed",
    "faiss",
    "setuptools",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


class Run:
    """`namr train`, or another verb, on some ranks. Each leads a process group of its own, as under
    a launcher."""

    def __init__(
        self, world_size: int, words: Sequence[object], output: Path, *, verb: str = "train"
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._output = output
        output.write_text("")
        launched = [
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            for rank in range(world_size)
        ]
        self.ranks = [
            context.Process(target=_namr, args=(_texts(verb, *words), environment, output, output))
            for environment in launched
        ]
        for process in self.ranks:
            process.start()

    def wait(self) -> list[int]:
        """The exit codes, once all ranks have ended."""
        for process in self.ranks:
            process.join(_TIMEOUT_S)
            if process.exitcode is None:
                self.kill()
                raise TimeoutError(f"a rank went on for {_TIMEOUT_S} s:\n{self.said()}")
        return [process.exitcode or 0 for process in self.ranks]

    def said(self) -> str:
        """All ranks' stdout and stderr."""
        return self._output.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the run does; it must not end before."""
        give_up = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert (
                all(process.is_alive() for process in self.ranks) and time.monotonic() < give_up
            ), self.said()
            time.sleep(0.0005)

    def kill(self, *ranks: int) -> None:
        """kill -9, of all ranks or of some."""
        for rank in ranks or range(len(self.ranks)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid(rank), signal.SIGKILL)

    def pid(self, rank: int) -> int:
        pid = self.ranks[rank].pid
        assert pid
        return pid


class Program:
    """A Python program in such a fork, with a part of subprocess.Popen's interface.

    output: takes its stdout and stderr.
    """

    def __init__(self, path: Path, *words: object, environment: dict[str, str], output: Path):
        context = multiprocessing.get_context("forkserver")
        self._output = output
        output.write_text("")
        self._process = context.Process(
            target=_program, args=(path, _texts(*words), environment, output)
        )
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def said(self) -> str:
        """Its stdout and stderr."""
        return self._output.read_text()

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"process {self.pid} went on for {timeout} s")
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_namr(
    folder: Path,
    *words: object,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = _TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run the command line with its output in files of a new folder: for what it does, not for how
    it starts."""
    return _completed(folder, _namr, words, env, cwd, timeout)


def fork_python(folder: Path, text: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program, as python -c does, in the same way."""
    return _completed(folder, _script, (text, *words), None, None, _TIMEOUT_S)


def _completed(
    folder: Path,
    target: Callable[..., None],
    words: Sequence[object],
    env: dict[str, str] | None,
    cwd: Path | None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    stdout, stderr = folder / "stdout.txt", folder / "stderr.txt"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=(_texts(*words), env or {}, stdout, stderr, cwd))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"it went on for {timeout} s:\n{stderr.read_text()}")
    return subprocess.CompletedProcess(
        _texts(*words), process.exitcode, stdout.read_text(), stderr.read_text()
    )


def _texts(*words: object) -> list[str]:
    return [str(word) for word in words]


def heed_signals() -> None:
    """For a new process: tests under nohup or in the background ignore signals, and would pass that
    on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _program(path: Path, words: list[str], environment: dict[str, str], output: Path) -> None:
    _become_process(environment, output, output)
    sys.argv = [str(path), *words]
    sys.path[0] = str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def _script(
    words: list[str], environment: dict[str, str], stdout: Path, stderr: Path, cwd: Path | None
) -> None:
    _become_process(environment, stdout, stderr)
    text, *sys.argv[1:] = words
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def _namr(
    words: list[str],
    environment: dict[str, str],
    stdout: Path,
    stderr: Path,
    cwd: Path | None = None,
) -> None:
    os.setsid()
    _become_process(environment, stdout, stderr)
    if cwd:
        os.chdir(cwd)
    from namr_dist.cli.main import main

    sys.exit(main(words))


def _become_process(environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    """What a start from nothing would have made of a process."""
    heed_signals()
    # Worker processes come from the rank itself, as everywhere else, and not from another such
    # parent.
    multiprocessing.set_start_method("fork", force=True)
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    # Again, for the parent may be one that another test started.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update({**_ENVIRONMENT, **environment})
    import torch

    torch.set_num_threads(1)


def start_parent() -> None:
    """Start the process that imports what runs need and forks them, for CPUs and one thread
    each."""
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTS)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def losses(run: Path) -> dict[int, list[float]]:
    """Step → every loss that metrics.jsonl has for it."""
    by_step: dict[int, list[float]] = {}
    for entry in entries(run):
        if "loss" in entry:
            by_step.setdefault(entry["step"], []).append(entry["loss"])
    return by_step


def entries(run: Path) -> Iterator[dict]:
    """Whole lines of metrics.jsonl, which may just be written."""
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            yield json.loads(line)
