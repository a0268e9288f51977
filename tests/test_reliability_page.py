"""docs/reliability.md shows what docs/results/reliability.json holds, faults included."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    return import_module("make_reliability")


def test_the_page_shows_what_the_file_holds(script: ModuleType, tmp_path: Path) -> None:
    page, committed = tmp_path / "page.md", script.PAGE.read_text()
    page.write_text(committed)
    script.write_page(page, script.read_results())
    assert page.read_text() == committed, "run tools/make_reliability.py --tables"
    for part in script.PARTS:
        assert committed.count(f"<!-- {part}:begin -->\n") == 1


def row(script: ModuleType, part: str, record: dict[str, Any]) -> list[str]:
    """The cells of the first line of a part's table."""
    about = ("protocol", "machine", "versions", "commit", "date", "minutes")
    text = script.section(part, {part: {**dict.fromkeys(about, "x"), **record}})
    return [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]


def test_kills_are_counted_by_where_they_fell(script: ModuleType) -> None:
    def kill(whom: str, phase: str, writing: list[int], *codes: int) -> dict[str, Any]:
        found = {"whom": whom, "phase": phase, "writing": writing, "exit_codes": list(codes)}
        return {**found, "aimed": bool(writing), "waited": len(codes) == 1}

    kills = [
        kill("all", "starting", [], -9, -9),
        kill("one", "training", [6], -9, 69),
        kill("one", "training", [], 69, -9),
        kill("one", "starting", [], -9),
    ]
    world = {"ranks": 2, "runs": 1, "opened": 4, "kills": kills, "faults": ["a torn one"]}
    cells = row(script, "kills", {"worlds": [world]})
    assert cells == ["2", "4", "3", "1", "2", "1", "0", "69 (2), wait (1)", "4", "1", "1"]


def test_a_slope_is_that_of_a_straight_line(script: ModuleType) -> None:
    def look(step: int) -> dict[str, Any]:
        rank = {"memory_mib": 400 + step / 500, "descriptors": 20, "threads": 5, "children": 1}
        return {"step": step, "ranks": [rank, rank]}

    record = {"looks": [look(step) for step in range(100, 2001, 100)]}
    memory = row(script, "stability", record)
    assert memory[2:5] == ["400.4", "402", "404"]
    assert memory[-1] == "+2.00 [+2.00, +2.00]"


def test_a_flip_that_nobody_found_is_shown(script: ModuleType) -> None:
    kind = {"kind": "config.json", "read_by": "x", "bytes": 2000, "flips": 200}
    outcomes = {"found": 150, "not found": 49, "traceback": 1}
    cells = row(script, "flips", {"kinds": [{**kind, "outcomes": outcomes}]})
    assert cells == ["config.json", "x", "2,000", "200", "150", "0", "49", "1"]


def test_an_exit_code_that_was_not_promised_is_marked(script: ModuleType) -> None:
    signals = import_module("reliability.signals")
    ours, deepspeed = signals.LAUNCHERS[0], signals.LAUNCHERS[-1]
    assert signals._as_promised(ours, "SIGTERM", [75, 75]) is True
    assert signals._as_promised(ours, "SIGTERM", [75, 1]) is False
    assert signals._as_promised(ours, signals.KILL, [137, 69]) is True
    assert signals._as_promised(ours, signals.KILL, [1]) is False
    assert signals._as_promised(deepspeed, "SIGTERM", [143]) is None
