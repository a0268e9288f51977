"""Signals to every launcher: its exit code, what it leaves, and whether the run goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.processes import (
    ENVIRONMENT,
    PROTOCOL,
    TIMEOUT_S,
    Command,
    damaged_checkpoints,
    finish,
    free_port,
    heed_signals,
    left_behind,
    make_set,
    same_result,
    settings,
    start_parent,
    state,
    steps_done,
    wait_for,
)
from reliability.text import table

ROOT = Path(__file__).parents[2]
STEPS, EVERY, FROM_STEP = 200, 10, 15
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
KILL = "SIGKILL of the last rank"
STOPPED, HANGS_OR_KILLED = 75, 69
_LEFT_AFTER_S = 60.0
# Starts the command here, at a terminal of its own, as `ssh -tt` does elsewhere.
_SSH = """#!/usr/bin/env python3
import os, pty, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(["bash", "-c", sys.argv[-1]])))
"""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A way to start ranks."""

    name: str
    ranks: int
    commands: Callable[[Path, list[str]], list[list[str]]]
    """(a folder with a hostfile, the words of the run) → one command a machine; the first is
    signalled"""
    promised: bool = True
    """Whether docs/distributed.md says that signals end it with STOPPED"""


def _torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "namr_dist.launchers.torchrun", *words]


_MULTI_NODE = str(ROOT / "launchers" / "multi_node.sh")
LAUNCHERS = (
    Launcher(
        name="`namr train`",
        ranks=1,
        commands=lambda folder, words: [[sys.executable, "-m", "namr_dist.cli", "train", *words]],
    ),
    Launcher(
        name="`launchers/single_node.sh`",
        ranks=2,
        commands=lambda folder, words: [[str(ROOT / "launchers" / "single_node.sh"), *words]],
    ),
    Launcher(
        name="`python -m namr_dist.launchers.torchrun`",
        ranks=2,
        commands=lambda folder, words: [
            _torchrun("--standalone", "--nproc-per-node", "2")
            + ["--module", "namr_dist.launchers.train", *words]
        ],
    ),
    Launcher(
        name="`launchers/multi_node.sh`, by ssh",
        ranks=2,
        commands=lambda folder, words: [[_MULTI_NODE, str(folder / "hosts"), *words]],
    ),
    Launcher(
        name="`launchers/multi_node.sh --node-rank K`",
        ranks=2,
        commands=lambda folder, words: [
            [_MULTI_NODE, "--node-rank", str(node), str(folder / "hosts"), *words]
            for node in range(2)
        ],
    ),
    Launcher(
        name="`deepspeed`",
        ranks=2,
        promised=False,
        commands=lambda folder, words: [
            [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
            + ["--master_port", str(free_port()), str(ROOT / "launchers" / "train.py"), *words]
        ],
    ),
)


def measure(folder: Path, trial: int | None) -> dict[str, Any]:
    """Every signal to every launcher. trial: the first so many signals."""
    shards = make_set(folder / "set")
    (folder / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(_SSH)
    (folder / "bin" / "ssh").chmod(0o755)
    start_parent()
    for ranks in (1, 2):
        words = settings(folder / f"whole-{ranks}", shards, STEPS)
        finish(["train", *words], folder / "said", ranks=ranks)
    sent = [number.name for number in SIGNALS] + [KILL]
    if trial:
        sent = sent[-trial:]
    cases: list[dict[str, Any]] = []
    for launcher in LAUNCHERS:
        for name in sent:
            case = _case(launcher, name, folder, shards, folder / f"run-{len(cases)}")
            cases.append(case)
            print(case, flush=True)
    return {
        "protocol": f"{PROTOCOL}; {STEPS} steps, a checkpoint every {EVERY}; the signal is sent once, to the "
        f'launcher\'s process alone, after step {FROM_STEP}; both "machines" are this one, and ssh is a '
        "stand-in that starts the command at a terminal of its own; the run is resumed on as many ranks",
        "cases": cases,
    }


def _case(launcher: Launcher, name: str, folder: Path, shards: Path, run: Path) -> dict[str, Any]:
    words = settings(run, shards, STEPS, "--set.train.checkpoint_every", EVERY)
    programs = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    port = str(free_port())
    variables = {**os.environ, **ENVIRONMENT, "PATH": programs, "NAMR_MASTER_PORT": port}
    output = run.with_suffix(".txt")
    with open(output, "wb") as said:
        started = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=heed_signals,
            )
            for command in launcher.commands(folder, words)
        ]
    ended = lambda: any(one.poll() is not None for one in started)  # noqa: E731
    wait_for(lambda: steps_done(run) >= FROM_STEP or ended())
    family = _descendants([one.pid for one in started])
    if name == KILL:
        os.kill(_rank(family, launcher.ranks - 1), signal.SIGKILL)
    else:
        os.kill(started[0].pid, signal.Signals[name])
    began = time.monotonic()
    codes = [_ended(one) for one in started]
    seconds = time.monotonic() - began
    wait_for(lambda: all(state(pid) in "ZX" for pid in family), _LEFT_AFTER_S)
    all_s = time.monotonic() - began
    left = [pid for pid in family if state(pid) not in "ZX"]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    text = output.read_text(errors="replace")
    checkpoints, faults = damaged_checkpoints(run)
    step = steps_done(run)
    again = Command(["train", *words, "--resume"], run.with_suffix(".again"), ranks=launcher.ranks)
    resumed = again.wait()
    faults += [f"left {path}" for path in left_behind(run)]
    return {
        "launcher": launcher.name,
        "signal": name,
        "exit_codes": codes,
        "as_promised": _as_promised(launcher, name, codes),
        "seconds": round(seconds, 1),
        "all_ended_s": round(all_s, 1),
        "left_running": len(left),
        "traceback": "Traceback" in text,
        "stopped_at": step,
        "saved_on_the_signal": f"stopped after step {step}, as " in text,
        "checkpoints": checkpoints,
        "resume_exit_codes": resumed,
        "same_result": same_result(run, folder / f"whole-{launcher.ranks}"),
        "faults": faults,
    }


