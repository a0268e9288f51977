"""Exact nearest neighbours with ties broken by the lowest index, whatever library does the work.

Shapes: Q queries, N items, D width, K neighbours asked for, B a block's queries, C candidates (K
and a few more).

A library's order among equal or nearly equal items depends on its blocking, so it only proposes
candidates here. They are sorted by their (key, index), keys as keys.py defines them. A query is
settled when no item outside its candidates can reach its K-th key, given the rounding error of the
library; the others are searched again, which costs time but never exactness. So all back ends
return the same arrays. The order is found where the products are: with a GPU, on it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Float32, Float64, Int64, as_float32
from namr_dist.retrieval.keys import Keys, Metric, Precision, pack, rounding, unpack

BackendName = Literal["faiss-gpu", "torch-gpu", "faiss-cpu", "torch-cpu"]

FAISS_GPU_LARGEST_K = 2048
_SPARE_CANDIDATES = 16
_GROUP = 32
"""columns whose least is taken together"""
_SMALLEST_KEY = 2.0**-100
"""Keys that matter are far smaller than the largest, and normal numbers of fp32 end at 2⁻¹²⁶."""
_FEW_DOUBTS = 256
"""pairs of a query that are summed rather than multiplied once more, in float64"""


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
        approx_QC, ids_QC = _faiss_index(probe, "ip", gpu=True).search(probe[:512], 8)
    except Exception as error:  # the CUDA libraries fail in many ways; any of them means "no"
        return f"faiss failed on the GPU ({type(error).__name__}: {error})"
    wide = probe.astype(np.float64)
    exact_QC = np.einsum("qd,qcd->qc", wide[:512], wide[ids_QC])
    allowed_Q = Keys(torch.from_numpy(probe), torch.from_numpy(probe), "ip").error(
        torch.arange(512), "fp32"
    )
    if np.abs(approx_QC - exact_QC).max() > allowed_Q.max():
        return "faiss on this GPU computes with less than fp32 precision"
    return None


def usable_backends() -> tuple[BackendName, ...]:
    """Every back end that works on this machine."""
    faiss: Any = importlib.import_module("faiss") if importlib.util.find_spec("faiss") else None
    usable: list[BackendName] = ["torch-cpu"]
    if torch.cuda.is_available():
        usable.append("torch-gpu")
    if faiss is not None:
        usable.append("faiss-cpu")
        if _faiss_gpu_problem(faiss) is None:
            usable.append("faiss-gpu")
    return tuple(usable)


@lru_cache(maxsize=1)
def search_backend() -> SearchBackend:
    """The back end :func:`search` takes on this machine, with the reason; found once a process.

    The order is faiss on the GPU, blocked torch on the GPU, blocked torch on the CPU: faiss on the
    CPU takes more time for the same results (docs/retrieval.md), and is there to compare with.
    """
    faiss: Any = None
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        missing = f"faiss cannot be imported ({error})"
    else:
        missing = _faiss_gpu_problem(faiss) or ""
        if not missing:
            return SearchBackend(
                name="faiss-gpu", reason=f"faiss {faiss.__version__} works on the GPU"
            )
    if torch.cuda.is_available():
        return SearchBackend(
            name="torch-gpu", reason=f"{missing}; torch {torch.__version__} sees a GPU"
        )
    return SearchBackend(name="torch-cpu", reason=f"{missing}; torch sees no GPU")


def _faiss_index(items_ND: Float32, metric: Metric, *, gpu: bool) -> Any:
    import faiss

    width = items_ND.shape[1]
    index: Any = faiss.IndexFlatL2(width) if metric == "l2" else faiss.IndexFlatIP(width)
    if gpu:
        # The rank's own; faiss may see GPUs where torch sees none.
        number = torch.cuda.current_device() if torch.cuda.is_available() else 0
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)
    index.add(items_ND)
    return index


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Candidates of some queries, in any order."""

    ids_BC: torch.Tensor
    """int64"""
    keys_BC: torch.Tensor
    """fp32, exact"""
    outside_B: torch.Tensor
    """float64: no item that is missing has a smaller key"""


Propose = Callable[[torch.Tensor], _Candidates]
"""indices of queries (B,) → their candidates"""


