"""What a run says while it trains: a line of JSON each for programs, TensorBoard, a bar or plain
lines for people."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from namr_dist.run.folder import RunFolder
from namr_dist.terminal import Console, plain
from namr_dist.train.phases import StepTimes
from namr_dist.train.structure_fit import Fitted
from namr_dist.train.whole_appends import WholeAppends


class _Console(Console):
    """One that falls silent where rich would end the program: when nobody reads any more, as a
    `tee` that Ctrl-C has ended."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class RunLog:
    """One run's log. On a terminal a progress bar, else a line every so many steps.

    Only the first rank has one. Lines are flushed as they come, so `tail -f` and a later crash see
    all of them. A disk or a terminal that refuses a line ends no training: that is said once, and
    the line is written once the disk takes it.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        steps: int,
        hosts: Sequence[str],
        tensorboard: bool,
        name: str,
        peak_img_per_s: float | None = None,
        first_step: int = 0,
        before_s: float = 0.0,
    ) -> None:
        """hosts: name of each rank's machine. peak_img_per_s: of all devices at their peak, if
        known. first_step: steps done already, in `before_s` seconds; metrics.jsonl is continued."""
        self._file = WholeAppends(run.log)
        self._refusing: set[Path] = set()
        self._events: _Events | None = (
            _Events(run.tensorboard, first_step=first_step) if tensorboard else None
        )
        self._steps = steps
        self._hosts = hosts
        self._peak_img_per_s = peak_img_per_s
        self._speed = ""
        self._console = _Console(file=sys.stderr)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(name, total=steps, completed=first_step, note="")
        self._latest: dict[str, float | int] = {}
        self._replaced: Counter[str] | None = None
        self._began = time.perf_counter() - before_s

    def __enter__(self) -> RunLog:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.stop()
        if self._replaced:
            self.say(
                f"damaged   {len(self._replaced)} images, replaced {self._replaced.total()} times by others of "
                "their classes"
            )
        if self._events:
            self._attempt(self._events.file, self._events.write)
        for file in self._files():
            self._attempt(file, file.flush)
            if file.pending:
                self.say(f"WARNING: the last lines of {file.path} are lost")
            file.close()

    @property
    def time_s(self) -> float:
        """Seconds since the log was opened, and those of the steps before."""
        return time.perf_counter() - self._began

    def say(self, text: str) -> None:
        """A line for people."""
        # The terminal may be closed, the program that reads it ended, or its file's disk full.
        with contextlib.suppress(OSError):
            self._console.print(plain(text), soft_wrap=True)

    def step(self, figures: dict[str, float | int]) -> None:
        """One training step's figures."""
        self._write(figures)
        self._latest = figures
        if self._bar:
            self._bar.update(
                self._task,
                completed=int(figures["step"]),
                note=f"loss {figures['loss']:.4f}{self._speed}",
            )

    def speed(
        self,
        step: int,
        img_per_s: float,
        times: StepTimes,
        *,
        images: int,
        gathered_bytes: float,
        peak_bytes: int,
    ) -> None:
        """Of the steps since the last such call, validation and checkpoints left out: images a
        second, where the time went, the machine of the slowest rank, the bytes a rank received a
        step while embeddings were gathered, and the most that a rank held (phases.py); `images` a
        step. A line for people, if there is no bar."""
        share = (
            {}
            if self._peak_img_per_s is None
            else {"mfu": round(img_per_s / self._peak_img_per_s, 4)}
        )
        replaced = (
            {}
            if self._replaced is None
            else {"damaged_images": len(self._replaced), "replacements": self._replaced.total()}
        )
        slowest_host = self._hosts[times.slowest_rank]
        self._write(
            {
                "step": step,
                "img_per_s": round(img_per_s, 3),
                **share,
                **replaced,
                "time_s": round(self.time_s, 3),
                **{f"{name}_s": round(seconds, 5) for name, seconds in times.mean_s.items()},
                "slowest_rank": times.slowest_rank,
                "slowest_host": slowest_host,
                "slowest_s": round(times.slowest_s, 5),
                "gathered_mib": round(gathered_bytes / 2**20, 4),
                "peak_mib": round(peak_bytes / 2**20, 1),
            }
        )
        self._speed = f"  {img_per_s:.0f} img/s" + (
            f", {100 * share['mfu']:.0f} % of peak" if share else ""
        )
        if self._bar:
            return
        latest = self._latest
        parts = ", ".join(
            f"{part} {latest[f'{part}_loss']:.4f}"
            for part in ("metric", "ranking", "structure")
            if f"{part}_loss" in latest
        )
        line = (
            f"step {step:>6}/{self._steps}  epoch {latest['epoch']:>3}  {self.time_s:>5.0f} s  "
            f"loss {latest['loss']:.4f} ({parts})"
            f"  lr {latest['lr']:.1e}{self._speed}  {spent(times.mean_s, step_s=images / img_per_s)}"
        )
        if len(self._hosts) > 1:
            line += f"  slowest: rank {times.slowest_rank} on {slowest_host}, {1e3 * times.slowest_s:.0f} ms"
        self.say(line)

    def replaced(self, damaged: Iterable[str]) -> None:
        """Damaged images of all ranks that others stood in for since the last such call, a line
        each, as often as they did. Each is told of once; metrics.jsonl has their number, and that
        of the replacements, since this start."""
        self._replaced = self._replaced or Counter()
        for image in damaged:
            if image not in self._replaced:
                self.say(f"WARNING: {image}; another of its class stands in for it")
            self._replaced[image] += 1

    def validation(self, step: int, figures: dict[str, float]) -> None:
        """Recall and the like, in percent, on the validation classes."""
        self._write({"step": step, "val": figures, "time_s": round(self.time_s, 3)})
        self.say(
            f"step {step:>6}/{self._steps}  validation  "
            + "  ".join(f"{name} {value:.1f}" for name, value in figures.items())
        )

    def structure(self, step: int, fitted: Fitted) -> None:
        """Centres were fitted, and γ chosen."""
        self._line({"step": step, "structure": fitted.record, "time_s": round(self.time_s, 3)})
        self.say(f"step {step:>6}/{self._steps}  structure   {fitted.gain}")

    def resumed(self, step: int, file: Path) -> None:
        """The run goes on from a checkpoint after `step` steps."""
        self._line({"step": step, "resumed": file.name, "time_s": round(self.time_s, 3)})
        self.say(f"resumed   at step {step} from {file}")

    def sync(self) -> None:
        """Wait until metrics.jsonl is on disk: a checkpoint must not outlive the lines before
        it."""
        self._attempt(self._file, self._file.sync)

    def _line(self, figures: dict) -> None:
        line = (json.dumps(figures) + "\n").encode()
        self._attempt(self._file, lambda: self._file.append(line))

    def _files(self) -> list[WholeAppends]:
        return [self._file, *([self._events.file] if self._events else [])]

    def _attempt(self, file: WholeAppends, write: Callable[[], None]) -> None:
        """Write to a file. If it refuses, say so, unless that has been said since it last took
        something."""
        try:
            write()
        except OSError as error:
            if file.path not in self._refusing:
                self._refusing.add(file.path)
                self.say(
                    f"WARNING: {file.path} cannot be written ({error.strerror}); training goes on, and "
                    "what is missing there follows once it can; free some space"
                )
        else:
            self._refusing.discard(file.path)

    def _write(self, figures: dict) -> None:
        self._line(figures)
        if events := self._events:
            values = figures.get("val") or {
                name: value
                for name, value in figures.items()
                if name != "step" and not isinstance(value, str)
            }
            group = "val" if "val" in figures else "train"
            events.add(figures["step"], values, group=group)
            if "loss" not in figures:  # not at every step
                self._attempt(events.file, events.write)


