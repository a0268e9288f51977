"""A disk that is full at each point where something is written, and has room again later.

All of it runs in a mount namespace with a small tmpfs of its own.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.processes import (
    PROTOCOL,
    TIMEOUT_S,
    Command,
    damaged_checkpoints,
    finish,
    left_behind,
    losses,
    make_set,
    same_result,
    settings,
    start_parent,
    steps_done,
    wait_for,
)
from reliability.text import table

from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.verify import verify
from namr_dist.results import export
from namr_dist.results.record import read_run
from namr_dist.run.folder import RunFolder

DISK_MIB, STEPS, EVERY = 96, 100, 5
_EVERY = ("--set.train.checkpoint_every", EVERY)


def measure(folder: Path, trial: int | None) -> dict[str, Any]:
    """Every point. trial: the first so many of training's, and of the other commands'."""
    out = folder / "record.json"
    program = "import sys; from reliability.full_disk import inside; inside(*sys.argv[1:])"
    words = [sys.executable, "-c", program, str(folder), str(out), str(trial or 0)]
    tools = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{tools}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *words], env=environment, check=True
    )
    record = json.loads(out.read_text())
    assert isinstance(record, dict)
    return record


def inside(folder_name: str, out: str, trial: str) -> None:
    """Mount the disk, try all points on it and write the record."""
    folder, count = Path(folder_name), int(trial) or None
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", disk], check=True)
    shards = make_set(folder / "set")
    start_parent()
    place = Place(folder=folder, disk=disk, shards=shards)
    finish(["train", *settings(place.whole, shards, STEPS, *_EVERY)], place.output)
    finish(["evaluate", place.whole], place.output)
    record = {
        "protocol": f"{PROTOCOL}; {STEPS} steps, a checkpoint every {EVERY}; a tmpfs of {DISK_MIB} MiB, "
        "filled to its last page by another file, while the run is halted (SIGSTOP) where it runs "
        "already; room is made by removing that file",
        "training": [_training(place, point) for point in POINTS[:count]],
        "commands": list(_commands(place, count)),
    }
    Path(out).write_text(json.dumps(record))
    subprocess.run(["umount", "--lazy", disk], check=True)


@dataclass(frozen=True, kw_only=True)
class Place:
    """The disk, and what lies elsewhere."""

    folder: Path
    disk: Path
    shards: Path

    @property
    def whole(self) -> Path:
        """A run that met no full disk, evaluated."""
        return self.folder / "whole"

    @property
    def output(self) -> Path:
        """What the latest command said."""
        return self.folder / "said"

    def fill(self, leave_bytes: int = 0) -> None:
        """Take all room but for so much."""
        with open(self.disk / "FILL", "wb", buffering=0) as file, contextlib.suppress(OSError):
            free = shutil.disk_usage(self.disk).free
            os.posix_fallocate(file.fileno(), 0, max(1, free - leave_bytes))
            while leave_bytes == 0:
                file.seek(0, os.SEEK_END)
                file.write(bytes(4096))

    def free(self) -> None:
        """Make room."""
        (self.disk / "FILL").unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all from the disk."""
        for path in self.disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True, kw_only=True)
class Point:
    """A moment of training at which the disk is full."""

    name: str
    when: Callable[[Path], bool] | None
    """Of the run's folder; None: before the command is started"""
    room_after: str | None = None
    """What the run says before there is room again, while it goes on; None: once it has ended"""
    signal: signal.Signals | None = None
    """Sent with it"""
    more: tuple[str, ...] = ()


def _at(step: int) -> Callable[[Path], bool]:
    return lambda run: steps_done(run) >= step


POINTS = (
    Point(name="before the start", when=None),
    Point(name="before step 1", when=lambda run: RunFolder(run).config.exists()),
    Point(name="between two checkpoints, until the end", when=_at(12)),
    Point(
        name="between two checkpoints, room after one was refused",
        when=_at(12),
        room_after="WARNING: no checkpoint",
    ),
    Point(
        name="the same with TensorBoard",
        when=_at(12),
        room_after="WARNING: no checkpoint",
        more=("--set.train.tensorboard", "True"),
    ),
    Point(name="after the last checkpoint, before the network", when=_at(STEPS - 4)),
    Point(name="at SIGTERM", when=_at(12), signal=signal.SIGTERM),
)


def _training(place: Place, point: Point) -> dict[str, Any]:
    place.clear()
    run = place.disk / "run"
    words = ["train", *settings(run, place.shards, STEPS, *_EVERY, *point.more)]
    if point.when is None:
        place.fill()
    command = Command(words, place.output)
    if point.when is not None:
        reached = point.when
        wait_for(lambda: reached(run) or not command.alive())
        command.stop()
        place.fill()
        if point.signal:
            command.send(point.signal)
    step = steps_done(run)
    command.send(signal.SIGCONT)
    if point.room_after:
        word = point.room_after
        wait_for(lambda: word in command.said() or not command.alive(), TIMEOUT_S)
        place.free()
    codes, said = command.wait(), command.said()
    place.free()
    whole, damaged = damaged_checkpoints(run)
    log = RunFolder(run).log
    record = {
        "point": point.name,
        "step": step,
        "exit_code": codes[0],
        "said": _last_line(said),
        "checkpoints": whole,
        "faults": [
            *damaged,
            *(["a torn line in metrics.jsonl"] if not _whole_lines(log) else []),
            *(["a traceback"] if "Traceback" in said else []),
            *(f"left {name}" for name in left_behind(run)),
        ],
    }
    if codes != [0]:
        again = Command([*words, "--resume"], place.output)
        record["resume_exit_code"] = again.wait()[0]
        record["faults"] += [f"left after --resume {name}" for name in left_behind(run)]
    record["same_result"] = same_result(run, place.whole)
    print(record, flush=True)
    return record


