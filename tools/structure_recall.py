"""Does what the structure embedding gains at retrieval survive ordinary faiss indexes, which see it
as one more coordinate?

    python tools/structure_recall.py [--features FILE] > docs/results/structure-recall.txt

FILE: features of homeware, as `namr reproduce --track features` keeps them; made if they are not
there. Settings are chosen on validation classes, or on queries that are not reported, as the first
with recall@10 ≥ 0.98 of the exact order.

Shapes: Q queries, N items, D width, V width of the served vectors, K neighbours.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import torch
from clustered_gaussians import PROTOCOL, WIDTH, clustered_gaussians

from namr_dist.config import Config, StructureConfig
from namr_dist.parallel.host import HostGroup
from namr_dist.provenance import provenance
from namr_dist.recipes.homeware import homeware
from namr_dist.reproduce.features import STEPS, VIEWS
from namr_dist.reproduce.heads import Features, Training, embed_once, train_heads
from namr_dist.retrieval.arrays import Int64, unit_rows
from namr_dist.retrieval.metrics import relevant_counts, retrieval_scores
from namr_dist.retrieval.search import search_excluding_self
from namr_dist.retrieval.vectors import (
    Served,
    sample_vectors,
    structure_products,
    structure_vectors,
)
from namr_dist.structure.centres import Centres, default_centres
from namr_dist.train.structure_fit import DEFAULT_GAMMA, Embedded, fit_structure, rho_of

SEED = 0
BAR, LISTED = 0.98, 10
HNSW_LINKS, HNSW_BUILD = 32, 100
EF_SEARCH = (64, 128, 256, 512)
LISTS_PER_ROOT = 4
"""IVF lists over √N"""
PROBES = (8, 16, 32, 64, 128, 256)
PQ_BYTES, PQ_POINTS, CANDIDATES = 48, 64, 100
QUERIES = 1_000
"""of the large gallery that choose, and as many others that are reported"""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Items, and which of them query all the others."""

    name: str
    z_ND: np.ndarray
    """float64, in the geometry that is searched"""
    label_N: np.ndarray
    bonus_N: np.ndarray
    """γ ρ"""
    limit: float
    """γ ρ_max of the saved model"""
    query_Q: Int64

    @property
    def neighbours(self) -> int:
        """K: as many as MAP@R needs."""
        return max(LISTED, int(relevant_counts(self.label_N, self.label_N).max()) - 1)

    @property
    def z_QD(self) -> np.ndarray:
        """Embeddings of the queries."""
        return self.z_ND[self.query_Q]

    def of(self, queries: slice) -> Gallery:
        """The same items, and some of the queries."""
        return replace(self, query_Q=self.query_Q[queries])

    def exact(self, served: Served) -> Int64:
        """(Q, K) nearest other items by an exact search."""
        return search_excluding_self(
            served.queries_QV,
            served.items_NV,
            self.neighbours,
            query_ids_Q=self.query_Q,
            metric=served.metric,
        )[1]

    def others(self, found_QC: Int64, count: int | None = None) -> Int64:
        """(Q, count) the first, without the query itself; K unless said otherwise."""
        order_QC = np.argsort(found_QC == self.query_Q[:, None], axis=1, kind="stable")
        return np.take_along_axis(found_QC, order_QC, axis=1)[:, : count or self.neighbours]

    def scores(self, ids_QK: Int64) -> tuple[float, float]:
        """R@1 and MAP@R, in percent."""
        percent = retrieval_scores(
            ids_QK, self.label_N[self.query_Q], self.label_N, ks=(1,), query_ids_Q=self.query_Q
        ).percent
        return percent["R@1"], percent["MAP@R"]


Found = dict[tuple[str, str], Int64]
"""(index, setting) → (Q, K) items"""


