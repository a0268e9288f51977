"""Files that others made, changed at random: the long form of tests/test_mutated_files.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from reliability.text import table

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "test_mutated_files.py"
LONG, SHORT = (
    "test_five_hundred_changed_files_are_read_or_refused",
    ("test_a_changed_file_is_read_or_refused_in_words"),
)
_OPTIONS = ("-v", "-p", "no:cacheprovider", "-o", "junit_family=xunit1")  # which has properties


def measure(folder: Path, trial: int | None) -> dict[str, Any]:
    """500 changes of each kind of file. trial: as many as `make test` tries, of some kinds."""
    words = [LONG, "whole"] if trial is None else [f"{SHORT} and (hostfile or table)", "not whole"]
    report = folder / "report.xml"
    pytest = [sys.executable, "-m", "pytest", *_OPTIONS, str(TESTS), "-k", words[0], "-m", words[1]]
    places = ["--junitxml", str(report), "--basetemp", str(folder / "temp")]
    subprocess.run([*pytest, *places], cwd=ROOT, check=False)
    kinds = []
    for case in ElementTree.parse(report).iter("testcase"):
        said = {one.get("name"): int(one.get("value", "0")) for one in case.iter("property")}
        failure = case.find("failure")
        if not said:
            raise SystemExit(f"{case.get('name')} ended early:\n{ElementTree.tostring(case)!r}")
        kinds.append(
            {
                "kind": case.get("name", "").split("[")[1].rstrip("]"),
                **said,
                "faults": "" if failure is None else failure.get("message", "")[:2000],
            }
        )
    return {
        "protocol": f"`{TESTS.relative_to(ROOT)}`, its long form: half of the changes are of bytes, half of "
        "parsed JSON, where a file is JSON; seeded",
        "kinds": kinds,
    }


def tables(record: dict[str, Any]) -> list[str]:
    """A line a kind of file."""
    names = ("changes", "read", "refused", "tracebacks")
    lines = [[one["kind"], *(str(one[name]) for name in names)] for one in record["kinds"]]
    return table(["file", *names], lines, words=1)
