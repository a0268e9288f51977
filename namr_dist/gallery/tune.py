"""Which type of index, and how hard it should look, for embeddings of one's own.

Shapes: Q queries, N items, K neighbours.

Some items, drawn at random, are held out: they query indexes of all the others, so no query meets
itself. The reference is the exact search of the mode. Times are of the whole search
(`Gallery.nearest`), the exact distances by which its results are ordered included; embedding a
picture is not in them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from threadpoolctl import threadpool_limits

from namr_dist.errors import InputError
from namr_dist.gallery.engine import PQ_LEAST_ITEMS, TYPES, SearchSettings
from namr_dist.gallery.gallery import Gallery
from namr_dist.gallery.page import template
from namr_dist.provenance import provenance
from namr_dist.results.charts import Line, line_chart
from namr_dist.retrieval.arrays import Float32, Int64

NEIGHBOURS = 10
"""K, of recall@K."""
ROUNDS = 5
_EF_SEARCH = (16, 32, 64, 128, 256, 512)
_NPROBE = (4, 8, 16, 32, 64, 128, 256)
_PQ_CANDIDATES = (100, 400)
_BINARY_CANDIDATES = (100, 400, 1600)
_LEAST_QUERIES, _SHARE = 10, 5
_CLEARLY = 1.25
"""Times the speed of flat from which an index that may miss something is worth it."""
_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    queries: int = 500
    """at least 10; no more than a fifth of the items are taken"""
    batch_size: int = 1
    """queries that are searched for in one call"""
    threads: int = 1
    recall: float = 0.99
    """that an advised setting must have"""

    def __post_init__(self) -> None:
        for name, least in (("queries", _LEAST_QUERIES), ("batch_size", 1), ("threads", 1)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; take at least {least}")
        if not 0 < self.recall <= 1:
            raise InputError(f"--recall is {self.recall:g}; take a share above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One setting of one type."""

    type: str
    settings: dict[str, int]
    """of SearchSettings, those that the type heeds"""
    recall: float
    """share of the exact search's first K that are among its first K"""
    queries_per_s: float
    """median over the rounds"""
    speed: float
    """queries_per_s over that of flat"""
    bytes_per_item: float
    """of the index as faiss writes it; embeddings.npy comes on top"""
    build_s: float
    best: bool = False
    """no other is both faster and of at least the same recall"""

    @property
    def options(self) -> str:
        """As the command line takes them."""
        return " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in self.settings.items()
        )


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of it."""

    name: str
    mode: str
    items: int
    """in each index"""
    queries: int
    plan: Plan
    measured: tuple[Measured, ...]
    left_out: tuple[str, ...]
    """a line for each type that these items do not serve"""
    made: dict[str, str]
    """where: provenance.provenance"""

    @property
    def about(self) -> str:
        """Protocol, in a sentence."""
        return (
            f"{self.queries:,} held-out items query indexes of the other {self.items:,}, mode {self.mode}, "
            f"{self.plan.batch_size} at a time, on {_counted(self.plan.threads, 'thread')}; medians of "
            f"{ROUNDS} rounds, all settings in turn"
        )

    @property
    def chosen(self) -> Measured:
        """The fastest with the recall asked for; flat unless another is clearly faster."""
        flat = next(one for one in self.measured if one.type == "flat")
        enough = [one for one in self.measured if one.recall >= self.plan.recall]
        fastest = max(enough, key=lambda one: one.queries_per_s)
        return fastest if fastest.speed >= _CLEARLY else flat

    @property
    def advice(self) -> str:
        """One line."""
        one = self.chosen
        if one.type == "flat":
            return f"flat: exact, and nothing with a recall of {_percent(self.plan.recall)} is clearly faster"
        named = ", ".join(filter(None, (one.type, one.options)))
        return f"{named}: {_percent(one.recall)} at {one.speed:.2g}× the speed of flat"

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            **dataclasses.asdict(self),
            "k": NEIGHBOURS,
            "rounds": ROUNDS,
            "advice": self.advice,
        }

    def rows(self) -> list[list[str]]:
        """Of a table, under HEADINGS."""
        return [
            [
                one.type,
                ", ".join(f"{name} {value}" for name, value in one.settings.items()),
                _percent(one.recall),
                f"{one.queries_per_s:,.0f}",
                f"{one.speed:.2f}",
                f"{one.bytes_per_item:,.0f}",
                f"{one.build_s:.1f}",
                "✓" if one.best else "",
            ]
            for one in self.measured
        ]

    def page(self) -> str:
        """One HTML file that needs nothing else."""
        used = {one.type for one in self.measured}
        return template("tune.html").render(
            name=self.name,
            about=self.about,
            advice=self.advice,
            chart=self._chart(),
            types=[(kind, TYPES[kind]) for kind in TYPES if kind in used],
            headings=HEADINGS,
            rows=self.rows(),
            left_out=self.left_out,
            made=self.made,
        )

    def _chart(self) -> Markup | None:
        def line(name: str, css: str, some: Sequence[Measured], *, shown: bool) -> Line:
            return Line(
                name=name,
                xs=[100 * one.recall for one in some],
                ys=[one.queries_per_s for one in some],
                css=css,
                dots=css != "front",
                label=shown,
            )

        best = sorted((one for one in self.measured if one.best), key=lambda one: one.recall)
        lines = [line("best", "front", best, shown=False)]
        # A line joins the settings that differ in one number.
        series: dict[tuple[str, int | None], list[Measured]] = {}
        for one in self.measured:
            fixed = one.settings.get("candidates") if len(one.settings) > 1 else None
            series.setdefault((one.type, fixed), []).append(one)
        named = set()
        for (kind, _), some in series.items():
            css = f"t{list(TYPES).index(kind)}"
            lines.append(line(kind, css, some, shown=kind not in named))
            named.add(kind)
        return line_chart(
            lines,
            title="Queries a second by recall",
            x_label=f"recall@{NEIGHBOURS} in %",
            allow_log=True,
        )


HEADINGS = (
    "type",
    "setting",
    f"recall@{NEIGHBOURS}",
    "queries/s",
    "× flat",
    "bytes",
    "build s",
    "",
)


def tune(gallery: Gallery, plan: Plan) -> Tuned:
    """Sweep all types over the items of a gallery, in its mode. Memory: an index of each type.

    Raises InputError for too few items.
    """
    count = min(plan.queries, len(gallery) // _SHARE)
    if count < _LEAST_QUERIES:
        raise InputError(
            f"{gallery.name} has {len(gallery):,} items, which flat searches exactly in no time; there is "
            f"something to tune from {_LEAST_QUERIES * _SHARE} on"
        )
    order_N = np.random.default_rng(_SEED).permutation(len(gallery))
    asked, others_M = np.sort(order_N[:count]), np.sort(order_N[count:])
    z_ND, kept_NE = gallery.embeddings()
    z_QD, kept_QE = z_ND[asked], kept_NE[asked]
    with threadpool_limits(limits=plan.threads):
        galleries, build_s, left_out = _built(gallery, others_M)
        ways = [
            (kind, settings)
            for kind in galleries
            for settings in _settings(kind, galleries[kind], gallery.settings)
        ]
        found = [
            galleries[kind].nearest(z_QD, kept_QE, NEIGHBOURS, settings=_whole(gallery, settings))[
                1
            ]
            for kind, settings in ways
        ]
        seconds = _seconds(galleries, ways, gallery, z_QD, kept_QE, plan.batch_size)
    exact_QK = found[0]
    flat_s = seconds[0]
    measured = [
        Measured(
            type=kind,
            settings=settings,
            recall=recall_of(ids_QK, exact_QK),
            queries_per_s=count / way_s,
            speed=flat_s / way_s,
            bytes_per_item=galleries[kind].engine.bytes_per_item(),
            build_s=build_s[kind],
        )
        for (kind, settings), ids_QK, way_s in zip(ways, found, seconds, strict=True)
    ]
    return Tuned(
        name=gallery.name,
        mode=gallery.mode,
        items=len(others_M),
        queries=count,
        plan=plan,
        measured=_with_best(measured),
        left_out=left_out,
        made=provenance(),
    )


def recall_of(ids_QK: Int64, exact_QK: Int64) -> float:
    """Mean share of the exact neighbours that are found, whatever their order. −1 is none."""
    same_QKK = (ids_QK[:, :, None] == exact_QK[:, None, :]) & (exact_QK[:, None, :] >= 0)
    return float(same_QKK.sum() / max(1, (exact_QK >= 0).sum()))


def _built(
    gallery: Gallery, others_M: Int64
) -> tuple[dict[str, Gallery], dict[str, float], tuple[str, ...]]:
    """An index of each type, flat first, the seconds that each took, and what is left out."""
    galleries, build_s, left_out = {}, {}, []
    for kind in TYPES:
        if kind == "ivfpq" and len(others_M) < PQ_LEAST_ITEMS:
            left_out.append(f"{kind} needs {PQ_LEAST_ITEMS} items, {len(others_M)} are left")
            continue
        began = time.perf_counter()
        galleries[kind] = gallery.rebuilt(others_M, kind)
        build_s[kind] = time.perf_counter() - began
    return galleries, build_s, tuple(left_out)


def _settings(kind: str, gallery: Gallery, own: SearchSettings) -> list[dict[str, int]]:
    """What is tried of a type, the least work first."""
    if kind == "hnsw":
        # The walk keeps at least as many as are to be found.
        reordered = own.candidates if gallery.form.weighs else 0
        return [{"ef_search": value} for value in _EF_SEARCH if value >= reordered // 2]
    if kind in ("ivf", "ivfpq"):
        cells = int(gallery.engine.index.nlist)
        probes = [value for value in _NPROBE if value < cells] + [min(cells, 2 * _NPROBE[-1])]
        if kind == "ivf":
            return [{"nprobe": value} for value in probes]
        return [
            {"nprobe": value, "candidates": candidates}
            for candidates in ((own.candidates,) if gallery.form.weighs else _PQ_CANDIDATES)
            for value in probes
        ]
    if kind == "binary" and not gallery.form.weighs:
        return [{"candidates": candidates} for candidates in _BINARY_CANDIDATES]
    return [{}]


def _whole(gallery: Gallery, settings: dict[str, int]) -> SearchSettings:
    return dataclasses.replace(gallery.settings, **settings)


def _seconds(
    galleries: dict[str, Gallery],
    ways: list[tuple[str, dict[str, int]]],
    gallery: Gallery,
    z_QD: Float32,
    kept_QE: Float32,
    batch_size: int,
) -> list[float]:
    """Median seconds of each way for all queries. Every round begins with another one."""
    samples: list[list[float]] = [[] for _ in ways]
    for round_ in range(ROUNDS):
        first = round_ * len(ways) // ROUNDS
        for number in [*range(first, len(ways)), *range(first)]:
            kind, settings = ways[number]
            whole = _whole(gallery, settings)
            began = time.perf_counter()
            for start in range(0, len(z_QD), batch_size):
                block = slice(start, start + batch_size)
                galleries[kind].nearest(z_QD[block], kept_QE[block], NEIGHBOURS, settings=whole)
            samples[number].append(time.perf_counter() - began)
    return [statistics.median(one) for one in samples]


def _with_best(measured: Sequence[Measured]) -> tuple[Measured, ...]:
    def beaten(one: Measured) -> bool:
        return any(
            other.queries_per_s > one.queries_per_s and other.recall >= one.recall
            for other in measured
        )

    return tuple(dataclasses.replace(one, best=not beaten(one)) for one in measured)


def _percent(share: float) -> str:
    """Never rounded up to all."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number != 1 else ''}"
