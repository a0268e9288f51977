"""Miniature training runs in processes that may be signalled and killed, and what they leave.

Commands are forked from one process that has imported all they need: a start takes a tenth of the
time that imports take, which matters where hundreds are started.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver
from pathlib import Path

import safetensors.torch

from namr_dist.data.location import open_shards
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import ImageClass, Manifest
from namr_dist.data.shardset.shards import Sample, write_shard
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.recipes.homeware import homeware
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.state import open_state
from namr_dist.train.embed import test_transform
from namr_dist.train.signals import STOP_SIGNALS

TIMEOUT_S = 300.0
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "COLUMNS": "160",
    "TORCHDYNAMO_DISABLE": "1",
}
# The last one is what DeepSpeed imports when it is given an optimizer, and half of all time.
_IMPORTS = [
    "namr_dist.train.run",
    "namr_dist.results.evaluate_run",
    "sklearn.cluster",
    "tyro",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
]
CLASSES, IMAGES = {"train": 12, "val": 4, "test": 6}, 6
PROTOCOL = (
    f"conv4 backbone, 32 px, width 16, batches of 4 classes × 2 images, ZeRO-1, fp32, one loader "
    f"worker a rank; {CLASSES['train']} training, {CLASSES['val']} validation and "
    f"{CLASSES['test']} test classes of homeware, {IMAGES} images each"
)
_STEP = re.compile(r"\.?step-(\d+)")


def make_set(folder: Path) -> Path:
    """A few of homeware's classes as a shard set of its own, two tars a split."""
    folder.mkdir()
    source = open_shards(None)
    index = source.index(*source.splits)
    images = ShardImages(source, index, test_transform(homeware()))
    classes: dict[int, ImageClass] = {}
    shards, first = [], 0
    for split, count in CLASSES.items():
        labels = range(first, first + count)
        first += count
        classes |= {
            label: ImageClass(label=label, name=f"thing {label}", category="things", split=split)
            for label in labels
        }
        for number, part in enumerate((labels[: count // 2], labels[count // 2 :])):
            samples = [
                Sample(key=f"{position:05d}", label=label, jpeg=images.jpeg(position))
                for label in part
                for position in range(IMAGES * label, IMAGES * (label + 1))
            ]
            shards.append(write_shard(folder, f"{split}-{number}.tar", split, samples, classes))
    Manifest(
        name="miniature",
        description="homeware's images under made-up labels",
        classes=tuple(classes.values()),
        shards=tuple(shards),
        folder=folder,
    ).save()
    return folder


def settings(run: Path, shards: Path | str, steps: int, *more: object) -> list[str]:
    """The words after `namr train` for a miniature run; later ones count."""
    values: dict[str, object] = {
        "data.path": shards,
        "data.validation_split": "val",
        "data.classes_per_batch": 4,
        "data.images_per_class": 2,
        "data.image_size": 32,
        "data.workers": 1,
        "model.backbone": "conv4",
        "model.batchnorm": "train",
        "model.width": 16,
        "model.structure_hidden": 16,
        "optim.steps": steps,
        "optim.warmup_steps": 0,
        "train.validate_every": 100_000,
        "train.tensorboard": False,
        "train.timeout_minutes": 3,
    }
    words = ["folder", "--run-dir", run]
    words += [part for name, value in values.items() for part in (f"--set.{name}", value)]
    return [str(word) for word in (*words, *more)]


def free_port() -> int:
    """A port of this machine that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """A `namr` command on some ranks, each the leader of a process group, as under a launcher."""

    def __init__(self, words: Sequence[object], output: Path, *, ranks: int = 1) -> None:
        """output: a file that takes the place of stdout and stderr of all ranks."""
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        self._output = output
        output.write_text("")
        self.ranks = [
            context.Process(
                target=_namr,
                args=(
                    [str(word) for word in words],
                    {
                        "RANK": str(rank),
                        "WORLD_SIZE": str(ranks),
                        "LOCAL_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    },
                    output,
                ),
            )
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    @property
    def pids(self) -> list[int]:
        """Of all ranks, also of those that have ended."""
        return [process.pid for process in self.ranks if process.pid]

    def alive(self) -> bool:
        """Whether any rank runs."""
        return any(process.is_alive() for process in self.ranks)

    def send(self, number: signal.Signals, ranks: Iterable[int] | None = None) -> None:
        """A signal to some ranks, or to all."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def stop(self) -> None:
        """Halt all ranks, and return once they stand still or have ended."""
        self.send(signal.SIGSTOP)
        wait_for(lambda: all(state(pid) in "TZX" for pid in self.pids))

    def wait(self, seconds: float = TIMEOUT_S) -> list[int | None]:
        """The exit codes once all ranks have ended; None for one that had to be killed, because it
        did not within that time."""
        end = time.monotonic() + seconds
        codes: list[int | None] = []
        for process in self.ranks:
            process.join(max(0.1, end - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                self.send(signal.SIGKILL)
        return codes

    def said(self) -> str:
        """What all ranks wrote."""
        return self._output.read_text(errors="replace")


def _namr(words: list[str], environment: dict[str, str], output: Path) -> None:
    os.setsid()
    heed_signals()
    # Loader workers come from the rank, as everywhere else, and not from the process it came from.
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update({**ENVIRONMENT, **environment})
    import torch

    from namr_dist.cli.main import main

    torch.set_num_threads(1)
    sys.exit(main(words))


def heed_signals() -> None:
    """For a new process: under nohup or in the background, signals are ignored, and stay so."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start_parent() -> None:
    """Start the process that imports what commands need and forks them."""
    os.environ.update(ENVIRONMENT)
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTS)
    forkserver.ensure_running()


def finish(words: Sequence[object], output: Path, *, ranks: int = 1) -> str:
    """Run a command to its end and return what it said. Raises SystemExit if it fails."""
    command = Command(words, output, ranks=ranks)
    if (codes := command.wait()) != [0] * ranks:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {codes}:\n{command.said()}")
    return command.said()


def state(pid: int) -> str:
    """A letter, as in proc(5): T is stopped, Z has ended; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def wait_for(condition: Callable[[], bool], seconds: float = TIMEOUT_S) -> bool:
    """Whether it became true in that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def losses(run: Path) -> dict[int, list[float]]:
    """Step → every loss that metrics.jsonl has for it, in whole lines."""
    path, found = RunFolder(run).log, dict[int, list[float]]()
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if line.endswith(b"}\n"):
            entry = json.loads(line)
            if "loss" in entry:
                found.setdefault(entry["step"], []).append(entry["loss"])
    return found


def steps_done(run: Path) -> int:
    """The latest step in the log."""
    return max(losses(run), default=0)


def same_result(run: Path, other: Path) -> bool:
    """Whether both have one and the same loss for each step, and the same network, bit for bit."""
    if losses(run) != losses(other) or any(len(values) != 1 for values in losses(run).values()):
        return False
    networks = []
    for folder in (run, other):
        if not RunFolder(folder).final.exists():
            return False
        tensors = safetensors.torch.load_file(RunFolder(folder).final)
        networks.append({name: value.numpy().tobytes() for name, value in tensors.items()})
    return networks[0] == networks[1]


def unfinished(run: Path) -> list[Path]:
    """What lies among the checkpoints and is no checkpoint: writes under way or left behind."""
    folder = RunFolder(run)
    whole = {folder.final, *(path for _, path in folder.checkpoints())}
    there = folder.checkpoint_folder
    return [path for path in there.iterdir() if path not in whole] if there.is_dir() else []


def being_written(run: Path) -> list[int]:
    """Steps of which a checkpoint has been begun and is not visible yet."""
    newest = max((step for step, _ in RunFolder(run).checkpoints()), default=0)
    begun = [int(match[1]) for path in unfinished(run) if (match := _STEP.match(path.name))]
    return sorted(step for step in begun if step > newest)


def left_behind(run: Path) -> list[str]:
    """Temporary files and unfinished checkpoints, by their path in the run's folder."""
    found = {*unfinished(run), *run.rglob(".*.tmp")}
    return sorted(str(path.relative_to(run)) for path in found)


def damaged_checkpoints(run: Path) -> tuple[int, list[str]]:
    """How many visible checkpoints were read in full, and what is wrong with them."""
    found = []
    visible = RunFolder(run).checkpoints()
    for step, path in visible:
        try:
            if open_state(path).step != step:
                found.append(f"{path.name} is of another step")
        except (DamagedFileError, InputError) as error:
            found.append(f"{path.name}: {error}")
    return len(visible), found