def _faiss_proposer(keys: Keys, count: int, *, gpu: bool) -> Propose:
    index = _faiss_index(keys.items_ND.cpu().numpy(), keys.metric, gpu=gpu)
    sign = 1 if keys.metric == "l2" else -1

    def propose(rows_B: torch.Tensor) -> _Candidates:
        values_BC, found_BC = index.search(keys.queries_QD[rows_B].cpu().numpy(), count)
        farthest_B = torch.from_numpy((sign * values_BC.astype(np.float64)).max(axis=1)).to(
            keys.device
        )
        ids_BC = torch.from_numpy(found_BC.astype(np.int64)).to(keys.device)
        keys_P = keys.of_pairs(rows_B.repeat_interleave(count), ids_BC.flatten())
        return _Candidates(
            ids_BC=ids_BC,
            keys_BC=keys_P.view(ids_BC.shape),
            outside_B=farthest_B - keys.error(rows_B, "fp32"),
        )

    return propose


def _torch_proposer(keys: Keys, count: int, k: int) -> Propose:
    if keys.quick == "fp64":
        return lambda rows_B: _proposed_by_fp64(keys, rows_B, count)
    # One for the query itself.
    within = min(k + 1, count)
    return lambda rows_B: _proposed_by_fp32(keys, rows_B, count, within)


def _proposed_by_fp64(keys: Keys, rows_B: torch.Tensor, count: int) -> _Candidates:
    """The values of the product settle most keys. Candidates are selected as fp32: half the bytes
    to pass over, and half the digits."""
    near_BN = keys.by_product(rows_B, "fp64")
    near_BC, ids_BC = _smallest(near_BN.float(), count)
    farthest_B = near_BC.amax(dim=1).double()
    return _Candidates(
        ids_BC=ids_BC,
        keys_BC=keys.settle(near_BN.gather(1, ids_BC), rows_B, ids_BC),
        outside_B=farthest_B - rounding(farthest_B) - keys.error(rows_B, "fp64"),
    )


def _proposed_by_fp32(keys: Keys, rows_B: torch.Tensor, count: int, within: int) -> _Candidates:
    """Keys are only computed of candidates that the product leaves a chance to be among the first
    `within`; the others get +inf."""
    near_BC, ids_BC = _smallest(keys.by_product(rows_B, "fp32"), count)
    near_BC = near_BC.double()
    error_B = keys.error(rows_B, "fp32")
    reach_B = near_BC.kthvalue(within, dim=1).values + 2 * error_B
    reach_B += rounding(reach_B)
    row_P, column_P = (near_BC <= reach_B[:, None]).nonzero(as_tuple=True)
    keys_BC = torch.full(ids_BC.shape, torch.inf)
    keys_BC[row_P, column_P] = keys.of_pairs(rows_B[row_P], ids_BC[row_P, column_P])
    return _Candidates(ids_BC=ids_BC, keys_BC=keys_BC, outside_B=near_BC.amax(dim=1) - error_B)


