"""Does every retrieval mode survive ordinary indexes, and is what is called exact exact?

    python tools/make_index_recall.py recall --run RUN
    python tools/make_index_recall.py bytes --run RUN
    python tools/make_index_recall.py exact
    python tools/make_index_recall.py certificate
    python tools/make_index_recall.py table

The first four measure and write their part of docs/results/index_recall.json; the last writes the
tables of docs/indexes.md. RUN: a run of the recipe homeware that was evaluated. Default settings
were chosen on rows of another seed than those reported.

Shapes: Q queries, N items, D width of z, K neighbours.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from made_up_gallery import Rows, gallery_of, geometry_of, rows_of

from namr_dist.atomic import write_atomic
from namr_dist.gallery.embedder import network_of
from namr_dist.gallery.engine import SearchSettings
from namr_dist.gallery.gallery import Gallery
from namr_dist.gallery.geometry import Geometry
from namr_dist.gallery.tune import recall_of
from namr_dist.provenance import provenance
from namr_dist.retrieval.modes import MODES, Side
from namr_dist.retrieval.rerank import rerank
from namr_dist.retrieval.vectors import GALLERY_DENSITY_WEIGHT
from namr_dist.train.checkpoints.verified_file import read_tensors

ROOT = Path(__file__).resolve().parent.parent
JSON, PAGE = ROOT / "docs/results/index_recall.json", ROOT / "docs/indexes.md"
K, SEED, DELTA = 10, 0, 0.5
SIZES, QUERIES = (2_000, 20_000), 1_000
SWEEPS = {"hnsw": ("ef_search", (64, 128, 256)), "ivf": ("nprobe", (32, 64, 128))}
SMALL = {"flat": (0,), "fp16": (0,), "sq8": (0,), "ivfpq": (100, 400), "binary": (100, 400)}
"""Type → candidates that are ordered by exact distance."""
WIDTHS, EXACT_ITEMS, EXACT_QUERIES = (64, 128, 256, 512, 1024), 2_000, 10_000
CERTIFIED_QUERIES, CERTIFIED_WIDTH, CANDIDATES = 100_000, 64, (20, 100, 500)
_BLOCK = 1_000


def measure_recall(run: Path) -> list[dict[str, Any]]:
    """Recall of each mode and type, a line a setting."""
    lines = []
    for name, items, queries, geometry in _data(run):
        for mode in geometry.modes:
            if name.startswith("clusters with centres") and mode.name != "structure":
                continue  # the others do not look at ρ, and are measured with weights
            flat = gallery_of(items, geometry, type="flat", mode=mode.name)
            exact_QK = flat.nearest(queries.z_ND, queries.s_ND, K)[1]
            brute_QK = brute_force(flat, queries, K, candidates=SearchSettings().candidates)
            about = {"data": name, "items": len(items.z_ND), "mode": mode.name}
            lines.append(
                {**about, "type": "flat", "settings": {}, "recall": recall_of(exact_QK, brute_QK)}
            )
            for kind, (setting, values) in SWEEPS.items():
                other = flat.rebuilt(np.arange(len(flat)), kind)
                for value in values:
                    ids_QK = other.nearest(
                        queries.z_ND, queries.s_ND, K, settings=SearchSettings(**{setting: value})
                    )[1]
                    lines.append(
                        {
                            **about,
                            "type": kind,
                            "settings": {setting: value},
                            "default": getattr(SearchSettings(), setting) == value,
                            "recall": recall_of(ids_QK, brute_QK),
                        }
                    )
            for line in lines[-1 - sum(len(values) for _, values in SWEEPS.values()) :]:
                print(line, flush=True)
    return lines


def measure_bytes(run: Path) -> list[dict[str, Any]]:
    """Recall and bytes an item of types that store less than all, on homeware; all cells of ivfpq
    are looked through."""
    _, items, queries, geometry = next(_data(run))
    lines = []
    for mode in ("sample", "structure"):
        flat = gallery_of(items, geometry, type="flat", mode=mode)
        brute_QK = brute_force(flat, queries, K, candidates=0)
        for kind, sweep in SMALL.items():
            other = flat.rebuilt(np.arange(len(flat)), kind)
            for candidates in sweep:
                settings = SearchSettings(candidates=candidates or 1, nprobe=len(flat))
                ids_QK = other.nearest(queries.z_ND, queries.s_ND, K, settings=settings)[1]
                lines.append(
                    {
                        "mode": mode,
                        "items": len(flat),
                        "type": kind,
                        "candidates": candidates,
                        "bytes_per_item": round(other.engine.bytes_per_item(), 1),
                        "recall": recall_of(ids_QK, brute_QK),
                    }
                )
                print(lines[-1], flush=True)
    return lines


def _data(run: Path) -> Iterator[tuple[str, Rows, Rows, Geometry]]:
    """Name, items, queries, how they are compared."""
    network, config, _ = network_of(run)
    assert network.centres is not None
    tensors, _ = read_tensors(run / "embeddings.safetensors")
    order_N = np.random.default_rng(SEED).permutation(len(tensors["z"]))
    rows = Rows(z_ND=tensors["z"].numpy()[order_N], s_ND=tensors["s"].numpy()[order_N, -1:])
    geometry = Geometry(
        distance=config.distance,
        width=rows.z_ND.shape[1],
        delta=config.model.delta,
        gamma=float(network.centres.gamma),
        rho_max=float(network.centres.rho_max),
    )
    yield "homeware", rows.at(slice(500, None)), rows.at(slice(500)), geometry
    for name, delta in (("clusters with weights", DELTA), ("clusters with centres", None)):
        rows = rows_of(width=128, seed=SEED, delta=delta)
        for size in SIZES:
            queries = rows.at(slice(max(SIZES), max(SIZES) + QUERIES))
            yield name, rows.at(slice(size)), queries, geometry_of(rows, delta=DELTA)


def brute_force(gallery: Gallery, queries: Rows, k: int, *, candidates: int) -> np.ndarray:
    """(Q, K) int64: positions in order of the mode's own distance, in float64 over all items."""
    return np.concatenate(
        [ids_BK for _, ids_BK, _ in brute_blocks(gallery, queries, k, candidates=candidates)]
    )