def spent(mean_s: dict[str, float], *, step_s: float) -> str:
    """Milliseconds of a step and of its phases, in their order; those below 1 % of it are added to
    the rest."""
    large = {name: seconds for name, seconds in mean_s.items() if seconds >= 0.01 * step_s}
    rest_s = max(0.0, step_s - sum(large.values()))
    return f"{1e3 * step_s:.0f} ms/step: " + ", ".join(
        f"{name} {1e3 * seconds:.0f}" for name, seconds in [*large.items(), ("rest", rest_s)]
    )


class _Events:
    """TensorBoard event file, written by this thread.

    tensorboardX's own writers either leave that to another thread, and wait for it for ever once a
    full disk has killed it, or may leave a part of a record in the file.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        # The form of name by which TensorBoard knows its files.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file = WholeAppends(folder / name)
        self._records = bytearray()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard then forgets what earlier files say of the steps from here on.
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=first_step + 1, wall_time=time.time(), session_log=start))
        self.write()

    def add(self, step: int, values: dict[str, float], *, group: str) -> None:
        """Figures of a step, for the next `write`."""
        for name, value in values.items():
            summary = scalar(f"{group}/{name}", value)
            self._add(Event(step=step, wall_time=time.time(), summary=summary))

    def write(self) -> None:
        """Write what was added. Raises OSError if the disk refuses; the file then keeps it."""
        records, self._records = bytes(self._records), bytearray()
        self.file.append(records)

    def _add(self, event: Event) -> None:
        """A TFRecord: length, its masked CRC-32C, the event, its masked CRC-32C."""
        body = event.SerializeToString()
        length = struct.pack("<Q", len(body))
        for part in (length, body):
            self._records += part + struct.pack("<I", masked_crc32c(part))