def _as_promised(launcher: Launcher, name: str, codes: list[int | None]) -> bool | None:
    """None where docs/distributed.md promises no code."""
    if not launcher.promised:
        return None
    if name == KILL:  # of the rank that was killed, or of one that noticed
        return set(codes) <= {128 + signal.SIGKILL, HANGS_OR_KILLED}
    return set(codes) == {STOPPED}


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit code as a shell counts; None if it had to be killed."""
    try:
        code = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
    return code if code >= 0 else 128 - code


def _descendants(roots: list[int]) -> list[int]:
    """These processes and all that they have started, parents first."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    family = list(roots)
    for parent in family:
        family += [child for child, its in parents.items() if its == parent]
    return family


def _rank(family: list[int], rank: int) -> int:
    """The process of a rank: the first whose environment says so; its loader workers come later. A
    single one without a launcher has no number."""
    for pid in family:
        with contextlib.suppress(OSError):  # one that has ended
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables:
                return pid
    return family[0]


def tables(record: dict[str, Any]) -> list[str]:
    """A line a launcher and signal."""
    lines = []
    for one in record["cases"]:
        promised = {True: "yes", False: "**no**", None: "–"}[one["as_promised"]]
        codes = ["had to be killed" if code is None else str(code) for code in one["exit_codes"]]
        oddities = [
            *(["a traceback"] if one["traceback"] else []),
            *([f"{one['left_running']} processes stayed"] if one["left_running"] else []),
            *(["trained on to the end"] if one["stopped_at"] == STEPS else []),
            *one["faults"],
        ]
        lines.append(
            [
                one["launcher"],
                one["signal"],
                " and ".join(codes),
                promised,
                f"{one['seconds']:.1f}",
                f"{one['all_ended_s']:.1f}",
                "yes" if one["saved_on_the_signal"] else "no",
                "yes" if one["same_result"] else "**no**",
                "; ".join(oddities) or "–",
            ]
        )
    heading = [
        "launcher",
        "signal",
        "exit code",
        "as promised",
        "ends after, s",
        "its last process, s",
        "saved on the signal",
        "resumed: same losses and network",
        "also",
    ]
    return table(heading, lines, words=2)
