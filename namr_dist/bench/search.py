"""`namr bench search`: seconds of exact search by every back end that works here, beside searches
that are not exact.

Shapes: Q queries, N items, D width, K neighbours.

Queries are the first Q items, each left out of its own list. All ways of a case run in turn in one
process. A way's time counts only where its list is that of the others, index for index.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from namr_dist.csv_file import write_csv
from namr_dist.errors import InputError
from namr_dist.kernels.bench.machine import describe
from namr_dist.kernels.bench.measure import spread
from namr_dist.retrieval.arrays import Float32, Int64
from namr_dist.retrieval.metrics import retrieval_scores
from namr_dist.retrieval.search import BackendName, search_backend, search_excluding_self
from namr_dist.terminal import Console

IMAGES_A_CLASS = 5
_CLASSES_WITH_DUPLICATES = 10  # one in ten
_NOISE = 0.7  # of an image around its class's mean, whose entries have variance 1
_CUT_OFFS = (1, 10, 100, 1000)
_BLOCK_NUMBERS = 2**26  # of the bare product

Way = Callable[[], Int64]
"""a search as its user gets it: (Q, K) indices in host memory"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size."""

    queries: int
    items: int
    width: int
    k: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way in one case; seconds are medians over the repeats with the 20th and 80th
    percentile."""

    provider: str
    queries: int
    items: int
    width: int
    k: int
    repeats: int
    median_s: float
    p20_s: float
    p80_s: float
    same_percent: float
    """Of all positions in the lists, those that hold the item of the first back end's list."""
    agrees: str
    """yes | no | witness (not exact)"""
    gpu_mib: float | None
    """Most memory that torch held on the GPU; None where the work is not torch's or not on a
    GPU."""
    machine: dict[str, str]

    def to_row(self) -> dict[str, Any]:
        """One flat line of a table."""
        row = dataclasses.asdict(self)
        return {**row.pop("machine"), **row}


def clustered_rows(items: int, width: int, *, seed: int) -> tuple[Float32, Int64]:
    """(N, D) fp32 rows of length 1 around random class means, five a class, in random order, and
    their labels (N,).

    In every tenth class the first two rows are one vector, so that there are ties.
    """
    rng = np.random.default_rng(seed)
    labels_N = np.arange(items) // IMAGES_A_CLASS
    means_CD = rng.standard_normal((labels_N[-1] + 1, width), dtype=np.float32)
    rows_ND = means_CD[labels_N] + np.float32(_NOISE) * rng.standard_normal(
        (items, width), dtype=np.float32
    )
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    step = IMAGES_A_CLASS * _CLASSES_WITH_DUPLICATES
    copies = rows_ND[1::step]
    copies[:] = rows_ND[::step][: len(copies)]
    order_N = rng.permutation(items)
    return rows_ND[order_N], labels_N[order_N]


def measure(case: Case, backends: Sequence[BackendName], *, repeats: int) -> list[Measured]:
    """Every back end, the search with its metrics, and the witnesses, `repeats` times in turn after
    one call each that is not counted. Raises InputError for sizes that make no such search."""
    if not (IMAGES_A_CLASS <= case.k + 1 <= case.items and 1 <= case.queries <= case.items):
        raise InputError(
            f"--queries {case.queries}, --items {case.items}, -k {case.k} is no such search; give at most "
            f"as many queries as items, and -k from {IMAGES_A_CLASS - 1} to {case.items - 1}"
        )
    items_ND, labels_N = clustered_rows(case.items, case.width, seed=0)
    exact: dict[str, Way] = {name: _exact(items_ND, case, name) for name in backends}
    own = search_backend().name
    exact[f"{own}, with metrics"] = _with_metrics(items_ND, labels_N, case, own)
    witnesses = _witnesses(items_ND, case)
    return timed(case, exact, witnesses, repeats=repeats)


