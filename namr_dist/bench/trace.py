"""What a Chrome trace of torch.profiler says: which operations ran, how often and how long."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories that Kineto, torch's tracer, gives to what a GPU does."""
_TOP = 12


@dataclass(frozen=True, kw_only=True)
class Operation:
    """All calls of one name in the trace."""

    name: str
    calls: int
    ms: float
    share: float
    """Of the time of all operations."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a trace holds."""

    on_device: bool
    """Operations are a GPU's kernels and copies; otherwise torch's operators on the CPU, each
    without those that it calls."""
    steps: int
    span_ms: float
    """From the begin of the first operation to the end of the last."""
    busy_share: float
    """Of the span in which at least one operation ran. The profiler slows down the CPU, and so a
    GPU that waits for it: without the profiler it is at least as busy."""
    top: tuple[Operation, ...]
    """Those that took longest, longest first."""


def summarise(trace: Path) -> Summary:
    """What a Chrome trace of torch.profiler holds."""
    events = [
        event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"
    ]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    device = [event for event in events if event.get("cat") in _ON_DEVICE]
    shown = device or [event for event in events if event.get("cat") == "cpu_op"]
    own = ((event["name"], event["dur"]) for event in device) if device else _own_us(shown)
    calls: dict[str, int] = defaultdict(int)
    spent_us: dict[str, float] = defaultdict(float)
    for name, own_us in own:
        calls[name] += 1
        spent_us[name] += own_us
    total_us = sum(spent_us.values()) or 1.0
    span_us = max(map(_end_us, shown), default=0.0) - min(
        (event["ts"] for event in shown), default=0.0
    )
    top = sorted(spent_us, key=lambda name: spent_us[name], reverse=True)[:_TOP]
    return Summary(
        on_device=bool(device),
        steps=len(steps),
        span_ms=span_us / 1e3,
        busy_share=_covered_us(shown) / span_us if span_us else 0.0,
        top=tuple(
            Operation(
                name=name,
                calls=calls[name],
                ms=spent_us[name] / 1e3,
                share=spent_us[name] / total_us,
            )
            for name in top
        ),
    )


def _own_us(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Name and microseconds of each call, less those of the calls within it on the same thread."""
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_thread[event["pid"], event["tid"]].append(event)
    for of_thread in by_thread.values():
        of_thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        own_us = [event["dur"] for event in of_thread]
        running: list[int] = []
        for number, event in enumerate(of_thread):
            while running and _end_us(of_thread[running[-1]]) <= event["ts"]:
                running.pop()
            if running:
                own_us[running[-1]] -= event["dur"]
            running.append(number)
        yield from zip((event["name"] for event in of_thread), own_us, strict=True)


def _covered_us(events: Iterable[dict[str, Any]]) -> float:
    """Microseconds in which at least one of them ran."""
    covered_us, reached_us = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        covered_us += max(0.0, _end_us(event) - max(event["ts"], reached_us))
        reached_us = max(reached_us, _end_us(event))
    return covered_us


def _end_us(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])