def _smallest(near_BN: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C) the smallest numbers of each row and their (B, C) int64 columns, in any order."""
    items = near_BN.shape[1]
    groups = items // _GROUP
    if near_BN.device.type != "cpu" or groups < 4 * count:
        top = near_BN.topk(count, dim=1, largest=False, sorted=False)
        return top.values, top.indices
    # A CPU finds the least of each group of columns much faster than it selects. No number is
    # smaller than all C chosen ones that lies in another group than the C of the smallest least.
    least_BG = near_BN[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amin(dim=1)
    chosen_BC = least_BG.topk(count, dim=1, largest=False, sorted=False).indices
    columns_BM = (chosen_BC[:, :, None] + groups * torch.arange(_GROUP)).flatten(1)
    rest_R = torch.arange(groups * _GROUP, items)
    columns_BM = torch.cat([columns_BM, rest_R.expand(len(near_BN), -1)], dim=1)
    top = near_BN.gather(1, columns_BM).topk(count, dim=1, largest=False, sorted=False)
    return top.values, columns_BM.gather(1, top.indices)


def _proposer(name: BackendName, keys: Keys, count: int, k: int) -> Propose:
    if name in ("torch-gpu", "torch-cpu") or (name == "faiss-gpu" and count > FAISS_GPU_LARGEST_K):
        return _torch_proposer(keys, count, k)
    return _faiss_proposer(keys, count, gpu=name == "faiss-gpu")


def _device(name: BackendName) -> torch.device:
    """Where the order is found: faiss may see a GPU that torch does not."""
    return torch.device("cuda" if name.endswith("gpu") and torch.cuda.is_available() else "cpu")


def exact_values(
    queries_QD: Float32 | Float64, items_ND: Float32 | Float64, ids_QC: Int64, metric: Metric
) -> Float32:
    """(Q, C) fp32 values of chosen pairs: summed in float64 without cancellation, rounded once.

    Squared Euclidean distances for "l2", inner products for "ip".
    """
    queries, items, ids = (torch.from_numpy(a) for a in (queries_QD, items_ND, ids_QC))
    keys_P = Keys(queries, items, metric).of_pairs(
        torch.arange(len(ids)).repeat_interleave(ids.shape[1]), ids.flatten()
    )
    values_QC: Float32 = _values(keys_P.view(ids.shape), metric).numpy()
    return values_QC


def order_of_pairs(
    queries_QD: Any, items_ND: Any, row_P: Int64, id_P: Int64, *, metric: Metric = "l2"
) -> Int64:
    """(P,) int64 that stand for chosen pairs of queries and items: among those of one query, they
    sort in the order of :func:`search`, and each one's low 32 bits are the item's index.

    row_P, id_P: (P,) indices of queries and of items. On the CPU. Raises InputError as
    :func:`search`.
    """
    queries, items = _checked(queries_QD, items_ND, metric)
    ids = torch.from_numpy(id_P)
    keys = _keys(queries, items, metric, torch.device("cpu"))
    packed_P: Int64 = pack(keys.of_pairs(torch.from_numpy(row_P), ids), ids).numpy()
    return packed_P


def _values(keys_BK: torch.Tensor, metric: Metric) -> torch.Tensor:
    return keys_BK if metric == "l2" else 0.0 - keys_BK  # never −0


def _nearest(
    keys: Keys, propose: Propose, rows_B: torch.Tensor, own_B: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first K of some queries: keys (B, K) fp32 and indices (B, K) int64, +inf and N where none
    is left.

    own_B: (B,) the item that each query leaves out, or −1.
    """
    items = len(keys.items_ND)
    candidates = propose(rows_B)
    # The query's own entry goes behind all others, infinite ones too.
    own_BC = candidates.ids_BC == own_B[:, None]
    packed_BC = pack(
        candidates.keys_BC.masked_fill(own_BC, torch.inf),
        candidates.ids_BC.masked_fill(own_BC, items),
    )
    packed_BK = packed_BC.sort(dim=1).values[:, :k]
    if candidates.ids_BC.shape[1] < items:
        last_B = unpack(packed_BK[:, -1])[0].double()
        last_B += rounding(last_B)
        doubtful_M = (candidates.outside_B <= last_B).nonzero()[:, 0]
        if len(doubtful_M):
            packed_BK[doubtful_M] = _search_again(
                keys, rows_B[doubtful_M], own_B[doubtful_M], last_B[doubtful_M], k
            )
    return unpack(packed_BK)


def _search_again(
    keys: Keys, rows_M: torch.Tensor, own_M: torch.Tensor, last_M: torch.Tensor, k: int
) -> torch.Tensor:
    """(M, K) packed: the first K of queries whose candidates left a doubt, from all items that may
    be as near as last_M, the K-th candidate's key."""
    ids_N = torch.arange(len(keys.items_ND), device=keys.device)
    parts = []
    for rows_B, own_B, last_B in zip(
        *(keys.split(one_M) for one_M in (rows_M, own_M, last_M)), strict=True
    ):
        near_BN = keys.by_product(rows_B, "fp64")
        beyond_BN = near_BN > (last_B + keys.error(rows_B, "fp64"))[:, None]
        near_BN.masked_fill_(beyond_BN | (ids_N == own_B[:, None]), torch.inf)
        ids_BN = ids_N.expand_as(near_BN)
        packed_BN = pack(keys.settle(near_BN, rows_B, ids_BN), ids_BN)
        parts.append(packed_BN.topk(k, dim=1, largest=False).values)
    return torch.cat(parts)


