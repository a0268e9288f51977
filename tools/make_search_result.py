"""Search with views that an index has not, by the commands that a user types, and compare what is
found with brute force.

    python tools/make_search_result.py runs/demo

Indexes homeware's test split, removes the first view of 100 products (drawn with seed 0), searches
for these views as picture files, and writes docs/results/search.json: how many hit lists are those
of brute force over the same items, by the mode's own definition in float64, and R@1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import namr_dist
from namr_dist.atomic import write_atomic
from namr_dist.data.location import open_shards
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages
from namr_dist.provenance import provenance

OUT = Path(__file__).parents[1] / "docs" / "results" / "search.json"
PRODUCTS, NEIGHBOURS = 100, 10


def namr(*words: object) -> str:
    """What a command prints. Exits with it if it fails."""
    command = [sys.executable, "-m", "namr_dist.cli", *map(str, words)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main(run: Path) -> None:
    """Build, remove, search, compare, write."""
    manifest = open_shards(None)
    split = manifest.index("test")
    images = ShardImages(manifest, split, TestTransform(size=1, crop_share=1.0))
    labels_C, first_C = np.unique(split.label_N, return_index=True)
    chosen = np.sort(np.random.default_rng(0).choice(len(labels_C), PRODUCTS, replace=False))
    with tempfile.TemporaryDirectory() as folder:
        index, views, ids = (Path(folder, name) for name in ("test.index", "views", "ids.txt"))
        views.mkdir()
        for position in first_C[chosen].tolist():
            views.joinpath(f"{split.keys[position]}.jpg").write_bytes(images.jpeg(position))
        ids.write_text("".join(f"{split.keys[position]}\n" for position in first_C[chosen]))
        namr("index", "build", run, "--shards", "homeware", "--split", "test", "--out", index)
        namr("index", "remove", index, "--ids", ids)
        found = json.loads(namr("search", index, views, "-k", NEIGHBOURS, "--json"))
        result = compare(index, found, dict(zip(split.keys, split.label_N.tolist(), strict=True)))
    write_atomic(OUT, json.dumps({**result, **provenance()}, indent=2) + "\n")
    print(json.dumps(result))


def compare(
    index: Path, found: list[dict[str, Any]], label_by_id: dict[str, int]
) -> dict[str, Any]:
    """Hits and brute force over the items' embeddings."""
    gallery = namr_dist.open_index(index)
    z_ND, kept_NE = gallery.embeddings()
    z_QD, s_QS = gallery.model.embed([one["query"] for one in found], structure=True)
    squared_QN = ((z_QD[:, None].astype(np.float64) - z_ND) ** 2).sum(axis=2)
    geometry = gallery.geometry
    if gallery.mode == "structure":
        assert geometry.gamma is not None and geometry.rho_max is not None
        squared_QN -= geometry.gamma * np.minimum(
            kept_NE[:, 0].astype(np.float64), geometry.rho_max
        )
    equal = right = 0
    for one, squared_N in zip(found, squared_QN, strict=True):
        best = [gallery.items.ids[item] for item in np.argsort(squared_N, kind="stable")]
        ids = [hit["id"] for hit in one["hits"]]
        equal += ids == best[:NEIGHBOURS]
        right += label_by_id[ids[0]] == label_by_id[Path(one["query"]).stem]
    return {
        "items": len(gallery),
        "mode": gallery.mode,
        "queries": len(found),
        "neighbours": NEIGHBOURS,
        "lists equal to brute force": equal,
        "R@1": 100 * right / len(found),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
