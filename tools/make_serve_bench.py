"""Measure how long `namr serve` takes to answer, and write the table of docs/serving.md.

    namr index build runs/demo --shards homeware --out gallery
    python tools/make_serve_bench.py gallery             (measures, and writes)
    python tools/make_serve_bench.py gallery --trial     (a tenth of it, and writes nothing)
    python tools/make_serve_bench.py --table             (the table alone, from what is there)

The service is a process of its own on the machine of its clients, which are threads of this one.
Each sends a picture, waits for its neighbours and sends the next, on one connection. Figures go
into docs/results/serve.json.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from namr_dist.atomic import write_atomic
from namr_dist.data.location import open_shards
from namr_dist.provenance import provenance

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "serve.json", DOCS / "serving.md"
CLIENTS = (1, 4, 20)
REQUESTS = 200
"""Of all clients together, for each number of them."""
WARM_UP = 20
PICTURES = 64
NEIGHBOURS = 6


def pictures() -> list[bytes]:
    """Images of homeware's training split, which no gallery of its test split holds."""
    manifest = open_shards(None)
    index = manifest.index("train")
    files = []
    for position in range(0, len(index), len(index) // PICTURES)[:PICTURES]:
        with open(manifest.path(manifest.shards[index.shard_N[position]]), "rb") as file:
            file.seek(int(index.offset_N[position]))
            files.append(file.read(int(index.length_N[position])))
    return files


@contextmanager
def serving(index: Path) -> Iterator[tuple[int, int]]:
    """The port and the process of a service over an index."""
    with tempfile.TemporaryFile("w+") as said, open(os.devnull, "w") as nowhere:
        service = subprocess.Popen(
            [sys.executable, "-m", "namr_dist.cli", "serve", str(index), "--port", "0"],
            stdout=said,
            stderr=nowhere,
        )
        try:
            while True:
                said.seek(0)
                if address := re.search(r"http://\S+", said.read()):
                    break
                if service.poll() is not None:
                    raise SystemExit(f"namr serve {index} ended with {service.returncode}")
                time.sleep(0.1)
            yield urlsplit(address[0]).port or 80, service.pid
        finally:
            service.terminate()
            service.wait()


def cpu_s(process: int) -> float:
    """Seconds of all of a process's threads on a CPU, in all; Linux alone says it here."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    port: int, process: int, clients: int, requests: int, files: list[bytes]
) -> dict[str, float]:
    """Milliseconds from a request to the last byte of its answer, answers a second, and the
    service's time on a CPU, which other work on the machine changes little."""

    def client(number: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        taken_ms = []
        for turn in range(requests // clients):
            body = files[(number * 7 + turn) % len(files)]
            began_s = time.perf_counter()
            connection.request(
                "POST", f"/search?k={NEIGHBOURS}", body, {"Content-Type": "image/jpeg"}
            )
            answer = connection.getresponse()
            found = json.loads(answer.read())
            taken_ms.append(1000 * (time.perf_counter() - began_s))
            assert answer.status == 200 and len(found["neighbours"]) == NEIGHBOURS, found
        connection.close()
        return taken_ms

    began_s, began_cpu_s = time.perf_counter(), cpu_s(process)
    with ThreadPoolExecutor(clients) as pool:
        taken_ms = [one for many in pool.map(client, range(clients)) for one in many]
    seconds = time.perf_counter() - began_s
    cuts = statistics.quantiles(taken_ms, n=20, method="inclusive")
    return {
        "clients": clients,
        "requests": len(taken_ms),
        "p50_ms": round(statistics.median(taken_ms), 1),
        "p95_ms": round(cuts[-1], 1),
        "per_second": round(len(taken_ms) / seconds, 1),
        "cpu_ms": round(1000 * (cpu_s(process) - began_cpu_s) / len(taken_ms), 1),
    }


def measured(index: Path, requests: int) -> dict[str, Any]:
    """The record of all numbers of clients."""
    made = {**provenance(), "date": datetime.date.today().isoformat()}
    made["versions"] += f", FastAPI {version('fastapi')}, uvicorn {version('uvicorn')}"
    load = os.getloadavg()[0]
    files = pictures()
    with serving(index) as (port, process):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("GET", "/healthz")
        about = json.loads(connection.getresponse().read())
        measure(port, process, 1, WARM_UP, files)
        rows = [measure(port, process, clients, requests, files) for clients in CLIENTS]
    return {
        **made,
        "gallery": f"{about['pictures']:,} pictures, model {about['model']}, mode {about['mode']}",
        "protocol": f"{PICTURES} JPEGs of homeware's training split, {min(map(len, files)) / 1000:.0f} to "
        f"{max(map(len, files)) / 1000:.0f} kB, k = {NEIGHBOURS}; clients on the same machine, each with one "
        "request at a time on one connection",
        "threads": os.environ.get("OMP_NUM_THREADS", "as torch chooses"),
        "load_average_before": round(load, 1),
        "rows": rows,
    }


def table(record: dict[str, Any]) -> str:
    """What stands between the page's marks."""
    lines = [
        "| clients | p50, ms | p95, ms | answers / s | on a CPU, ms |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['clients']} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} | {row['per_second']:.1f} "
        f"| {row['cpu_ms']:.0f} |"
        for row in record["rows"]
    ]
    made = (
        f"{record['gallery']}; {record['rows'][0]['requests']} requests a row. {record['protocol']}. "
        f"{record['machine']}; threads: {record['threads']}; load average before: "
        f"{record['load_average_before']}; {record['versions']}; commit {record['commit']}; "
        f"{record['date']}. Figures: [results/serve.json](results/serve.json), written by "
        "`tools/make_serve_bench.py`."
    )
    return "\n".join([*lines, "", made, ""])


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path, nargs="?", metavar="INDEX")
    parser.add_argument("--trial", action="store_true", help="a tenth, and write nothing")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    if not asked.table:
        if asked.index is None:
            parser.error("give an INDEX, or --table")
        record = measured(asked.index, REQUESTS // 10 if asked.trial else REQUESTS)
        if asked.trial:
            print(table(record))
            return
        write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")
    shown = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    page = re.sub(
        r"(<!-- serve:begin -->\n).*?(<!-- serve:end -->)",
        lambda match: match[1] + shown + match[2],
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    write_atomic(PAGE, page)


if __name__ == "__main__":
    sys.exit(main())
