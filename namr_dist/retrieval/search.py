"""Exact nearest neighbours with ties broken by the lowest index, whatever library does the work.

Shapes: Q queries, N items, D width, K neighbours asked for, C candidates (K and a few more).

A library's order among equal or nearly equal items depends on its blocking, so it only proposes
candidates here. Their values are computed anew (differences in float64, rounded once to fp32) and
sorted by (value, index). A query is settled when no item outside its candidates can reach its K-th
value, given the rounding error of the library; the others are searched again in float64, which
costs time but never exactness. So all back ends return the same arrays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Bool, Float32, Float64, Int64, as_float32

Metric = Literal["l2", "ip"]
BackendName = Literal["faiss-gpu", "torch-gpu", "faiss-cpu", "torch-cpu"]

FAISS_GPU_LARGEST_K = 2048
_SPARE_CANDIDATES = 16
_BLOCK_NUMBERS = 2**24  # float64 numbers held at once in one temporary: 128 MiB
_UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp64": 2.0**-53}


@dataclass(frozen=True, kw_only=True)
class SearchBackend:
    """The library that proposes candidates, and why it was taken."""

    name: BackendName
    reason: str


def _faiss_gpu_problem(faiss: Any) -> str | None:
    """Why faiss cannot be trusted with this machine's GPU, or None."""
    if not hasattr(faiss, "StandardGpuResources"):
        return "the installed faiss has no GPU code"
    try:
        if faiss.get_num_gpus() < 1:
            return "faiss sees no GPU"
        # Large enough for tensor cores to be used if they are ever going to be.
        probe = np.random.default_rng(0).standard_normal((2048, 128)).astype(np.float32)
        approx_QC, ids_QC = _faiss_candidates(probe[:512], probe, 8, "ip", gpu=True)
    except Exception as error:  # the CUDA libraries fail in many ways; any of them means "no"
        return f"faiss failed on the GPU ({type(error).__name__}: {error})"
    wide = probe.astype(np.float64)
    exact_QC = np.einsum("qd,qcd->qc", wide[:512], wide[ids_QC])
    if np.abs(approx_QC - exact_QC).max() > _error_bound(probe[:512], probe, "ip", "fp32").max():
        return "faiss on this GPU computes with less than fp32 precision"
    return None


@lru_cache(maxsize=1)
def search_backend() -> SearchBackend:
    """The back end :func:`search` takes on this machine, with the reason; found once a process.

    The order is faiss on the GPU, blocked torch on the GPU, faiss on the CPU, blocked torch on the
    CPU. All four give equal results.
    """
    faiss: Any = None
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        missing = f"faiss cannot be imported ({error})"
    else:
        missing = _faiss_gpu_problem(faiss) or ""
        if not missing:
            return SearchBackend(name="faiss-gpu", reason=f"faiss {faiss.__version__} works on the GPU")
    if torch.cuda.is_available():
        return SearchBackend(name="torch-gpu", reason=f"{missing}; torch {torch.__version__} sees a GPU")
    if faiss is not None:
        return SearchBackend(name="faiss-cpu", reason=f"{missing}; torch sees no GPU either")
    return SearchBackend(name="torch-cpu", reason=f"{missing}; torch sees no GPU")


def _row_blocks(rows: int, numbers_per_row: int) -> Iterator[slice]:
    step = max(1, _BLOCK_NUMBERS // max(1, numbers_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _faiss_candidates(
    queries_QD: Float32, items_ND: Float32, count: int, metric: Metric, *, gpu: bool
) -> tuple[Float64, Int64]:
    import faiss

    width = items_ND.shape[1]
    index: Any = faiss.IndexFlatL2(width) if metric == "l2" else faiss.IndexFlatIP(width)
    if gpu:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(items_ND)
    values_QC, ids_QC = index.search(queries_QD, count)
    return values_QC.astype(np.float64), ids_QC.astype(np.int64)


def _all_values(queries_BD: torch.Tensor, items_ND: torch.Tensor, metric: Metric) -> torch.Tensor:
    """(B, N) float64 values of every pair by one matrix product."""
    products_BN = queries_BD @ items_ND.T
    if metric == "ip":
        return products_BN
    # By norms: the squares of all items would be a second matrix of their size.
    squares_B1 = torch.linalg.vector_norm(queries_BD, dim=1, keepdim=True).square_()
    squares_N = torch.linalg.vector_norm(items_ND, dim=1).square_()
    return (squares_B1 - 2 * products_BN + squares_N).clamp_min_(0)


