"""Make README's first result from a run's own files: the table, the picture, and the log they come
from.

    python tools/make_result.py runs/demo

Copies metrics.json and metrics.jsonl to docs/results/homeware/, writes the table between README's
markers, and draws docs/homeware.png: test queries with their nearest neighbours.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image, ImageDraw

from namr_dist.config import Config
from namr_dist.data.location import open_shards
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.retrieval.modes import CALIBRATED, SAMPLE, STRUCTURE, row_name
from namr_dist.retrieval.search import search_excluding_self

DOCS = Path(__file__).parents[1] / "docs"
QUERIES, NEIGHBOURS, SIDE, EDGE, GAP = 6, 7, 112, 5, 6
GREEN, RED, GREY = (22, 122, 72), (190, 38, 38), (160, 160, 160)


def table(metrics: dict) -> str:
    """README's lines: what was run, on what, and the figures."""
    protocol, train = metrics["protocol"], metrics["train"]
    rows = {
        **metrics["baselines"],
        "trained, sample embedding (s = 1)": metrics["test"][SAMPLE.name],
        "**trained, sample and structure embedding**": metrics["test"][STRUCTURE.name],
        "the same, structure embeddings shuffled": metrics["test"][
            row_name(STRUCTURE.name, "shuffled")
        ],
        f"trained, {CALIBRATED.name} (looks at the gallery)": metrics["test"][CALIBRATED.name],
    }
    lines = [
        f"`make demo`: {protocol['backbone']}, {protocol['metric loss']} loss with multi-cluster ranking "
        f"({protocol['ranking']}), {train['steps']} steps of {protocol['batch']} in {train['seconds']:.0f} s on "
        f"{protocol['trained on']}. Test: {metrics['test_counts']['queries']:,} rendered views of "
        f"{metrics['test_counts']['classes']} household products that training never saw, leave one out, "
        f"{protocol['distance'].split(';')[0]}; one run, seed {protocol['seed']}.",
        "",
        "| embedding | R@1 | R@8 | MAP@R |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {row['R@1']:.1f} | {row['R@8']:.1f} | {row['MAP@R']:.1f} |"
        for name, row in rows.items()
    ]
    lines += [
        "",
        f"The structure embedding: {protocol['structure']}. Protocol and log: "
        "[docs/results/homeware](docs/results/homeware), written by `tools/make_result.py`.",
    ]
    return "\n".join(lines)


def picture(run: Path) -> Image.Image:
    """Queries on the left, nearest first; green and solid is right, red and slanted is wrong."""
    config = Config.load(run / "config.json")
    manifest = open_shards(config.data.path, config.data.remote)
    index = manifest.index(config.data.test_split)
    images = ShardImages(manifest, index, TestTransform(size=SIDE, crop_share=1.0))
    tensors = safetensors.numpy.load_file(run / "embeddings.safetensors")
    chosen = np.random.default_rng(0).choice(len(index), QUERIES, replace=False)
    _, nearest = search_excluding_self(
        tensors["z"][chosen], tensors["z"], NEIGHBOURS, query_ids_Q=chosen
    )
    cell = SIDE + 2 * EDGE + GAP
    sheet = Image.new("RGB", (cell * (NEIGHBOURS + 1) + 3 * GAP, cell * QUERIES + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, neighbours) in enumerate(zip(chosen, nearest, strict=True)):
        for column, position in enumerate([query, *neighbours]):
            right = index.label_N[position] == index.label_N[query]
            colour = GREY if column == 0 else GREEN if right else RED
            left, top = GAP + column * cell + (2 * GAP if column else 0), GAP + row * cell
            draw.rectangle(
                (left, top, left + SIDE + 2 * EDGE - 1, top + SIDE + 2 * EDGE - 1), fill=colour
            )
            sheet.paste(
                Image.open(io.BytesIO(images.jpeg(int(position)))), (left + EDGE, top + EDGE)
            )
            if column and not right:  # not by colour alone
                draw.line((left, top, left + 18, top + 18), fill=RED, width=4)
    return sheet


def main(run: Path) -> None:
    """Copy the run's files, draw the picture and replace what stands between README's marks."""
    target = DOCS / "results" / "homeware"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "metrics.jsonl", "config.json"):
        shutil.copyfile(run / name, target / name)
    picture(run).save(DOCS / "homeware.png", optimize=True)
    readme = DOCS.parent / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split("<!-- result:begin -->")
    after = rest.split("<!-- result:end -->")[1]
    text = table(json.loads((run / "metrics.json").read_text(encoding="utf-8")))
    readme.write_text(
        f"{before}<!-- result:begin -->\n{text}\n<!-- result:end -->{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
