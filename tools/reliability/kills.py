"""kill -9 at random moments, until the run has finished all the same."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from reliability.processes import (
    PROTOCOL,
    Command,
    being_written,
    damaged_checkpoints,
    finish,
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

from namr_dist.run.folder import RunFolder

WORLDS, EACH = (1, 2, 4), 18
STEPS, EVERY, MOST_A_RUN, SEED = 60, 3, 5, 0
AIMED = 3
"""Each third kill is aimed at a write, which few random ones would meet"""
WRITE_S = 0.03
"""About as long as a write takes"""
ALONE_S = 60.0
"""Then ranks that wait for one that never came are ended, as a launcher would"""
_WAITS = "waiting for rank|waits for the first rank"
STARTING, TRAINING, ENDING = "starting", "training", "after the last step"


def measure(folder: Path, trial: int | None) -> dict[str, Any]:
    """Kills on each number of ranks. trial: so many instead of EACH."""
    shards = make_set(folder / "set")
    start_parent()
    finish(
        ["train", *settings(folder / "first", shards, 1)], folder / "said"
    )  # and imports are done
    return {
        "protocol": f"{PROTOCOL}; {STEPS} steps, a checkpoint every {EVERY}, seed {SEED}",
        "worlds": [_on(ranks, folder / str(ranks), shards, trial or EACH) for ranks in WORLDS],
    }


def _on(ranks: int, folder: Path, shards: Path, wanted: int) -> dict[str, Any]:
    folder.mkdir()
    rng = random.Random(f"{SEED} {ranks}")
    more = ("--resume", "--set.train.checkpoint_every", EVERY)
    began = time.monotonic()
    finish(
        ["train", *settings(folder / "whole", shards, STEPS, *more)], folder / "said", ranks=ranks
    )
    unbroken_s = time.monotonic() - began
    kills: list[dict[str, Any]] = []
    record: dict[str, Any] = {"ranks": ranks, "unbroken_s": round(unbroken_s, 1), "runs": 0}
    opened, faults = 0, list[str]()
    while len(kills) < wanted:
        run = folder / f"run-{record['runs']}"
        record["runs"] += 1
        in_run, finished = 0, False
        while not finished:
            words = ["train", *settings(run, shards, STEPS, *more)]
            command = Command(words, folder / "said", ranks=ranks)
            kill = None
            if len(kills) < wanted and in_run < MOST_A_RUN:
                aimed = len(kills) % AIMED == AIMED - 1
                _await(command, run, rng, unbroken_s, aimed=aimed)
                kill = _kill(command, run, rng)
            alone = kill and kill["whom"] == "one" and kill["phase"] == STARTING
            codes = command.wait(ALONE_S) if alone else command.wait()
            finished = codes == [0] * ranks
            if kill:
                in_run += 1
                kill |= {"run": record["runs"], "aimed": aimed, "exit_codes": codes}
                kills.append(kill)
                print(f"{ranks} ranks, kill {len(kills)} of {wanted}: {kill}", flush=True)
                count, damaged = damaged_checkpoints(run)
                opened += count
                faults += damaged
                kill["waited"] = None in codes and re.search(_WAITS, command.said()) is not None
                if None in codes and not kill["waited"]:
                    faults.append(f"kill {len(kills)}: a rank hung: {command.said()[-1500:]}")
            elif not finished:
                faults.append(f"run {record['runs']} ended with {codes}: {command.said()[-1500:]}")
                break
        if not same_result(run, folder / "whole"):
            faults.append(f"run {record['runs']}: other losses or another network")
        faults += [f"run {record['runs']} left {name}" for name in left_behind(run)]
        shutil.rmtree(run, ignore_errors=True)
    return {**record, "opened": opened, "kills": kills, "faults": faults}


def _await(
    command: Command, run: Path, rng: random.Random, unbroken_s: float, *, aimed: bool
) -> None:
    """Until a random moment; aimed: soon after a checkpoint has been begun, a random number of
    steps later than now."""
    if not aimed:
        wait_for(lambda: not command.alive(), rng.uniform(0, unbroken_s))
        return
    from_step = steps_done(run) + rng.randrange(STEPS // 2)
    wait_for(
        lambda: not command.alive() or steps_done(run) >= from_step and bool(being_written(run))
    )
    time.sleep(rng.uniform(0, WRITE_S))


def _kill(command: Command, run: Path, rng: random.Random) -> dict[str, Any] | None:
    """kill -9 of all ranks or of one, and where it fell; None if all had ended before. Ranks are
    halted for the look at what they do."""
    victims = list(range(len(command.ranks)))
    whom = rng.choice(("all", "one")) if len(victims) > 1 else "all"
    if whom == "one":
        victims = [rng.choice(victims)]
    command.stop()
    if all(state(pid) in "ZX" for pid in command.pids):
        return None
    begun = "\nloss  " in command.said()  # the banner's last line
    phase = ENDING if RunFolder(run).final.exists() else TRAINING if begun else STARTING
    found = {"whom": whom, "phase": phase, "step": steps_done(run), "writing": being_written(run)}
    command.send(signal.SIGKILL, victims)
    command.send(signal.SIGCONT)
    return found


def tables(record: dict[str, Any]) -> list[str]:
    """A line a number of ranks."""
    lines = []
    for world in record["worlds"]:
        kills = world["kills"]
        phases = Counter(kill["phase"] for kill in kills)
        survivors = Counter(
            str(code) for kill in kills for code in kill["exit_codes"] if code not in (-9, None)
        )
        survivors["wait"] = sum(kill["waited"] for kill in kills)
        lines.append(
            [
                str(world["ranks"]),
                str(len(kills)),
                str(sum(kill["whom"] == "one" for kill in kills)),
                str(sum(kill["aimed"] for kill in kills)),
                str(phases[STARTING]),
                str(sum(bool(kill["writing"]) for kill in kills)),
                str(phases[ENDING]),
                ", ".join(f"{code} ({count})" for code, count in sorted(survivors.items()) if count)
                or "–",
                str(world["opened"]),
                str(world["runs"]),
                str(len(world["faults"])),
            ]
        )
    heading = [
        "ranks",
        "kills",
        "of one rank",
        "aimed at a write",
        "while starting",
        "while a checkpoint was written",
        "after the last step",
        "exit codes of the other ranks",
        "checkpoints read in full after kills",
        "runs finished",
        "faults",
    ]
    text = table(heading, lines, words=0)
    return [*text, *(f"- {fault}" for world in record["worlds"] for fault in world["faults"])]