def brute_blocks(
    gallery: Gallery, queries: Rows, k: int, *, candidates: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """A block of queries, their nearest positions (B, K), all distances (B, N) float64."""
    items = gallery.side(np.arange(len(gallery)))
    mode = gallery.mode
    for start in range(0, len(queries.z_ND), _BLOCK):
        block = slice(start, start + _BLOCK)
        side = gallery.geometry.side(queries.z_ND[block], queries.s_ND[block], name="queries")
        squared_BN = distances(mode, side, items)
        if mode == "rerank":
            plain_BN = distances("sample", side, items)
            outside_BN = np.ones(plain_BN.shape, dtype=bool)
            near_BC = np.argsort(plain_BN.astype(np.float32), axis=1, kind="stable")[:, :candidates]
            np.put_along_axis(outside_BN, near_BC, False, axis=1)
            squared_BN[outside_BN] = np.inf
        yield (
            block,
            np.argsort(squared_BN.astype(np.float32), axis=1, kind="stable")[:, :k],
            squared_BN,
        )


def distances(mode: str, queries: Side, items: Side) -> np.ndarray:
    """(Q, N) float64 squared distances of a mode: its formula, multiplied out, around the items'
    mean."""
    centre_D = items.z.mean(axis=0)
    zq, z = queries.z - centre_D, items.z - centre_D
    if mode in ("sample", "structure", "calibrated"):
        squared_QN = (zq * zq).sum(1)[:, None] - 2 * zq @ z.T + (z * z).sum(1)
        if mode == "structure":
            squared_QN -= items.bonus
        if mode == "calibrated":
            squared_QN -= GALLERY_DENSITY_WEIGHT * items.density
        return squared_QN
    sq = queries.s
    squared_QN = (sq * zq * zq).sum(1)[:, None] - 2 * (sq * zq) @ z.T + sq @ (z * z).T
    if mode == "symmetric":
        s = items.s
        squared_QN += (zq * zq) @ s.T - 2 * zq @ (s * z).T + (s * z * z).sum(1)
    return squared_QN


def measure_exact() -> list[dict[str, Any]]:
    """Of flat, positions that are not those of brute force: all, and those that no tie explains."""
    lines = []
    for width in WIDTHS:
        for mode in MODES:
            delta = None if mode.uses_centres else DELTA
            items, queries = _small_clusters(width, EXACT_ITEMS, EXACT_QUERIES, delta)
            began = time.perf_counter()
            gallery = gallery_of(
                items, geometry_of(items, delta=DELTA), type="flat", mode=mode.name
            )
            _, found_QK = gallery.nearest(queries.z_ND, queries.s_ND, K)
            seconds = time.perf_counter() - began
            other = untied = 0
            for block, ids_BK, squared_BN in brute_blocks(
                gallery, queries, K, candidates=SearchSettings().candidates
            ):
                differ_BK = ids_BK != found_QK[block]
                other += int(differ_BK.sum())
                untied += int((differ_BK & ~_tied(squared_BN, ids_BK, found_QK[block])).sum())
            lines.append(
                {
                    "width": width,
                    "mode": mode.name,
                    "queries": EXACT_QUERIES,
                    "items": EXACT_ITEMS,
                    "places": EXACT_QUERIES * K,
                    "tied_places_that_differ": other - untied,
                    "untied_places_that_differ": untied,
                    "search_s": round(seconds, 2),
                }
            )
            print(lines[-1], flush=True)
    return lines


def _tied(squared_QN: np.ndarray, ids_QK: np.ndarray, others_QK: np.ndarray) -> np.ndarray:
    """(Q, K) whether both have one distance in fp32, or neighbouring ones."""
    one_QK, other_QK = (np.take_along_axis(squared_QN, ids, 1) for ids in (ids_QK, others_QK))
    with np.errstate(invalid="ignore"):
        return np.abs(one_QK - other_QK) <= np.spacing(np.abs(one_QK).astype(np.float32))


def _small_clusters(width: int, items: int, queries: int, delta: float | None) -> tuple[Rows, Rows]:
    """Items in clusters of ten, each hundredth of them twice, and queries around the same means;
    with weights, or, where δ is None, with ρ."""
    rng = np.random.default_rng(width)
    means_CD = rng.standard_normal((items // 10, width))

    def draw(count: int) -> Rows:
        z_ND = means_CD[rng.integers(len(means_CD), size=count)]
        z_ND = z_ND + 0.5 * rng.standard_normal((count, width))
        shape = (count, 1 if delta is None else width)
        low, high = (0.0, 0.2 * width) if delta is None else (1 - delta, 1 + delta)
        s_ND = rng.uniform(low, high, shape)
        return Rows(z_ND=z_ND.astype(np.float32), s_ND=s_ND.astype(np.float32))

    stored, asked = draw(items), draw(queries)
    for column in (stored.z_ND, stored.s_ND):
        column[50::100] = column[::100]
    return stored, asked


def measure_certificate() -> list[dict[str, Any]]:
    """Queries that `rerank` certifies, and of these the ones whose order is not that of weighed
    distances over everything."""
    items, queries = _small_clusters(CERTIFIED_WIDTH, EXACT_ITEMS, CERTIFIED_QUERIES, DELTA)
    exact = gallery_of(items, geometry_of(items, delta=DELTA), type="flat", mode="adaptive")
    lines = []
    for candidates in CANDIDATES:
        found = rerank(
            queries.z_ND,
            queries.s_ND,
            items.z_ND,
            k=K,
            delta=DELTA,
            candidates=candidates,
            query_ids_Q=np.full(CERTIFIED_QUERIES, -1),
        )
        wrong = wrong_uncertified = 0
        for block, ids_BK, squared_BN in brute_blocks(exact, queries, K, candidates=candidates):
            ids = found.ids_QK[block]
            differ_B = ((ids_BK != ids) & ~_tied(squared_BN, ids_BK, ids)).any(axis=1)
            certified_B = found.certified_Q[block]
            wrong += int((differ_B & certified_B).sum())
            wrong_uncertified += int((differ_B & ~certified_B).sum())
        lines.append(
            {
                "width": CERTIFIED_WIDTH,
                "delta": DELTA,
                "items": EXACT_ITEMS,
                "queries": CERTIFIED_QUERIES,
                "candidates": candidates,
                "certified": int(found.certified_Q.sum()),
                "certified_of_another_order": wrong,
                "others_of_another_order": wrong_uncertified,
            }
        )
        print(lines[-1], flush=True)
    return lines


def write_part(name: str, lines: list[dict[str, Any]]) -> None:
    """Replace one part of the JSON file."""
    whole = json.loads(JSON.read_text()) if JSON.exists() else {}
    here = {**provenance(), "faiss": faiss.__version__, "numpy": np.__version__}
    defaults = dataclasses.asdict(SearchSettings())
    whole[name] = {"k": K, "seed": SEED, "defaults": defaults, **here, "lines": lines}
    write_atomic(JSON, json.dumps(dict(sorted(whole.items())), indent=1) + "\n")


def tables() -> dict[str, str]:
    """Marker in the page → Markdown."""
    whole = json.loads(JSON.read_text())
    return {
        "recall": _recall_table(whole["recall"]["lines"]),
        "bytes": _bytes_table(whole["bytes"]["lines"]),
        "exact": _exact_table(whole["exact"]["lines"]),
        "certificate": _certificate_table(whole["certificate"]["lines"]),
    }


def _recall_table(lines: list[dict[str, Any]]) -> str:
    defaults = SearchSettings()
    table = [
        f"| embeddings | items | mode | flat | hnsw, --ef-search {defaults.ef_search} | "
        f"ivf, --nprobe {defaults.nprobe} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for about in dict.fromkeys((line["data"], line["items"], line["mode"]) for line in lines):
        mine = [line for line in lines if (line["data"], line["items"], line["mode"]) == about]
        shown = [
            f"{line['recall']:.4f}" for line in mine if line["type"] == "flat" or line["default"]
        ]
        table.append(f"| {about[0]} | {about[1]:,} | {about[2]} | " + " | ".join(shown) + " |")
    return "\n".join(table)


def _bytes_table(lines: list[dict[str, Any]]) -> str:
    table = [
        "| type | --candidates | bytes an item (sample) | recall@10, sample | structure |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, candidates in dict.fromkeys((line["type"], line["candidates"]) for line in lines):
        mine = {
            line["mode"]: line
            for line in lines
            if (line["type"], line["candidates"]) == (kind, candidates)
        }
        table.append(
            f"| {kind} | {candidates or ''} | {mine['sample']['bytes_per_item']:.0f} | "
            f"{mine['sample']['recall']:.4f} | {mine['structure']['recall']:.4f} |"
        )
    return "\n".join(table)


def _exact_table(lines: list[dict[str, Any]]) -> str:
    modes = list(dict.fromkeys(line["mode"] for line in lines))
    table = [
        "| D | " + " | ".join(modes) + " |",
        "| --- |" + " --- |" * len(modes),
    ]
    for width in dict.fromkeys(line["width"] for line in lines):
        cells = [
            f"{line['untied_places_that_differ']} ({line['tied_places_that_differ']})"
            for line in lines
            if line["width"] == width
        ]
        table.append(f"| {width} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def _certificate_table(lines: list[dict[str, Any]]) -> str:
    table = [
        "| candidates | certified | of these in another order | not certified, in another order |",
        "| --- | --- | --- | --- |",
    ]
    for line in lines:
        table.append(
            f"| {line['candidates']} | {line['certified']:,} of {line['queries']:,} | "
            f"{line['certified_of_another_order']} | {line['others_of_another_order']:,} |"
        )
    return "\n".join(table)


def write_tables() -> None:
    """Between the page's markers."""
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}{table}\n{end}{after}"
    write_atomic(PAGE, page)


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("recall", "bytes", "exact", "certificate", "table"))
    parser.add_argument("--run", type=Path, default=ROOT / "runs/demo")
    parsed = parser.parse_args()
    if parsed.part == "table":
        write_tables()
    elif parsed.part == "recall":
        write_part("recall", measure_recall(parsed.run))
    elif parsed.part == "bytes":
        write_part("bytes", measure_bytes(parsed.run))
    elif parsed.part == "exact":
        write_part("exact", measure_exact())
    else:
        write_part("certificate", measure_certificate())


if __name__ == "__main__":
    main()