def _torch_candidates(
    queries_QD: Float32, items_ND: Float32, count: int, metric: Metric, device: str
) -> tuple[Float64, Int64]:
    # float64, because a training run may have allowed TF32 for all fp32 products of the process.
    items = torch.from_numpy(items_ND).to(device).double()
    values_QC = np.empty((len(queries_QD), count))
    ids_QC = np.empty((len(queries_QD), count), dtype=np.int64)
    for block in _row_blocks(len(queries_QD), len(items_ND)):
        all_BN = _all_values(torch.from_numpy(queries_QD[block]).to(device).double(), items, metric)
        top = torch.topk(all_BN, count, dim=1, largest=metric == "ip")
        values_QC[block], ids_QC[block] = top.values.cpu().numpy(), top.indices.cpu().numpy()
    return values_QC, ids_QC


def _norms(rows_ND: Float32) -> Float64:
    norms_N: Float64 = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND, dtype=np.float64))
    return norms_N


def _error_bound(queries_QD: Float32, items_ND: Float32, metric: Metric, precision: str) -> Float64:
    """(Q,) bound on |value by matrix product − true value|: the standard one for inner products,
    (D + 8) u ‖q‖ max‖x‖, applied to each of the three terms of a squared distance."""
    roundoff = (items_ND.shape[1] + 8) * _UNIT_ROUNDOFF[precision]
    norm_Q = _norms(queries_QD)
    largest = float(_norms(items_ND).max())
    size_Q = norm_Q * largest if metric == "ip" else (norm_Q + largest) ** 2
    bound: Float64 = roundoff * size_Q
    return bound


def exact_values(
    queries_QD: Float32 | Float64, items_ND: Float32 | Float64, ids_QC: Int64, metric: Metric
) -> Float32:
    """(Q, C) fp32 values of chosen pairs: summed in float64 without cancellation, rounded once.

    Squared Euclidean distances for "l2", inner products for "ip". Memory: 128 MiB at a time.
    """
    queries, items, ids = (torch.from_numpy(a) for a in (queries_QD, items_ND, ids_QC))
    values_QC = torch.empty(ids_QC.shape, dtype=torch.float32)
    for block in _row_blocks(len(queries_QD), ids_QC.shape[1] * items_ND.shape[1]):
        chosen_BCD = items[ids[block]].double()
        if metric == "l2":
            pairs_BCD = chosen_BCD.sub_(queries[block, None, :]).square_()
        else:
            pairs_BCD = chosen_BCD.mul_(queries[block, None, :])
        values_QC[block] = pairs_BCD.sum(-1).float()
    return values_QC.numpy()


def _best_first(keys_QC: Float32, ids_QC: Int64) -> tuple[Float32, Int64]:
    order_QC = np.lexsort((ids_QC, keys_QC), axis=-1)
    return np.take_along_axis(keys_QC, order_QC, -1), np.take_along_axis(ids_QC, order_QC, -1)


def _search_again(
    queries_QD: Float32, items_ND: Float32, limits_Q: Float64, k: int, metric: Metric
) -> tuple[Float32, Int64]:
    """The first K of rows whose candidates left a doubt: every item whose float64 key does not
    exceed the row's limit, sorted by (key, index)."""
    sign = 1 if metric == "l2" else -1
    keys_QK = np.empty((len(queries_QD), k), dtype=np.float32)
    ids_QK = np.empty((len(queries_QD), k), dtype=np.int64)
    items = torch.from_numpy(items_ND).double()
    for block in _row_blocks(len(queries_QD), len(items_ND)):
        keys_BN = sign * _all_values(torch.from_numpy(queries_QD[block]).double(), items, metric).numpy()
        for row, keys_N in zip(range(block.start, block.stop), keys_BN, strict=True):
            near_1C = np.flatnonzero(keys_N <= limits_Q[row])[None]
            exact_1C = sign * exact_values(queries_QD[row : row + 1], items_ND, near_1C, metric)
            keys_1C, ids_1C = _best_first(exact_1C, near_1C)
            keys_QK[row], ids_QK[row] = keys_1C[0, :k], ids_1C[0, :k]
    return keys_QK, ids_QK


