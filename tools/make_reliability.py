"""Measure what docs/reliability.md says, and write its tables.

    python tools/make_reliability.py                   (all parts, one after the other)
    python tools/make_reliability.py --only kills      (that part again; the others are kept)
    python tools/make_reliability.py --tables          (the tables alone, from what is there)

Each part writes its figures into docs/results/reliability.json as soon as it has ended, with
machine, versions, commit, date and protocol, and then the page. Linux only: it looks into /proc,
and the part full-disk mounts a disk of its own in a user namespace (unshare of util-linux).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from namr_dist.atomic import write_atomic
from namr_dist.provenance import provenance

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "reliability.json", DOCS / "reliability.md"
PARTS = ("kills", "flips", "fuzz", "full-disk", "signals", "stability", "halt")
"""A module of tools/reliability each: `measure` makes a record, `tables` the lines of the page."""


def _module(part: str) -> Any:
    return import_module(f"reliability.{part.replace('-', '_')}")


def measured(part: str, trial: int | None, made: dict[str, str]) -> dict[str, Any]:
    """The record of a part. trial: so many of each instead of the number that is published; made:
    by what, and when."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        record = _module(part).measure(Path(name), trial)
    for folder, shown in ((name, "…"), (str(DOCS.parent), ".")):  # this machine's
        record = json.loads(json.dumps(record).replace(folder, shown))
    return {**made, "minutes": round((time.monotonic() - began) / 60, 1), **record}


def section(part: str, results: dict[str, Any]) -> str:
    """What stands between the page's marks of a part; nothing before it has been measured."""
    record = results.get(part)
    if record is None:
        return ""
    lines = _module(part).tables(record)
    made = (
        f"{record['protocol']}. {record['machine']}; {record['versions']}; commit {record['commit']}; "
        f"{record['date']}; {record['minutes']} minutes. Figures: "
        "[results/reliability.json](results/reliability.json)."
    )
    return "\n".join([*lines, *([""] if lines[-1] else []), made, ""])


def write_page(page: Path, results: dict[str, Any]) -> None:
    """Replace what stands between the page's marks."""
    text = page.read_text(encoding="utf-8")
    for part in PARTS:
        content = section(part, results)
        marked = rf"(<!-- {part}:begin -->\n).*?(<!-- {part}:end -->)"
        text = re.sub(
            marked,
            lambda match, content=content: match[1] + content + match[2],
            text,
            flags=re.DOTALL,
        )
    page.write_text(text, encoding="utf-8")


def read_results() -> dict[str, Any]:
    """Part → record, of what has been measured."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    assert isinstance(results, dict)
    return results


def main() -> None:
    """Measure parts and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument(
        "--trial",
        type=int,
        metavar="N",
        help="try the parts with N of each, print their tables, and write nothing",
    )
    asked = parser.parse_args()
    # Before results are written, which would make the commit a changed one.
    made = {**provenance(), "date": datetime.date.today().isoformat()}
    for part in () if asked.tables else asked.only:
        print(f"== {part}", flush=True)
        record = measured(part, asked.trial, made)
        print(section(part, {part: record}), flush=True)
        if asked.trial is None:
            results = {**read_results(), part: record}
            ordered = {name: results[name] for name in PARTS if name in results}
            write_atomic(RESULTS, json.dumps(ordered, indent=1) + "\n")
    if asked.trial is None:
        write_page(PAGE, read_results())


if __name__ == "__main__":
    sys.exit(main())
