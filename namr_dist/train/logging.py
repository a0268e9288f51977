"""What a run says while it trains: a line of JSON each for programs, TensorBoard, a bar or plain
lines for people."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from namr_dist.run.folder import RunFolder
from namr_dist.terminal import Console, plain
from namr_dist.train.phases import StepTimes
from namr_dist.train.structure_fit import Fitted


class RunLog:
    """One run's log. On a terminal a progress bar, else a line every so many steps.

    Only the first rank has one. Lines are flushed as they come, so `tail -f` and a later crash see
    all of them.
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
        # Unbuffered: a line that did not fit the disk is not tried again when the file is closed.
        self._path = run.log
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._events: _Events | None = (
            _Events(run.tensorboard, first_step=first_step) if tensorboard else None
        )
        self._steps = steps
        self._hosts = hosts
        self._peak_img_per_s = peak_img_per_s
        self._speed = ""
        self._console = Console(file=sys.stderr)
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
            self._bar.stop()
        if self._replaced:
            self.say(
                f"damaged   {len(self._replaced)} images, replaced {self._replaced.total()} times by others of "
                "their classes"
            )
        # What could not be written has been told already; closing would only try, and fail, once
        # more.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            if self._events:
                self._events.close()
        self._file.close()

    @property
    def time_s(self) -> float:
        """Seconds since the log was opened, and those of the steps before."""
        return time.perf_counter() - self._began

    def say(self, text: str) -> None:
        """A line for people."""
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
        os.fsync(self._file.fileno())

    def _line(self, figures: dict) -> None:
        try:
            self._file.write((json.dumps(figures) + "\n").encode())
        except OSError as error:
            error.filename = str(self._path)
            raise

    def _write(self, figures: dict) -> None:
        self._line(figures)
        if self._events:
            values = figures.get("val") or {
                name: value
                for name, value in figures.items()
                if name != "step" and not isinstance(value, str)
            }
            self._events.write(
                figures["step"],
                values,
                group="val" if "val" in figures else "train",
                flush="loss" not in figures,
            )


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

    tensorboardX's own SummaryWriter leaves that to another thread, and waits for it for ever once a
    full disk has killed it.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._writer = EventsWriter(str(folder / "events"))
        # TensorBoard then forgets what earlier files say of the steps from here on.
        self._writer.write_event(
            Event(
                step=first_step + 1,
                wall_time=time.time(),
                session_log=SessionLog(status=SessionLog.START),
            )
        )

    def write(self, step: int, values: dict[str, float], *, group: str, flush: bool) -> None:
        try:
            for name, value in values.items():
                summary = scalar(f"{group}/{name}", value)
                self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            if flush:  # waits for the disk: not at every step
                self._writer.flush()
        except OSError as error:
            error.filename = str(self._folder)
            raise

    def close(self) -> None:
        self._writer.close()