def _proposer(
    name: BackendName, count: int, metric: Metric
) -> tuple[Callable[[Float32, Float32], tuple[Float64, Int64]], str]:
    """The function that proposes candidates, and the precision it computes with."""
    if name == "faiss-gpu" and count > FAISS_GPU_LARGEST_K:
        name = "torch-gpu" if torch.cuda.is_available() else "faiss-cpu"
    if name in ("faiss-gpu", "faiss-cpu"):
        return lambda queries, items: _faiss_candidates(
            queries, items, count, metric, gpu=name == "faiss-gpu"
        ), "fp32"
    device = "cuda" if name == "torch-gpu" else "cpu"
    return lambda queries, items: _torch_candidates(queries, items, count, metric, device), "fp64"


def _rounded(queries_QD: Any, items_ND: Any, metric: Metric) -> tuple[Float32, Float32]:
    """Rounded to fp32 once, so that every back end ranks the very same vectors."""
    queries, items = as_float32(queries_QD, "queries"), as_float32(items_ND, "items")
    if queries.shape[1] != items.shape[1]:
        raise InputError(
            f"queries are {queries.shape[1]} wide, items {items.shape[1]}: embed both with the same model"
        )
    if metric not in ("l2", "ip"):
        raise InputError(f"metric = {metric!r}: take 'l2' or 'ip'")
    return queries, items


def search(
    queries_QD: Any, items_ND: Any, k: int, *, metric: Metric = "l2", backend: BackendName | None = None
) -> tuple[Float32, Int64]:
    """The K nearest items of each query, exactly; equal values are ordered by item index.

    queries_QD, items_ND: numpy or torch, any float type; rounded to fp32 first. metric "l2" ranks by
    squared Euclidean distance, smallest first; "ip" by inner product, largest first. backend: None
    for :func:`search_backend`.
    Returns values (Q, K) fp32 and item indices (Q, K) int64. Where K > N, the rest of a row is filled
    up with index −1 and value +inf ("ip": −inf).
    Raises InputError on bad shapes, non-finite entries and K < 1.
    Memory: the inputs in fp32, faiss's copy of the items, the results a few times over, and blocks of
    at most a few hundred MiB.
    """
    queries, items = _rounded(queries_QD, items_ND, metric)
    if k < 1:
        raise InputError(f"k = {k}: ask for at least one neighbour")
    found = min(k, len(items))
    count = min(found + _SPARE_CANDIDATES, len(items))
    propose, precision = _proposer(backend or search_backend().name, count, metric)
    approx_QC, ids_QC = propose(queries, items)

    sign = 1 if metric == "l2" else -1  # keys: smaller is nearer
    keys_QC, ids_QC = _best_first(sign * exact_values(queries, items, ids_QC, metric), ids_QC)
    keys_QK, ids_QK = keys_QC[:, :found].copy(), ids_QC[:, :found].copy()
    if count < len(items):
        open_Q, limits_Q = _doubtful(queries, items, keys_QK[:, -1], sign * approx_QC, metric, precision)
        if open_Q.any():
            again = _search_again(queries[open_Q], items, limits_Q[open_Q], found, metric)
            keys_QK[open_Q], ids_QK[open_Q] = again
    if found < k:
        padding = ((0, 0), (0, k - found))
        keys_QK = np.pad(keys_QK, padding, constant_values=np.inf)
        ids_QK = np.pad(ids_QK, padding, constant_values=-1)
    return sign * keys_QK, ids_QK


def _doubtful(
    queries_QD: Float32,
    items_ND: Float32,
    last_Q: Float32,
    approx_QC: Float64,
    metric: Metric,
    precision: str,
) -> tuple[Bool, Float64]:
    """Which queries may have missed an item, and the float64 key below which it would have to lie."""
    last = last_Q.astype(np.float64)
    error_Q = _error_bound(queries_QD, items_ND, metric, precision)
    rounding_Q = _rounding(last)
    doubtful_Q = ~(approx_QC.max(axis=1) - error_Q > last + rounding_Q)
    return doubtful_Q, last + rounding_Q + _error_bound(queries_QD, items_ND, metric, "fp64")


def _rounding(keys_Q: Float64) -> Float64:
    """How far apart two float64 keys may lie that are a tie once both are rounded to fp32."""
    rounding_Q: Float64 = 2.0**-22 * np.abs(keys_Q) + np.finfo(np.float32).tiny
    return rounding_Q


