"""How long training stands still for a checkpoint of a large network, and what the writing costs
the steps after it; compared with the version that wrote the whole state from the first rank."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from reliability.processes import ENVIRONMENT, free_port, make_set, settings
from reliability.text import table
from safetensors import safe_open

from namr_dist.run.folder import RunFolder

BEFORE = "d4c608a"
"""The last commit of which training halts until a checkpoint is written."""
WORLDS, TIMES = (1, 2), 3
STEPS, EVERY = 18, 6
"""Checkpoints at 6 and 12: at the last step, none is written."""
BACKBONE = "timm:wide_resnet101_2"
_LINE = re.compile(
    r"checkpoint at step (\d+) in ([\d.]+) s(?:, of which training waited ([\d.]+))?"
)
_REPOSITORY = Path(__file__).parents[2]


def measure(folder: Path, trial: int | None) -> dict[str, Any]:
    """Both versions in turn. trial: so many times."""
    shards = make_set(folder / "set")
    trees = {"before": folder / "before", "now": _REPOSITORY}
    git = ["git", "-C", str(_REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--detach", trees["before"], BEFORE], check=True)
    runs = []
    try:
        for ranks in WORLDS:
            for number in range(trial or TIMES):
                for version, tree in trees.items():
                    run = folder / f"{version}-{ranks}-{number}"
                    runs.append(_run(tree, run, shards, ranks) | {"version": version})
                    print({name: runs[-1][name] for name in ("version", "ranks", "halt_s")})
    finally:
        subprocess.run([*git, "remove", "--force", trees["before"]], check=True)
    return {
        "protocol": f"{BACKBONE} with random weights and heads of width 16, {runs[0]['parameters']:,} "
        f"parameters, fp32, ZeRO-1, AdamW, 64 px, batches of 4 classes × 2 images, one OpenMP thread a "
        f"rank; {STEPS} steps, a checkpoint after {EVERY} and after {2 * EVERY}; both versions in turn, "
        f"{trial or TIMES} runs each; medians, and the range over all checkpoints. Before: commit {BEFORE}. "
        "The time lost is that of the steps after the first checkpoint, less as many median steps before it",
        "runs": runs,
    }


def _run(tree: Path, run: Path, shards: Path, ranks: int) -> dict[str, Any]:
    more = ["--set.model.backbone", BACKBONE, "--set.model.pretrained", "False"]
    more += ["--set.model.batchnorm", "train", "--set.data.image_size", "64"]
    more += ["--set.train.checkpoint_every", str(EVERY), "--set.train.checkpoint_minutes", "0"]
    more += ["--set.train.timeout_minutes", "30"]
    words = ["train", *settings(run, shards, STEPS, *more)]
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": tree}
        environment = {**os.environ, **ENVIRONMENT, **{key: str(to) for key, to in place.items()}}
        command = [sys.executable, "-m", "namr_dist.cli", *words]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tree)
        )
    said = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(said))
    written = _LINE.findall("".join(said))
    log = RunFolder(run).log.read_text().splitlines()
    times = [entry["time_s"] for entry in map(json.loads, log) if "loss" in entry]
    between = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    usual = statistics.median(between[: EVERY - 1])
    after = between[EVERY - 1 :]
    newest = max(RunFolder(run).checkpoint_folder.glob("step-*"))  # a file before, now a folder
    files = [newest] if newest.is_file() else list(newest.iterdir())
    return {
        "ranks": ranks,
        "parameters": _parameters(run),
        "bytes": sum(file.stat().st_size for file in files),
        "usual_step_s": round(usual, 3),
        "halt_s": [float(halt or whole) for _, whole, halt in written],
        "lost_s": round((sum(after) - len(after) * usual) / len(written), 3),
    }


def _parameters(run: Path) -> int:
    """Of the trained network, without its buffers."""
    with safe_open(RunFolder(run).final, "pt") as file:
        return sum(
            math.prod(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118 (not a dict)
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        )


def tables(record: dict[str, Any]) -> list[str]:
    """A line for each version and number of ranks."""
    lines = []
    for ranks in WORLDS:
        for version in ("before", "now"):
            runs = [
                run for run in record["runs"] if (run["ranks"], run["version"]) == (ranks, version)
            ]
            lines.append(
                [
                    version,
                    str(ranks),
                    f"{runs[0]['bytes'] / 2**20:,.0f}",
                    _spread([value for run in runs for value in run["halt_s"]]),
                    _spread([run["lost_s"] for run in runs if run["lost_s"] is not None]),
                    _spread([run["usual_step_s"] for run in runs]),
                ]
            )
    heading = ["", "ranks", "MiB", "training halts, s"]
    return table([*heading, "time lost for each, s", "a step, s"], lines, words=1)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