def _checked(queries_QD: Any, items_ND: Any, metric: Metric) -> tuple[Float32, Float32]:
    """Rounded to fp32 once, so that every back end ranks the very same vectors; one array where
    both are one."""
    items = as_float32(items_ND, "items")
    queries = items if queries_QD is items_ND else as_float32(queries_QD, "queries")
    if queries.shape[1] != items.shape[1]:
        raise InputError(
            f"queries are {queries.shape[1]} wide, items {items.shape[1]}: embed both with the same model"
        )
    if metric not in ("l2", "ip"):
        raise InputError(f"metric = {metric!r}: take 'l2' or 'ip'")
    size = _largest_key(queries, items, metric)
    if 0 < size < _SMALLEST_KEY:
        power = int(-np.frexp(size)[1] / 2)
        raise InputError(
            f"{'squared distances' if metric == 'l2' else 'products'} of such small queries and items, about "
            f"{size:.1g}, are too small for fp32: multiply both by 2.0**{power}, which changes no order"
        )
    return queries, items


def _largest_key(queries_QD: Float32, items_ND: Float32, metric: Metric) -> float:
    """About the largest term of any key; 0 if all are."""
    if metric == "ip":
        return float(np.abs(queries_QD).max()) * float(np.abs(items_ND).max())
    low_D, high_D = items_ND.min(axis=0), items_ND.max(axis=0)
    if queries_QD is not items_ND:
        low_D = np.minimum(low_D, queries_QD.min(axis=0))
        high_D = np.maximum(high_D, queries_QD.max(axis=0))
    return float((high_D.astype(np.float64) - low_D).max()) ** 2


def _keys(queries_QD: Float32, items_ND: Float32, metric: Metric, device: torch.device) -> Keys:
    items = torch.from_numpy(items_ND).to(device)
    queries = items if queries_QD is items_ND else torch.from_numpy(queries_QD).to(device)
    return Keys(queries, items, metric)


