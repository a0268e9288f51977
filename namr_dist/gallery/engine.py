"""faiss indexes by type: made, filled and searched.

Shapes: Q queries, N items, V width of the vectors (retrieval/forms.py), C candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Int64
from namr_dist.retrieval.search import FAISS_GPU_LARGEST_K, search_backend

TYPES = {
    "flat": "exact",
    "hnsw": "a graph: fast, recall by --ef-search",
    "ivf": "cells: recall by --nprobe",
    "ivfpq": "cells of product-quantised vectors: fewest bytes",
    "sq8": "exact over vectors of 8 bits a number",
    "fp16": "exact over vectors of 16 bits a number",
    "binary": "a bit a number, then --candidates by exact distance",
}
"""Name of a type → what it is."""

_HNSW_LINKS = 32
_HNSW_BUILD = 200
"""efConstruction."""
_PQ_NUMBERS = 4
"""Of a vector, which one byte stands for."""
PQ_LEAST_ITEMS = 256
"""Fewer cannot be told apart by the 256 values of a byte."""
SAMPLE = 100_000
"""Vectors, at most, that a type learns from."""
_SEED = 1234
_ITEMS_A_CELL = 39
"""As few as faiss's k-means takes without a warning."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How hard an approximate index looks. Stored with it; a search may have its own."""

    ef_search: int = 128
    """hnsw: candidates that the walk keeps"""
    nprobe: int = 128
    """ivf, ivfpq: cells that are looked through"""
    candidates: int = 100
    """of ivfpq, binary and the rerank mode: what the index finds and is then ordered by exact
    distance"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
                raise InputError(
                    f"{field.name} is {value!r}; take a whole number from 1 to {1 << 20:,}"
                )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What an index of a type is made of."""

    type: str
    factory: str
    """faiss's own description, as its index_factory takes it"""
    width: int
    """of the vectors that it stores: V and, for ivfpq, zeros to a multiple of 4"""