def timed(
    case: Case, exact: dict[str, Way], witnesses: dict[str, Way], *, repeats: int
) -> list[Measured]:
    """Run all ways in turn, each repeat from another one on, and compare with the first exact
    one."""
    ways = {**exact, **witnesses}
    expected_QK = next(iter(exact.values()))()
    same = {name: 100 * float((way() == expected_QK).mean()) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0.0)
    names = list(ways)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            seconds, peak = _time(ways[name])
            samples[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
    return [
        _measured(case, name, samples[name], same[name], peaks[name], witness=name in witnesses)
        for name in names
    ]


def _time(way: Way) -> tuple[float, float]:
    """Seconds until the lists are in host memory, and the MiB that torch held on a GPU at most."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    way()
    seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0


def _measured(
    case: Case,
    name: str,
    samples_s: list[float],
    same_percent: float,
    peak_mib: float,
    *,
    witness: bool,
) -> Measured:
    seconds = spread(samples_s)
    device = torch.device("cuda" if torch.cuda.is_available() and not _cpu_only(name) else "cpu")
    return Measured(
        provider=name,
        **dataclasses.asdict(case),
        repeats=len(samples_s),
        median_s=seconds.median,
        p20_s=seconds.p20,
        p80_s=seconds.p80,
        same_percent=same_percent,
        agrees="witness" if witness else "yes" if same_percent == 100 else "no",
        gpu_mib=peak_mib if device.type == "cuda" else None,
        machine=_machine(device),
    )


def _cpu_only(name: str) -> bool:
    return name.startswith(("torch-cpu", "faiss-cpu", "IndexFlat"))


def _machine(device: torch.device) -> dict[str, str]:
    faiss = (
        importlib.import_module("faiss").__version__
        if importlib.util.find_spec("faiss")
        else "none"
    )
    return {
        **describe(device),
        "faiss": faiss,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _exact(items_ND: Float32, case: Case, backend: BackendName) -> Way:
    own_Q = np.arange(case.queries)
    return lambda: search_excluding_self(
        items_ND[: case.queries], items_ND, case.k, query_ids_Q=own_Q, backend=backend
    )[1]


def _with_metrics(items_ND: Float32, labels_N: Int64, case: Case, backend: BackendName) -> Way:
    """The search and, from its lists, R@k, MAP@R and R-precision."""
    search = _exact(items_ND, case, backend)

    def way() -> Int64:
        ids_QK = search()
        retrieval_scores(
            ids_QK,
            labels_N[: case.queries],
            labels_N,
            query_ids_Q=np.arange(case.queries),
            ks=[k for k in _CUT_OFFS if k <= case.k],
        )
        return ids_QK

    return way


def _witnesses(items_ND: Float32, case: Case) -> dict[str, Way]:
    """Searches that promise no order among near ties: what exactness costs is read from them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways: dict[str, Way] = {"matmul + topk": lambda: _product_and_top(items_ND, case, device)}
    if importlib.util.find_spec("faiss"):
        ways["IndexFlatL2"] = lambda: _index_flat(items_ND, case)
    return ways


def _product_and_top(items_ND: Float32, case: Case, device: str) -> Int64:
    """fp32 inner products, which order rows of length 1 as distances do, but for rounding."""
    items = torch.from_numpy(items_ND).to(device)
    ids_QK = torch.empty((case.queries, case.k + 1), dtype=torch.int64)
    step = max(1, _BLOCK_NUMBERS // case.items)
    for start in range(0, case.queries, step):
        block = slice(start, min(start + step, case.queries))
        ids_QK[block] = (items[block] @ items.T).topk(case.k + 1, dim=1).indices.cpu()
    return _without_first(ids_QK.numpy())


def _index_flat(items_ND: Float32, case: Case) -> Int64:
    import faiss

    index: Any = faiss.IndexFlatL2(case.width)
    index.add(items_ND)
    return _without_first(index.search(items_ND[: case.queries], case.k + 1)[1])


def _without_first(ids_QK: Int64) -> Int64:
    """The query itself comes first, unless it has a duplicate."""
    return ids_QK[:, 1:]


def show(measured: Sequence[Measured]) -> None:
    """Print the figures."""
    table = Table(title="Leave-one-out search, seconds", title_justify="left")
    for heading in (
        "provider",
        "queries",
        "items",
        "width",
        "k",
        "median (p20–p80)",
        "same %",
        "agrees",
        "GPU MiB",
    ):
        table.add_column(heading, justify="left" if heading in ("provider", "agrees") else "right")
    for row in measured:
        table.add_row(
            row.provider,
            str(row.queries),
            str(row.items),
            str(row.width),
            str(row.k),
            f"{row.median_s:.3f} ({row.p20_s:.3f}–{row.p80_s:.3f})",
            f"{row.same_percent:.4f}",
            row.agrees,
            "–" if row.gpu_mib is None else f"{row.gpu_mib:.0f}",
        )
    Console().print(table)


def to_csv(measured: Sequence[Measured], path: Path) -> None:
    """Write the figures with machine, versions and commit, a line a way and case."""
    write_csv(path, [one.to_row() for one in measured])
