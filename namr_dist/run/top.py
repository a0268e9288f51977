"""`namr top`: a run's progress, losses, speed and checkpoints at a glance, live on a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from namr_dist.run.state import RunReader, RunState, Validation
from namr_dist.terminal import Console, plain
from namr_dist.text import duration, printable

_REFRESH_S = 2.0
_STYLES = {
    "training": "green",
    "finished": "bold green",
    "evaluated": "bold green",
    "stopped": "yellow",
    "not started": "dim",
}
_WIDEST = 110
"""Columns of a terminal beyond which a bar tells no more."""
_BAR_COLUMNS = 24


def top(run: Path, *, once: bool = False, as_json: bool = False) -> None:
    """Show the run in the folder `run`: on a terminal until it is finished or Ctrl-C is pressed,
    else a single time.

    Raises InputError if the folder holds no run.
    """
    reader, console = RunReader(run), Console()
    if as_json:
        print(json.dumps(dataclasses.asdict(reader.look()), indent=2))
    elif once or not console.is_terminal:
        console.print(view(reader.look()))
    else:
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(console=console, auto_refresh=False) as live,
        ):
            while True:
                state = reader.look()
                live.update(view(state), refresh=True)
                if state.state in ("finished", "evaluated"):
                    return
                time.sleep(_REFRESH_S)


def view(state: RunState) -> RenderableType:
    """The whole picture."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _rows(state):
        table.add_row(name, plain(value) if isinstance(value, str) else value)
    bar = Table.grid(expand=True)
    bar.width = _WIDEST
    bar.add_row(ProgressBar(total=max(state.steps, 1), completed=state.step))
    return Group(_title(state), bar, table)


def _title(state: RunState) -> Text:
    title = Text(state.state, style=_STYLES[state.state])
    if state.state == "stopped":
        title.append("; goes on with --resume")
    if state.silent_s is not None:
        title.append(f", silent for {duration(state.silent_s)}", style="bold red")
    return Text.assemble(title, printable(f"   {state.recipe} → "), (printable(state.run), "bold"))


def _rows(state: RunState) -> Iterator[tuple[str, RenderableType]]:
    epoch = "" if state.epoch is None else f", epoch {state.epoch}"
    yield (
        "step",
        f"{state.step:,} of {state.steps:,}, {100 * state.step / max(state.steps, 1):.1f} %{epoch}",
    )
    yield "time", _times(state)
    if state.loss is not None:
        yield (
            "loss",
            (
                f"{state.loss:.4f} (metric {_figure(state.metric_loss, '.4f')}, "
                f"ranking {_figure(state.ranking_loss, '.4f')}), lr {_figure(state.lr, '.1e')}"
            ),
        )
    if state.img_per_s is not None:
        yield (
            "speed",
            (
                f"{state.img_per_s:,.0f} img/s"
                + (f", {100 * state.mfu:.0f} % of peak" if state.mfu is not None else "")
                + (f", {state.gathered_mib:.2f} MiB gathered a step" if state.gathered_mib else "")
            ),
        )
    if state.step_s:
        yield "a step", _phases(state.step_s, state.phases_s)
    if state.slowest_rank is not None:
        host = f" on {state.slowest_host}" if state.slowest_host else ""
        yield (
            "slowest",
            f"rank {state.slowest_rank}{host}, {1e3 * (state.slowest_s or 0):.0f} ms of its own a step",
        )
    if state.validation:
        yield "validation", _validation(state.validation)
    if state.best_validation and state.best_validation != state.validation:
        yield "best so far", _validation(state.best_validation)
    if state.checkpoint_step is not None:
        yield (
            "checkpoint",
            f"step {state.checkpoint_step:,}, {duration(state.checkpoint_age_s or 0)} ago",
        )
    if state.resumed_from:
        steps = ", ".join(f"{step:,}" for step in state.resumed_from)
        yield "restarts", f"{len(state.resumed_from)}, from step {steps}"
    if state.damaged_images:
        yield (
            "damaged",
            Text(
                f"{state.damaged_images:,} images, replaced {state.replacements or 0:,} times",
                style="yellow",
            ),
        )
    if state.unreadable_lines:
        lines = "lines" if state.unreadable_lines > 1 else "line"
        yield "log", Text(f"{state.unreadable_lines:,} {lines} cannot be read", style="yellow")


def _times(state: RunState) -> str:
    parts = [f"{duration(state.elapsed_s)} of training"]
    if state.left_s is not None and state.state in ("training", "stopped"):
        parts.append(f"{duration(state.left_s)} left")
    if state.last_line_age_s is not None:
        parts.append(f"last line {duration(state.last_line_age_s)} ago")
    return ", ".join(parts)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _validation(validation: Validation) -> str:
    figures = "  ".join(f"{name} {value:.1f}" for name, value in validation.figures.items())
    return f"{figures}  at step {validation.step:,}"


def _phases(step_s: float, phases_s: dict[str, float]) -> Table:
    """Milliseconds of a step and of its phases, their shares, and the shares as bars."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    table.add_column()
    rest_s = max(0.0, step_s - sum(phases_s.values()))
    for name, seconds in [*phases_s.items(), ("rest", rest_s)]:
        share = seconds / step_s
        table.add_row(
            plain(name),
            f"{1e3 * seconds:,.1f} ms",
            f"{100 * share:.0f} %",
            Bar(1, 0, share, width=_BAR_COLUMNS, color="cyan"),
        )
    table.add_row("in all", f"{1e3 * step_s:,.1f} ms", "")
    return table
