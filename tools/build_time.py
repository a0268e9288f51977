"""Seconds that a set of the size of Stanford Online Products takes to build and to verify. Its
files are tiny, so this is the time of everything but decoding.

    python tools/build_time.py FOLDER > docs/results/build-time.txt

FOLDER is made, with the images and the shards, and is left for a second look.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from namr_dist.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "data"))

from full_size import full_size_sop


def timed(text: str, *words: str) -> str:
    """Run `namr shards` with these words, print what it took, and return what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "namr_dist.cli", "shards", *words],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(f"{text:<20} {time.perf_counter() - began:6.1f} s  {cpu_s:6.1f} CPU-s", flush=True)
    return done.stdout


def main() -> None:
    """Make the set, build it, build it again and verify it, and print what each took."""
    folder = Path(sys.argv[1])
    print(*(f"{name}: {value}" for name, value in provenance().items()), sep="\n")
    source = full_size_sop(folder / "source")
    print(f"load at the start: {os.getloadavg()[0]:.1f}")
    out = str(folder / "shards")
    built = json.loads(
        timed(
            "build, 2 workers",
            "build",
            "sop",
            str(source),
            "--out",
            out,
            "--workers",
            "2",
            "--json",
        )
    )
    for split, row in built["splits"].items():
        print(
            f"  {split:<5} {row['images']:,} images  {row['classes']:,} classes  {row['shards']} shards  "
            f"{row['mib']:.0f} MiB"
        )
    timed("build again, finished", "build", "sop", str(source), "--out", out, "--workers", "2")
    print(timed("verify", "verify", out).strip())


if __name__ == "__main__":
    main()