def indexes(gallery: Gallery, served: Served) -> Found:
    """What every index finds."""
    metric = faiss.METRIC_L2 if served.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    items_NV, found = served.items_NV, Found()
    N, V = items_NV.shape
    lists = round(LISTS_PER_ROOT * N**0.5)

    def search(index: faiss.Index) -> Int64:
        return gallery.others(index.search(served.queries_QV, gallery.neighbours + 1)[1])

    flat = faiss.IndexFlat(V, metric)
    flat.add(items_NV)
    found["flat", ""] = search(flat)

    graph = faiss.IndexHNSWFlat(V, HNSW_LINKS, metric)
    graph.hnsw.efConstruction = HNSW_BUILD
    graph.add(items_NV)
    for graph.hnsw.efSearch in EF_SEARCH:
        found["HNSW", f"efSearch {graph.hnsw.efSearch}"] = search(graph)

    inverted = faiss.IndexIVFFlat(faiss.IndexFlat(V, metric), V, lists, metric)
    inverted.cp.max_points_per_centroid = inverted.cp.min_points_per_centroid
    inverted.train(items_NV)
    inverted.add(items_NV)
    for inverted.nprobe in [probes for probes in PROBES if probes < lists]:
        found["IVF", f"nprobe {inverted.nprobe}"] = search(inverted)

    bytes_each = faiss.IndexScalarQuantizer(V, faiss.ScalarQuantizer.QT_8bit, metric)
    bytes_each.train(items_NV)
    bytes_each.add(items_NV)
    found["SQ8", ""] = search(bytes_each)

    if served.metric == "l2":
        found |= product_quantized(gallery, served, inverted.quantizer.reconstruct_n(0, lists))
    return found


def product_quantized(gallery: Gallery, served: Served, list_LV: np.ndarray) -> Found:
    """IVF-PQ over all coordinates; and over z alone, with γ ρ subtracted from the distances of
    CANDIDATES, by codes or exact. list_LV: the centres of the inverted lists."""
    count = min(CANDIDATES, len(gallery.z_ND) - 1)
    whole_QK = gallery.others(
        codes(served.queries_QV, served.items_NV, list_LV, gallery.neighbours + 1)[1]
    )
    plain = sample_vectors(gallery.z_QD, gallery.z_ND)
    by_code_QC, found_QC = codes(plain.queries_QV, plain.items_NV, list_LV[:, :-1], count + 1)
    difference = [
        gallery.z_ND[ids_C] - z_D for ids_C, z_D in zip(found_QC, gallery.z_QD, strict=True)
    ]
    exact_QC = np.array([np.square(one_CD).sum(axis=1) for one_CD in difference])

    def ranked(squared_QC: np.ndarray) -> Int64:
        key_QC = np.where(found_QC >= 0, squared_QC - gallery.bonus_N[found_QC], np.inf)
        order_QC = np.argsort(key_QC, axis=1, kind="stable")
        return gallery.others(np.take_along_axis(found_QC, order_QC, axis=1))

    return {
        ("IVF-PQ", f"{PQ_BYTES} bytes"): whole_QK,
        ("IVF-PQ of z, exact ρ", f"first {count}"): ranked(by_code_QC),
        ("IVF-PQ of z, exact z and ρ", f"first {count}"): ranked(exact_QC),
    }


def codes(
    queries_QV: np.ndarray, items_NV: np.ndarray, list_LV: np.ndarray, count: int
) -> tuple[np.ndarray, Int64]:
    """Squared distances by product quantization, and items (Q, count)."""
    # Zeros behind, which change no distance, make the width a multiple of PQ_BYTES.
    pad = ((0, 0), (0, -items_NV.shape[1] % PQ_BYTES))
    queries_QV, items_NV, list_LV = (np.pad(one, pad) for one in (queries_QV, items_NV, list_LV))
    L, V = list_LV.shape
    coarse = faiss.IndexFlatL2(V)
    coarse.add(list_LV)
    index = faiss.IndexIVFPQ(coarse, V, L, PQ_BYTES, 8)
    index.pq.cp.max_points_per_centroid = PQ_POINTS
    index.train(items_NV)
    index.add(items_NV)
    index.nprobe = min(L, max(PROBES))
    squared_QC, ids_QC = index.search(queries_QV, count)
    return squared_QC, ids_QC