def search(
    queries_QD: Any,
    items_ND: Any,
    k: int,
    *,
    metric: Metric = "l2",
    backend: BackendName | None = None,
) -> tuple[Float32, Int64]:
    """The K nearest items of each query, exactly; equal values are ordered by item index.

    queries_QD, items_ND: numpy or torch, any float type; rounded to fp32 first. metric "l2" ranks
    by squared Euclidean distance, smallest first; "ip" by inner product, largest first. backend:
    None for :func:`search_backend`.
    Returns values (Q, K) fp32 and item indices (Q, K) int64. Where K > N, the rest of a row is
    filled up with index −1 and value +inf ("ip": −inf). Both are the same, bit for bit, whatever
    the back end. Raises InputError on bad shapes, non-finite entries, K < 1, and entries so small
    that fp32 holds no squares of them.
    Memory: the inputs in fp32; the items once more in fp32, for a CPU's products or as faiss's
    copy, or in float64; the results; and a few blocks of 128 MiB (of 1 GiB on a GPU, where the
    results are not held).
    """
    queries, items = _checked(queries_QD, items_ND, metric)
    return _search(queries, items, k, np.full(len(queries), -1), metric, backend)


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
    where the queries are the items, in the same order. The entry is left out by its index, so that
    an exact duplicate of the query is still found.
    Returns and raises as :func:`search`; a row is filled up with −1 where fewer than K items
    remain.
    """
    queries, items = _checked(queries_QD, items_ND, metric)
    own_Q = checked_query_ids(query_ids_Q, len(queries), len(items))
    return _search(queries, items, k, own_Q, metric, backend)


def _search(
    queries_QD: Float32,
    items_ND: Float32,
    k: int,
    own_Q: Int64,
    metric: Metric,
    backend: BackendName | None,
) -> tuple[Float32, Int64]:
    if k < 1:
        raise InputError(f"k = {k}: ask for at least one neighbour")
    name = backend or search_backend().name
    keys = _keys(queries_QD, items_ND, metric, _device(name))
    own = torch.from_numpy(own_Q).to(keys.device)
    items = len(items_ND)
    listed = min(k, items)
    # One for the query itself.
    propose = _proposer(name, keys, min(listed + 1 + _SPARE_CANDIDATES, items), listed)
    values_QK = torch.full((len(queries_QD), k), torch.inf if metric == "l2" else -torch.inf)
    ids_QK = torch.full((len(queries_QD), k), -1)
    start = 0
    for rows_B in keys.blocks():
        keys_BK, ids_BK = _nearest(keys, propose, rows_B, own[rows_B], listed)
        block = slice(start, start := start + len(rows_B))
        values_QK[block, :listed].copy_(_values(keys_BK, metric))
        ids_QK[block, :listed].copy_(ids_BK.masked_fill_(ids_BK == items, -1))
    return values_QK.numpy(), ids_QK.numpy()


def merge(
    parts: Sequence[tuple[Float32, Int64]], k: int, *, metric: Metric = "l2"
) -> tuple[Float32, Int64]:
    """The K nearest items of a gallery whose parts were searched separately: exactly the arrays
    that one search of the whole gallery returns, ties by the lowest index included.

    parts: values (Q, K') and item indices (Q, K') of each part, as :func:`search` and
    :func:`search_excluding_self` return them, but for the indices: they count in the whole gallery
    (add the number of items before the part, not to −1). K' must be at least K, or the number of
    the part's items; it may differ between parts, and their order does not matter. All parts must
    be cut from the same vectors: what is centred or scaled is so before it is cut.
    Returns values (Q, K) fp32 and indices (Q, K) int64, filled up as by :func:`search`. Raises
    InputError for no parts, parts of other shapes, and K < 1.
    """
    if k < 1:
        raise InputError(f"k = {k}: ask for at least one neighbour")
    shapes = {(values.shape, ids.shape) for values, ids in parts}
    if not shapes or any(a != b or len(a) != 2 or a[0] != len(parts[0][0]) for a, b in shapes):
        raise InputError(
            f"parts of shapes {sorted(shapes)}: give at least one, each with (Q, K) values and as many "
            "indices, of the same queries"
        )
    sign = 1 if metric == "l2" else -1
    keys_QM = torch.from_numpy(sign * np.concatenate([values for values, _ in parts], axis=1))
    ids_QM = torch.from_numpy(np.concatenate([ids for _, ids in parts], axis=1))
    none = 2**32 - 1  # behind every item, infinitely far ones too
    packed_QM = pack(keys_QM, torch.where(ids_QM < 0, none, ids_QM))
    keys_QK, ids_QK = unpack(packed_QM.sort(dim=1).values[:, :k])
    values_QK = torch.full((len(keys_QK), k), sign * torch.inf)
    merged_QK = torch.full((len(keys_QK), k), -1)
    found = slice(0, ids_QK.shape[1])
    values_QK[:, found] = _values(keys_QK, metric)
    merged_QK[:, found] = ids_QK.masked_fill(ids_QK == none, -1)
    return values_QK.numpy(), merged_QK.numpy()


def ranks_of(
    queries_QD: Any,
    items_ND: Any,
    ids_Q: Int64,
    *,
    query_ids_Q: Int64 | None = None,
    metric: Metric = "l2",
) -> Int64:
    """(Q,) int64: the rank, from 1 on, of one item for each query in the order of :func:`search`
    over all items.

    ids_Q: (Q,) those items. query_ids_Q as in :func:`search_excluding_self`: own entries do not
    count, and ids_Q has none. The nearer items are counted, not listed, so a high rank costs no
    more than a near one. On the GPU if there is one. Memory and errors as :func:`search`.
    """
    queries, items = _checked(queries_QD, items_ND, metric)
    values_Q = exact_values(queries, items, np.asarray(ids_Q)[:, None], metric)[:, 0]
    return 1 + counts_before(
        queries, items, values_Q, ids_Q, query_ids_Q=query_ids_Q, metric=metric
    )


def counts_before(
    queries_QD: Any,
    items_ND: Any,
    values_Q: Float32,
    ids_Q: Int64,
    *,
    query_ids_Q: Int64 | None = None,
    metric: Metric = "l2",
) -> Int64:
    """(Q,) int64: how many items stand before one place of each query's order, a value and an
    index, in the order of :func:`search`.

    The sum over the parts of a gallery, plus 1, is the rank that :func:`ranks_of` gives for the
    whole. values_Q: (Q,) fp32 by :func:`exact_values`, found where the item lies. ids_Q: (Q,) its
    index, counted from this part's first item: below 0 or N and above where it lies in another
    part. query_ids_Q: as in :func:`search_excluding_self`, among this part's items: −1 where a
    query is not one of them. Device, memory and errors as :func:`ranks_of`.
    """
    queries, items = _checked(queries_QD, items_ND, metric)
    own_Q = checked_query_ids(query_ids_Q, len(queries), len(items))
    keys = _keys(
        queries, items, metric, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    sign = 1 if metric == "l2" else -1
    key, ids, own = (
        torch.from_numpy(np.asarray(one_Q)).to(keys.device)
        for one_Q in (sign * values_Q, ids_Q, own_Q)
    )
    counts = [
        _count_before(keys, rows_B, key[rows_B], ids[rows_B], own[rows_B], keys.quick)
        for rows_B in keys.blocks()
    ]
    counts_Q: Int64 = torch.cat(counts).cpu().numpy()
    return counts_Q


def _count_before(
    keys: Keys,
    rows_B: torch.Tensor,
    key_B: torch.Tensor,
    ids_B: torch.Tensor,
    own_B: torch.Tensor,
    precision: Precision,
) -> torch.Tensor:
    """(B,) int64: how many items come before (key_B, ids_B) in the orders of some queries."""
    near_BN = keys.by_product(rows_B, precision)
    with_own_M = (own_B >= 0).nonzero()[:, 0]
    near_BN[with_own_M, own_B[with_own_M]] = torch.inf
    slack_B = rounding(key_B.double()) + keys.error(rows_B, precision)
    # Rounded outwards, to compare numbers of one type.
    low_B1, high_B1 = (
        torch.nextafter(edge_B.to(near_BN.dtype), torch.full_like(near_BN[:, 0], outwards))[:, None]
        for edge_B, outwards in ((key_B - slack_B, -torch.inf), (key_B + slack_B, torch.inf))
    )
    counts_B = (near_BN < low_B1).sum(dim=1)
    doubtful_BN = (near_BN >= low_B1) & (near_BN <= high_B1)
    if precision == "fp32":
        many_M = (doubtful_BN.sum(dim=1) > _FEW_DOUBTS).nonzero()[:, 0]
        if len(many_M):
            counts_B[many_M] = _count_before(
                keys, rows_B[many_M], key_B[many_M], ids_B[many_M], own_B[many_M], "fp64"
            )
            doubtful_BN[many_M] = False
    # What the products leave in doubt is summed; the item itself is always among it.
    row_P, near_P = doubtful_BN.nonzero(as_tuple=True)
    keys_P = keys.of_pairs(rows_B[row_P], near_P)
    before_P = (keys_P < key_B[row_P]) | ((keys_P == key_B[row_P]) & (near_P < ids_B[row_P]))
    return counts_B.index_add_(0, row_P, before_P.long())


def checked_query_ids(query_ids_Q: Int64 | None, queries: int, items: int) -> Int64:
    """(Q,) int64 indices of the queries among the items; None stands for 0..Q−1 and needs Q = N."""
    if query_ids_Q is None:
        if queries != items:
            raise InputError(
                f"{queries} queries, {items} items: pass query_ids where the two sets differ"
            )
        return np.arange(queries)
    ids_Q = np.asarray(query_ids_Q)
    if ids_Q.shape != (queries,) or not np.issubdtype(ids_Q.dtype, np.integer):
        raise InputError(
            f"query_ids: {queries} integers are needed, got {ids_Q.dtype} {ids_Q.shape}"
        )
    if ids_Q.min() < -1 or ids_Q.max() >= items:
        raise InputError(
            f"query_ids: {ids_Q.min()}..{ids_Q.max()} leaves the range −1..{items - 1}"
        )
    return ids_Q.astype(np.int64)