def _whole_lines(log: Path) -> bool:
    data = log.read_bytes() if log.exists() else b""
    try:
        return not data or (data.endswith(b"}\n") and all(map(json.loads, data.splitlines())))
    except ValueError:
        return False


def _last_line(said: str) -> str:
    """The last error or warning."""
    lines = [line for line in said.splitlines() if "error: " in line or "WARNING: " in line]
    return lines[-1][:300] if lines else ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Another command that writes."""

    name: str
    words: list[object]
    check: Callable[[], object]
    """Raises an error if what it wrote is not whole"""


def _commands(place: Place, count: int | None) -> Iterator[dict[str, Any]]:
    with _served(place.shards) as url:
        for task in _tasks(place, url)[:count]:
            place.clear()
            before = _prepare(place)
            finish(task.words, place.output)
            task.check()
            need = _bytes_of(place.disk) - before
            for name, room in (("no room", 0), ("room for half of it", need // 2)):
                yield _refused(place, task, name, room)


def _prepare(place: Place) -> int:
    """Put the finished run on the disk, evaluated and not; the bytes there."""
    place.clear()
    shutil.copytree(place.whole, place.disk / "evaluated")
    run = RunFolder(Path(shutil.copytree(place.whole, place.disk / "run")))
    for path in (run.metrics, run.classes, run.embeddings):
        path.unlink()
    return _bytes_of(place.disk)


def _refused(place: Place, task: Task, name: str, room: int) -> dict[str, Any]:
    _prepare(place)
    before = _files(place.disk)
    place.fill(room)
    command = Command(task.words, place.output)
    codes, said = command.wait(), command.said()
    place.free()
    left = sorted(_files(place.disk) - before)
    faults = ["a traceback"] if "Traceback" in said else []
    again = Command(task.words, place.output)
    code_again = again.wait()[0]
    try:
        task.check()
    except Exception as error:
        faults.append(f"after the second try: {type(error).__name__}: {error}"[:300])
    record = {
        "command": task.name,
        "room": name,
        "exit_code": codes[0],
        "said": _last_line(said),
        "left": left,
        "again_exit_code": code_again,
        "left_after": [
            path for path in _files(place.disk) - before if path.endswith((".tmp", ".part"))
        ],
        "faults": faults,
    }
    print(record, flush=True)
    return record


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("FILL", ".lock")
    }


def _bytes_of(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in _files(folder))


def _tasks(place: Place, url: str) -> list[Task]:
    run, evaluated = place.disk / "run", place.disk / "evaluated"
    exported, staged, cache = (place.disk / name for name in ("export", "staged", "cache"))
    elsewhere = place.folder / "elsewhere"

    def sets() -> None:
        for manifest in staged.rglob("manifest.json"):
            assert not verify(Manifest.load(manifest.parent)).problems
        assert any(staged.rglob("manifest.json"))

    fetched = [*settings(elsewhere, url, 5), "--set.data.remote.cache", cache, "--overwrite"]
    formats = ["--formats", "safetensors", "torch"]
    return [
        Task(name="`namr evaluate`", words=["evaluate", run], check=lambda: read_run(run)),
        Task(
            name="`namr report`",
            words=["report", evaluated],
            check=lambda: _page(RunFolder(evaluated).report),
        ),
        Task(
            name="`namr export`",
            words=["export", evaluated, "--out", exported, *formats],
            check=lambda: export.load(exported),
        ),
        Task(
            name="`namr shards stage`",
            words=["shards", "stage", place.shards, staged],
            check=sets,
        ),
        Task(
            name="`namr train` from a URL, its cache there",
            words=["train", *fetched],
            check=lambda: losses(elsewhere)[5],
        ),
    ]


def _page(path: Path) -> None:
    assert path.read_text().rstrip().endswith("</html>"), f"{path.name} is cut off"


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(folder))

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: a fetch that finds the disk full hangs up."""

    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def tables(record: dict[str, Any]) -> list[str]:
    """Training, then the other commands."""
    lines = [
        [
            one["point"],
            str(one["step"]),
            str(one["exit_code"]),
            str(one["checkpoints"]),
            str(one.get("resume_exit_code", "–")),
            "yes" if one["same_result"] else "**no**",
            "; ".join(one["faults"]) or "none",
        ]
        for one in record["training"]
    ]
    heading = [
        "the disk is full",
        "step",
        "exit code",
        "whole checkpoints",
        "exit code of `--resume`, with room",
        "same losses and network",
        "damaged, torn or left behind",
    ]
    text = table(heading, lines, words=1)
    lines = [
        [
            one["command"],
            one["room"],
            str(one["exit_code"]),
            ", ".join(f"`{Path(name).name}`" for name in one["left"]) or "nothing",
            str(one["again_exit_code"]),
            "; ".join([*one["faults"], *(f"left {name}" for name in one["left_after"])]) or "none",
        ]
        for one in record["commands"]
    ]
    heading = [
        "command",
        "there is",
        "exit code",
        "new files after it",
        "exit code of the same command, with room",
        "damaged, torn or left behind in the end",
    ]
    return [*text, *table(heading, lines, words=2)]
