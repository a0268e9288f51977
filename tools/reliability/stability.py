"""Two thousand steps: what each rank holds while they go by."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from reliability.processes import PROTOCOL, Command, make_set, settings, start_parent
from reliability.text import table

from namr_dist.run.folder import RunFolder

RANKS, STEPS, EVERY, FROM_STEP = 2, 2_000, 100, 200
SHOWN = (200, 1_000, 2_000)
CHECKPOINT_EVERY, VALIDATE_EVERY = 130, 470
"""Not at the steps that are looked at"""
MEASURES = {
    "memory_mib": "resident memory, MiB",
    "descriptors": "open descriptors",
    "threads": "threads",
    "children": "child processes",
}


def measure(folder: Path, trial: int | None) -> dict[str, Any]:
    """Look at both ranks every EVERY steps. trial: so many looks."""
    shards = make_set(folder / "set")
    steps = STEPS if trial is None else EVERY * trial
    start_parent()
    more = (
        *("--set.train.checkpoint_every", CHECKPOINT_EVERY),
        *("--set.train.validate_every", VALIDATE_EVERY),
        *("--set.train.tensorboard", True),
    )
    run = folder / "run"
    # A few steps more, so that the last look finds the ranks at work.
    words = ["train", *settings(run, shards, steps + 30, *more)]
    command = Command(words, folder / "said", ranks=RANKS)
    looks: list[dict[str, Any]] = []
    log = _Steps(RunFolder(run).log)
    while len(looks) * EVERY < steps and command.alive():
        if log.latest() < EVERY * (len(looks) + 1):
            time.sleep(0.005)
            continue
        looks.append({"step": log.latest(), "ranks": [_look(pid) for pid in command.pids]})
        print(looks[-1], flush=True)
    if (codes := command.wait()) != [0] * RANKS:
        raise SystemExit(f"the run ended with {codes}:\n{command.said()}")
    return {
        "protocol": f"{PROTOCOL}; {RANKS} ranks, {steps:,} steps, a checkpoint every {CHECKPOINT_EVERY}, a "
        f"validation every {VALIDATE_EVERY}, TensorBoard on; /proc is read each {EVERY} steps. Slopes: least "
        f"squares from step {FROM_STEP} on, with the 95 % interval of Student's t; looks that follow one "
        "another are not independent, so the interval is a guide",
        "looks": looks,
    }


class _Steps:
    """The latest step of a log that grows, read on from where it was read last."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._latest = path, 0, 0

    def latest(self) -> int:
        """Of whole lines with a loss."""
        if not self._path.exists():
            return 0
        with open(self._path, "rb") as file:
            file.seek(self._at)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._at += len(new)
        self._latest += new.count(b'"loss":')
        return self._latest


def _look(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    children: list[str] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            children += (thread / "children").read_text().split()
    return {
        "memory_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
        "children": len(children),
    }


def tables(record: dict[str, Any]) -> list[str]:
    """A line a measure and rank."""
    looks = record["looks"]
    shown = [min(looks, key=lambda look: abs(look["step"] - step)) for step in SHOWN]
    settled = [look for look in looks if look["step"] >= FROM_STEP]
    lines = []
    for name, title in MEASURES.items():
        for rank in range(RANKS):
            values = [look["ranks"][rank][name] for look in settled]
            lines.append(
                [
                    title,
                    str(rank),
                    *(f"{look['ranks'][rank][name]:g}" for look in shown),
                    f"{min(values):g} to {max(values):g}",
                    _slope([look["step"] for look in settled], values),
                ]
            )
    steps = (f"at step {step:,}" for step in SHOWN)
    return table(
        ["", "rank", *steps, f"from step {FROM_STEP} on", "change in 1,000 steps"], lines, words=1
    )


def _slope(steps: list[int], values: list[float]) -> str:
    """In 1,000 steps, with its interval."""
    if len(steps) < 3:
        return "–"
    if len(set(values)) == 1:
        return "0"
    fit = scipy.stats.linregress(np.asarray(steps) / 1000, values)
    half = fit.stderr * scipy.stats.t.ppf(0.975, len(steps) - 2)
    return f"{fit.slope:+.2f} [{fit.slope - half:+.2f}, {fit.slope + half:+.2f}]"
