"""Write the tables of docs/distributed.md from docs/results/gather.csv and
docs/results/large-batch.json.

namr bench gather --csv docs/results/gather.csv
python tools/large_batch.py
python tools/make_distributed.py
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def gather_table() -> str:
    """Both providers side by side, size by size."""
    with open(DOCS / "results" / "gather.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| ranks | batch | MiB a rank receives a step, gather with grad | here | ratio | time, ratio of medians |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ours, other in zip(rows[::2], rows[1::2], strict=True):
        received, others = (int(row["received_bytes"]) for row in (ours, other))
        lines.append(
            f"| {ours['ranks']} | {ours['rows']} × {ours['width']} | {others / 2**20:.2f} | "
            f"{received / 2**20:.2f} | {received / others:.3f} | "
            f"{float(ours['median_s']) / float(other['median_s']):.2f} |"
        )
    worst = max(float(row["gradient_error"]) for row in rows)
    return "\n".join(
        [
            *lines,
            "",
            f"Triplet loss with multi-cluster ranking, fp32; {rows[0]['machine']}, "
            f"{rows[0]['versions']}. Largest difference to one process's gradient: {worst:.0e} of its norm. "
            "Time is a loss and its gradient, all ranks on these cores.",
        ]
    )


def caching_text() -> str:
    """What the large batch took, and how equal it is."""
    record = json.loads((DOCS / "results" / "large-batch.json").read_text())
    run = record["run"]
    lines = [
        f"Measured by `tools/large_batch.py` ([results/large-batch.json](results/large-batch.json)) on "
        f"{record['machine']}: a global batch of {record['batch']:,} images of {record['image_size']} px on "
        f"{record['ranks']} ranks, {record['backbone']}, {record['micro_batch']} at a time, ZeRO "
        f"{record['zero_stage']}. All processes together, loader workers included, held at most "
        f"{run['peak_mib'] / 1024:.2f} GiB, looked at five times a second; a step took {run['step_s']:.0f} s.",
        "",
        "| images | type | largest difference of a parameter's gradient, of the whole gradient's norm |",
        "| ---: | --- | ---: |",
    ]
    lines += [
        f"| {one['images']:,} in {one['pieces']} pieces, and all at once | "
        f"{one['dtype'].removeprefix('torch.')} | {one['gradient_difference']:.0e} |"
        for one in record["equality"]
    ]
    lines += [
        "",
        "float64 shows that both are the same sum; in float32 it depends on the order of its "
        "summands, most of which cancel.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the page's marks."""
    page = DOCS / "distributed.md"
    text = page.read_text(encoding="utf-8")
    for name, content in (("gather", gather_table()), ("caching", caching_text())):
        text = re.sub(
            rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)",
            rf"\g<1>{content}\n\g<2>",
            text,
            flags=re.DOTALL,
        )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