def search_excluding_self(
    queries_QD: Any,
    items_ND: Any,
    k: int,
    *,
    query_ids_Q: Int64 | None = None,
    metric: Metric = "l2",
    backend: BackendName | None = None,
) -> tuple[Float32, Int64]:
    """As :func:`search`, leaving out each query's own entry among the items.

    query_ids_Q: (Q,) the query's index among the items, −1 for a query that is not among them; None
    where the queries are the items, in the same order. The entry is left out by its index, so that an
    exact duplicate of the query is still found.
    Returns and raises as :func:`search`; a row is filled up with −1 where fewer than K items remain.
    """
    queries, items = as_float32(queries_QD, "queries"), as_float32(items_ND, "items")
    own_Q = checked_query_ids(query_ids_Q, len(queries), len(items))
    values_QK, ids_QK = search(queries, items, k + 1, metric=metric, backend=backend)
    # A stable sort moves the own entry to the end; where there is none, the last neighbour is dropped.
    own_QK = (ids_QK == own_Q[:, None]) & (own_Q >= 0)[:, None]
    order_QK = np.argsort(own_QK, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values_QK, order_QK, 1), np.take_along_axis(ids_QK, order_QK, 1)


def ranks_of(
    queries_QD: Any,
    items_ND: Any,
    ids_Q: Int64,
    *,
    query_ids_Q: Int64 | None = None,
    metric: Metric = "l2",
) -> Int64:
    """(Q,) int64: the place, from 1 on, of one item for each query in the order of :func:`search` over all items.

    ids_Q: (Q,) those items. query_ids_Q as in :func:`search_excluding_self`: own entries do not count,
    and ids_Q has none. The nearer items are counted, not listed, so a far place costs no more than a near
    one. Raises InputError as :func:`search`. Memory: the items in float64, and blocks of 128 MiB.
    """
    queries, items = _rounded(queries_QD, items_ND, metric)
    own_Q = checked_query_ids(query_ids_Q, len(queries), len(items))
    sign = 1 if metric == "l2" else -1
    keys_Q = sign * exact_values(queries, items, ids_Q[:, None], metric)[:, 0]
    slack_Q = _rounding(keys_Q.astype(np.float64)) + _error_bound(queries, items, metric, "fp64")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide_items = torch.from_numpy(items).to(device).double()
    ranks_Q = np.empty(len(queries), dtype=np.int64)
    for block in _row_blocks(len(queries), len(items)):
        wide_queries = torch.from_numpy(queries[block]).to(device).double()
        gap_BN = (sign * _all_values(wide_queries, wide_items, metric)).cpu().numpy() - keys_Q[block, None]
        with_own_B = np.flatnonzero(own_Q[block] >= 0)
        gap_BN[with_own_B, own_Q[block][with_own_B]] = np.inf
        ranks_Q[block] = 1 + (gap_BN < -slack_Q[block, None]).sum(axis=1)
        # What the products leave in doubt is computed anew; the item itself is always among it.
        rows_P, near_P = np.nonzero(np.abs(gap_BN, out=gap_BN) <= slack_Q[block, None])
        for part in _row_blocks(len(rows_P), items.shape[1]):
            rows, near = rows_P[part] + block.start, near_P[part]
            keys = sign * exact_values(queries[rows], items, near[:, None], metric)[:, 0]
            before = (keys < keys_Q[rows]) | ((keys == keys_Q[rows]) & (near < ids_Q[rows]))
            np.add.at(ranks_Q, rows[before], 1)
    return ranks_Q


def checked_query_ids(query_ids_Q: Int64 | None, queries: int, items: int) -> Int64:
    """(Q,) int64 indices of the queries among the items; None stands for 0..Q−1 and needs Q = N."""
    if query_ids_Q is None:
        if queries != items:
            raise InputError(f"{queries} queries, {items} items: pass query_ids where the two sets differ")
        return np.arange(queries)
    ids_Q = np.asarray(query_ids_Q)
    if ids_Q.shape != (queries,) or not np.issubdtype(ids_Q.dtype, np.integer):
        raise InputError(f"query_ids: {queries} integers are needed, got {ids_Q.dtype} {ids_Q.shape}")
    if ids_Q.min() < -1 or ids_Q.max() >= items:
        raise InputError(f"query_ids: {ids_Q.min()}..{ids_Q.max()} leaves the range −1..{items - 1}")
    return ids_Q.astype(np.int64)