def float64_order(gallery: Gallery) -> tuple[Int64, np.ndarray]:
    """(Q, K) nearest other items by ‖z_q − z_j‖² − γ ρ_j in float64, and these values."""
    norm_N = np.square(gallery.z_ND).sum(axis=1)
    ids, values = [], []
    for query_B in np.array_split(gallery.query_Q, max(1, len(gallery.query_Q) // 100)):
        product_BN = gallery.z_ND[query_B] @ gallery.z_ND.T
        value_BN = norm_N[query_B][:, None] + norm_N - 2 * product_BN - gallery.bonus_N
        value_BN[np.arange(len(query_B)), query_B] = np.inf
        ids.append(np.argsort(value_BN, axis=1, kind="stable")[:, : gallery.neighbours])
        values.append(np.take_along_axis(value_BN, ids[-1], axis=1))
    return np.concatenate(ids), np.concatenate(values)


def recall(found_QK: Int64, expected_QK: Int64) -> float:
    """Share of the first LISTED items that are among the first LISTED found."""
    pairs_QKK = found_QK[:, :LISTED, None] == expected_QK[:, None, :LISTED]
    return float(pairs_QKK.any(axis=1).mean())


def report(choosing: Gallery, reported: Gallery, serve: Callable[[Gallery], Served]) -> None:
    """Print the table of a pair of galleries: settings are chosen on the first, figures are of the
    second."""
    served = serve(reported)
    exact_QK = reported.exact(served)
    if choosing.z_ND is reported.z_ND:
        both = replace(reported, query_Q=np.concatenate([choosing.query_Q, reported.query_Q]))
        found = indexes(both, serve(both))
        first = {which: found_QK[: len(choosing.query_Q)] for which, found_QK in found.items()}
        found = {which: found_QK[len(choosing.query_Q) :] for which, found_QK in found.items()}
    else:
        first, found = indexes(choosing, serve(choosing)), indexes(reported, served)
    wanted_QK = choosing.exact(serve(choosing))
    recalls = {which: recall(found_QK, wanted_QK) for which, found_QK in first.items()}
    chosen: dict[str, str] = {}
    for (index, setting), reached in recalls.items():
        if reached >= BAR:
            chosen.setdefault(index, setting)
    plain = reported.scores(reported.exact(sample_vectors(reported.z_QD, reported.z_ND)))
    full = reported.scores(exact_QK)
    print(
        f"\n{reported.name}, {served.metric}, {served.items_NV.shape[1]} wide; {len(reported.z_ND):,} items, "
        f"{len(reported.query_Q):,} queries"
    )
    print(
        f"  exact: s = 1 R@1 {plain[0]:.2f}, MAP@R {plain[1]:.2f}; structure R@1 {full[0]:.2f}, "
        f"MAP@R {full[1]:.2f}"
    )
    print(f"  {'index':<42}{'recall chosen by':>17}{'recall':>9}{'R@1':>8}{'MAP@R':>8}  gain kept")
    for (index, setting), found_QK in found.items():
        own = reported.scores(found_QK)
        kept = f"{100 * (own[1] - plain[1]) / (full[1] - plain[1]):.1f}"
        mark = "*" if chosen.get(index) == setting else " "
        known = f"{recalls[index, setting]:.4f}" if (index, setting) in recalls else "–"
        print(
            f"{mark} {f'{index}  {setting}':<42}{known:>17}{recall(found_QK, exact_QK):>9.4f}"
            f"{own[0]:>8.2f}{own[1]:>8.2f}{kept:>9} %"
        )
    print(f"  flat: {compared_with_float64(reported, found['flat', ''])}", flush=True)


def compared_with_float64(gallery: Gallery, found_QK: Int64) -> str:
    """How far lists are in the float64 order, in words; AssertionError where they depart from it by
    more than the rounding of fp32."""
    order_QK, value_QK = float64_order(gallery)
    z_QKD = gallery.z_ND[found_QK] - gallery.z_QD[:, None]
    own_QK = np.square(z_QKD).sum(axis=2) - gallery.bonus_N[found_QK]
    apart = np.abs(own_QK - value_QK).max() / (np.abs(value_QK).mean() + gallery.limit)
    assert apart < 1e-5, f"a flat index departs from the float64 order by {apart:.2g}"
    same = int((found_QK == order_QK).sum())
    return (
        f"{same:,} of {found_QK.size:,} positions hold the item of the float64 order; distances at a position "
        f"differ by {apart:.0e} of their size at most"
    )


def homeware_galleries(features: Features, config: Config) -> tuple[Gallery, Gallery]:
    """Validation and test classes by heads that are trained here."""
    trained = train_heads(features, config, Training())
    unit = config.distance == "cosine"
    print(f"\n{config.loss.metric}: {trained.fitted.gain}", flush=True)

    def gallery(split: str, label_N: np.ndarray) -> Gallery:
        z_ND = trained.z[split].astype(np.float64)
        return Gallery(
            name=f"homeware {split}, {config.loss.metric}",
            z_ND=unit_rows(z_ND) if unit else z_ND,
            label_N=label_N,
            bonus_N=trained.centres.bonus(trained.rho[split]),
            limit=float(trained.centres.gamma) * float(trained.centres.rho_max),
            query_Q=np.arange(len(z_ND)),
        )

    return (
        gallery("validation", features.validation[1].label_N),
        gallery("test", features.test[1].label_N),
    )


def large_galleries() -> tuple[Gallery, Gallery]:
    """One gallery of random rows, with two sets of queries; nothing of it is chosen, γ included."""
    train, test = clustered_gaussians(seed=SEED)
    centres = Centres(
        centres=default_centres(len(train.z_ND)),
        width=WIDTH,
        nearest=StructureConfig().nearest,
        unit=False,
    )
    fitted = fit_structure(
        centres,
        Embedded(z_ND=train.z_ND, label_N=train.label_N),
        None,
        gamma=DEFAULT_GAMMA,
        seed=SEED,
        host=HostGroup(),
    )
    print(f"\nrandom rows: {fitted.gain}", flush=True)
    gallery = Gallery(
        name="random rows",
        z_ND=test.z_ND.astype(np.float64),
        label_N=test.label_N,
        bonus_N=centres.bonus(rho_of(centres, test.z_ND)),
        limit=float(centres.gamma) * float(centres.rho_max),
        query_Q=np.random.default_rng(SEED).permutation(len(test.z_ND))[: 2 * QUERIES],
    )
    return gallery.of(slice(QUERIES)), gallery.of(slice(QUERIES, None))


def _squared(gallery: Gallery) -> Served:
    return structure_vectors(gallery.z_QD, gallery.z_ND, gallery.bonus_N, limit=gallery.limit)


def _products(gallery: Gallery) -> Served:
    return structure_products(gallery.z_QD, gallery.z_ND, gallery.bonus_N)


def cases(features: Features) -> Iterator[tuple[Gallery, Gallery, Callable[[Gallery], Served]]]:
    """All tables."""
    for metric in ("triplet", "multi_similarity"):
        base = homeware()
        config = replace(
            base,
            loss=replace(
                base.loss, metric=metric, ranking=replace(base.loss.ranking, rise_passes=0.0)
            ),
            optim=replace(base.optim, steps=STEPS),
            train=replace(base.train, seed=SEED),
        )
        pair = homeware_galleries(features, config)
        yield *pair, _squared
        if config.distance == "cosine":
            yield *pair, _products
    yield *large_galleries(), _squared


def main() -> None:
    """Print the header and every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, default=Path("runs/features.safetensors"))
    features_file = parser.parse_args().features
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    here = provenance()
    print(
        f"{here['machine']}; {here['versions']}, numpy {np.__version__}, faiss {faiss.__version__}"
    )
    print(
        f"commit {here['commit']}; one thread; load average {os.getloadavg()[0]:.1f}; seed {SEED}; heads on frozen "
        f"features: homeware's recipe, {STEPS:,} steps"
    )
    print(f"random rows: {PROTOCOL}")
    print(
        f"HNSW: M = {HNSW_LINKS}, efConstruction = {HNSW_BUILD}. IVF: {LISTS_PER_ROOT} √N lists. IVF-PQ: nprobe "
        f"{max(PROBES)} or all lists, {PQ_BYTES} bytes."
    )
    print(
        f"recall: of the exact structure search's first {LISTED}, found among the first {LISTED}. *: the first "
        f"setting of an index that\nreaches {BAR} on what chooses: homeware's validation classes; of the random "
        f"rows, {QUERIES:,} other queries. gain kept: of\nMAP@R, from s = 1 to structure.",
        flush=True,
    )
    features = embed_once(homeware(), features_file, views=VIEWS)
    for choosing, reported, serve in cases(features):
        report(choosing, reported, serve)


if __name__ == "__main__":
    main()