def shape_of(kind: str, width: int, items: int) -> Shape:
    """An index of a type for so many items of so many numbers. Raises InputError for another type,
    and for too few items."""
    if kind not in TYPES:
        raise InputError(f"type {kind!r} is none; take one of {', '.join(TYPES)}")
    cells = max(1, min(round(4 * math.sqrt(items)), items // _ITEMS_A_CELL))
    padded = width
    if kind == "ivfpq":
        if items < PQ_LEAST_ITEMS:
            raise InputError(
                f"ivfpq needs {PQ_LEAST_ITEMS} items to be trained on, there are {items}; take flat"
            )
        padded = math.ceil(width / _PQ_NUMBERS) * _PQ_NUMBERS
    factory = {
        "flat": "Flat",
        "hnsw": f"HNSW{_HNSW_LINKS},Flat",
        "ivf": f"IVF{cells},Flat",
        "ivfpq": f"IVF{cells},PQ{padded // _PQ_NUMBERS}x8",
        "sq8": "SQ8",
        "fp16": "SQfp16",
        # A bit says whether a number is above its median over the items.
        "binary": "LSHt",
    }[kind]
    return Shape(type=kind, factory=factory, width=padded)


class Engine:
    """One faiss index, with its type."""

    def __init__(self, shape: Shape, index: Any) -> None:
        self.shape = shape
        self.index = index
        self._on_gpu: Any = None

    @classmethod
    def trained(cls, shape: Shape, some: Callable[[], Float32]) -> Engine:
        """Empty, with what its type learns, if anything, from vectors (N, V) like those that it
        will hold; SAMPLE of them are enough."""
        import faiss

        index: Any = faiss.index_factory(shape.width, shape.factory, faiss.METRIC_L2)
        if shape.type == "hnsw":
            index.hnsw.efConstruction = _HNSW_BUILD
        if shape.type == "ivfpq":
            index.do_polysemous_training = False  # minutes, for a kind of search that is not used
        engine = cls(shape, index)
        if not index.is_trained:
            for clustering in engine._clusterings():
                # As few items as cells are no mistake here, and all are used.
                clustering.min_points_per_centroid = 1
                clustering.max_points_per_centroid = SAMPLE
                clustering.seed = _SEED
            index.train(engine._padded(some()))
        return engine

    @classmethod
    def built(cls, shape: Shape, vectors_NV: Float32) -> Engine:
        """Trained on these vectors, or a sample of them, and filled with them."""
        engine = cls.trained(shape, lambda: vectors_NV[sample(len(vectors_NV))])
        engine.add(vectors_NV)
        return engine

    @classmethod
    def read(cls, path: Path, shape: Shape) -> Engine:
        """From a file that is known to be whole."""
        import faiss

        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise InputError(
                f"{path} cannot be read by faiss {faiss.__version__} ({_first_line(error)}); build the "
                "index again"
            ) from None
        if index.d != shape.width:
            raise InputError(
                f"{path} has vectors {index.d} wide, its index.json says {shape.width}; build it again"
            )
        return cls(shape, index)

    def write(self, path: Path) -> None:
        """As a file that plain faiss reads."""
        import faiss

        callback: Any = faiss
        with open(path, "wb") as file:  # faiss by a name says nothing where closing fails
            faiss.write_index(self.index, callback.PyCallbackIOWriter(file.write))

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def add(self, vectors_NV: Float32) -> None:
        """Behind those that are there."""
        self._on_gpu = None
        self.index.add(self._padded(vectors_NV))

    def refill(self, vectors_NV: Float32) -> None:
        """With these alone; what was learnt of the first ones stays."""
        self._on_gpu = None
        self.index.reset()
        self.index.add(self._padded(vectors_NV))

    def search(
        self, queries_QV: Float32, count: int, settings: SearchSettings
    ) -> tuple[Float32, Int64]:
        """(Q, C) squared distances and positions of about the nearest, −1 where there are none
        left."""
        index = self._placed(count)
        self._set(index, settings, count)
        squared_QC, ids_QC = index.search(self._padded(queries_QV), count)
        return squared_QC, ids_QC.astype(np.int64)

    def bytes_per_item(self) -> float:
        """Of the index as faiss writes it."""
        import faiss

        return float(len(faiss.serialize_index(self.index)) / max(1, len(self)))

    def _set(self, index: Any, settings: SearchSettings, count: int) -> None:
        if self.shape.type == "hnsw":
            index.hnsw.efSearch = max(settings.ef_search, count)
        elif self.shape.type in ("ivf", "ivfpq"):
            cells = min(settings.nprobe, self.index.nlist)
            if index is self.index:
                index.nprobe = cells
            else:
                import faiss

                faiss.GpuParameterSpace().set_index_parameter(index, "nprobe", cells)

    def _placed(self, count: int) -> Any:
        """The index on all GPUs, cut into shards, where faiss has any, and shards of the type; else
        as it is."""
        if (
            self.shape.type not in ("flat", "ivf")
            or count > FAISS_GPU_LARGEST_K
            or search_backend().name != "faiss-gpu"
        ):
            return self.index
        if self._on_gpu is None:
            import faiss

            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            self._on_gpu = faiss.index_cpu_to_all_gpus(self.index, options)
        return self._on_gpu

    def _padded(self, vectors_NV: Float32) -> Float32:
        missing = self.shape.width - vectors_NV.shape[1]
        return np.ascontiguousarray(np.pad(vectors_NV, ((0, 0), (0, missing))), dtype=np.float32)

    def _clusterings(self) -> Iterator[Any]:
        if self.shape.type in ("ivf", "ivfpq"):
            yield self.index.cp
        if self.shape.type == "ivfpq":
            yield self.index.pq.cp


def sample(items: int) -> Int64:
    """Positions of SAMPLE of the items, ascending, the same every time; of all where there are no
    more."""
    return np.sort(np.random.default_rng(_SEED).permutation(items)[:SAMPLE])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
