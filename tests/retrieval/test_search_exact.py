"""Exact search: against a full sort of true distances, on every back end this machine has."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from namr_dist.errors import InputError
from namr_dist.retrieval import search as search_module
from namr_dist.retrieval.keys import Keys
from namr_dist.retrieval.search import (
    SearchBackend,
    counts_before,
    exact_values,
    merge,
    ranks_of,
    search,
    search_backend,
    search_excluding_self,
)

BACKENDS = ["torch-cpu"] + ["faiss-cpu"] * (importlib.util.find_spec("faiss") is not None)


def full_sort(queries, items, metric):
    """The definition: all pairs in float64, rounded to fp32, sorted by (value, index)."""
    wide_q, wide = (a.astype(np.float32).astype(np.float64) for a in (queries, items))
    if metric == "l2":
        keys = ((wide_q[:, None] - wide[None]) ** 2).sum(-1).astype(np.float32)
    else:
        keys = -(wide_q[:, None] * wide[None]).sum(-1).astype(np.float32)
    order = np.argsort(keys, axis=1, kind="stable")
    values = np.take_along_axis(keys, order, 1)
    return (values if metric == "l2" else -values), order


def clumsy_sets(name, rng):
    """Queries and items that make trouble: duplicates everywhere, far from the origin, all
    equal."""
    items = rng.standard_normal((90, 12))
    if name == "duplicates":
        items = np.repeat(items[:15], 6, axis=0)[rng.permutation(90)]
    if name == "offset":
        items = items * 1e-3 + 1000.0
    if name == "collapsed":
        items = np.ones_like(items)
    if name == "grid":
        items = rng.integers(0, 2, (90, 4)).astype(float)
    queries = np.concatenate([items[:20], items[::7] + 0.25 * (name == "random")])
    return queries, items


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["random", "duplicates", "offset", "collapsed", "grid"])
def test_equals_a_full_sort(kind, metric, backend, rng):
    queries, items = clumsy_sets(kind, rng)
    values, order = full_sort(queries, items, metric)
    for k in (1, 3, 7, 74, 89, 90):  # 3 and 7 cut through groups of six duplicates
        found_values, found_ids = search(queries, items, k, metric=metric, backend=backend)
        assert found_values.dtype == np.float32 and found_ids.dtype == np.int64
        np.testing.assert_array_equal(found_ids, order[:, :k])
        np.testing.assert_array_equal(found_values, values[:, :k])


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_back_ends_agree_beyond_the_spare_candidates(metric, rng):
    # 40 copies of each point: more than the spare candidates, so every query must be searched
    # again.
    items = np.repeat(rng.standard_normal((30, 8)), 40, axis=0)[rng.permutation(1200)].astype(
        np.float32
    )
    values, order = full_sort(items[:50], items, metric)
    for backend in BACKENDS:
        found_values, found_ids = search(items[:50], items, 10, metric=metric, backend=backend)
        np.testing.assert_array_equal(found_ids, order[:, :10])
        np.testing.assert_array_equal(found_values, values[:, :10])


def test_more_neighbours_than_the_gpu_code_of_faiss_returns(rng):
    """Another back end takes over at its limit of 2,048, on machines without a GPU too."""
    pytest.importorskip("faiss")
    items = rng.integers(0, 4, (2200, 3)).astype(float)
    _, order = full_sort(items[:5], items, "l2")
    np.testing.assert_array_equal(
        search(items[:5], items, 2100, backend="faiss-gpu")[1], order[:, :2100]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sloppy_library_changes_nothing(backend, monkeypatch, rng):
    """Candidates with errors up to the bound, in any order, must not show in the result."""
    queries, items = rng.standard_normal((40, 16)), rng.standard_normal((400, 16)) * 0.01
    _, order = full_sort(queries, items, "l2")
    exact_error, exact_product = Keys.error, Keys.by_product

    def error(keys, rows, precision):
        return exact_error(keys, rows, precision) * (2**10 if precision == "fp32" else 2**38)

    def by_product(keys, rows, precision):
        exact = exact_product(keys, rows, precision)
        noise = torch.from_numpy(rng.uniform(-0.999, 0.999, (len(rows), 400)))
        return exact + (error(keys, rows, precision)[:, None] * noise).to(exact.dtype)

    class Sloppy:
        def search(self, queries_QD, count):
            wide_q, wide = (
                queries_QD.astype(np.float64),
                items.astype(np.float32).astype(np.float64),
            )
            keys = Keys(
                torch.from_numpy(queries_QD), torch.from_numpy(items.astype(np.float32)), "l2"
            )
            bound = error(keys, torch.arange(len(queries_QD)), "fp32").numpy()
            values = ((wide_q[:, None] - wide) ** 2).sum(-1) + bound[:, None] * rng.uniform(
                -1, 1, (40, 400)
            )
            ids = np.argsort(values, axis=1)[:, :count]
            return np.take_along_axis(values, ids, 1), ids

    monkeypatch.setattr(search_module, "_faiss_index", lambda items_ND, metric, *, gpu: Sloppy())
    monkeypatch.setattr(Keys, "error", error)
    monkeypatch.setattr(Keys, "by_product", by_product)
    _, found_ids = search(queries, items, 5, backend=backend)
    np.testing.assert_array_equal(found_ids, order[:, :5])
    for position in (0, 6, 200):
        np.testing.assert_array_equal(
            ranks_of(queries, items, order[:, position], query_ids_Q=np.full(40, -1)), position + 1
        )


def test_tensors_of_any_float_type(rng):
    items = torch.from_numpy(rng.standard_normal((30, 6)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rounded = items.to(dtype).requires_grad_()
        _, order = full_sort(
            rounded.detach().double().numpy(), rounded.detach().double().numpy(), "l2"
        )
        np.testing.assert_array_equal(search(rounded, rounded, 4)[1], order[:, :4])


def test_more_neighbours_than_items(rng):
    items = rng.standard_normal((5, 3))
    values, ids = search(items, items, 8)
    assert (ids[:, 5:] == -1).all() and np.isposinf(values[:, 5:]).all() and (ids[:, :5] >= 0).all()
    values, ids = search(items, items, 8, metric="ip")
    assert np.isneginf(values[:, 5:]).all()
    values, ids = search_excluding_self(items, items, 6)
    assert (ids[:, :4] >= 0).all() and (ids[:, 4:] == -1).all()
    assert (ids != np.arange(5)[:, None]).all()


def test_self_is_left_out_by_index_not_by_rank(rng):
    """With five copies of each point, a query's first hit is often a copy of a lower index."""
    items = np.repeat(rng.standard_normal((6, 4)), 5, axis=0)[rng.permutation(30)]
    values, ids = search_excluding_self(items, items, 4)
    assert (ids != np.arange(30)[:, None]).all()
    np.testing.assert_array_equal(values, 0)
    for query in range(30):
        copies = [i for i in range(30) if i != query and (items[i] == items[query]).all()]
        assert ids[query].tolist() == copies


def test_queries_of_which_only_some_are_items(rng):
    items = rng.standard_normal((40, 5))
    queries = np.concatenate([items[[3, 9]], rng.standard_normal((2, 5)), items[[3]]])
    own = np.array([3, 9, -1, -1, -1])
    _, ids = search_excluding_self(queries, items, 6, query_ids_Q=own)
    _, order = full_sort(queries, items, "l2")
    for row, itself in enumerate(own):
        assert ids[row].tolist() == [i for i in order[row] if i != itself or itself < 0][:6]
    assert ids[4, 0] == 3  # the same vector, yet not the item itself


def test_values_do_not_cancel():
    """A duplicate far from the origin lies at exactly 0, a near one at its true distance."""
    items = np.full((3, 4), 4096.0)
    items[1, 0] += 2.0**-10
    values, ids = search(items[:1], items, 3)
    assert ids[0].tolist() == [0, 2, 1] and values[0].tolist() == [0.0, 0.0, 2.0**-20]
    np.testing.assert_array_equal(exact_values(items[:1], items, ids, "l2"), values)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["random", "duplicates", "collapsed"])
def test_parts_of_a_gallery_merge_into_one_search(kind, metric, rng):
    """Duplicates lie in several parts, one part is shorter than K, own entries in any of them."""
    _, items = clumsy_sets(kind, rng)
    own = np.concatenate([rng.permutation(90)[:25], np.full(5, -1)])
    queries = items[own]
    cuts = [0, 4, 41, 90]
    for k in (1, 7, 89, 95):
        expected = search_excluding_self(queries, items, k, query_ids_Q=own, metric=metric)
        parts = []
        counts = np.ones(30, dtype=np.int64)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            inside = np.where((own >= start) & (own < stop), own - start, -1)
            part = items[start:stop]
            values, ids = search_excluding_self(
                queries, part, min(k, stop - start), query_ids_Q=inside, metric=metric
            )
            parts.append((values, np.where(ids < 0, -1, ids + start)))
            place = (expected[0][:, min(k, 89) - 1], expected[1][:, min(k, 89) - 1] - start)
            counts += counts_before(queries, part, *place, query_ids_Q=inside, metric=metric)
        for order in (parts, parts[::-1]):
            values, ids = merge(order, k, metric=metric)
            np.testing.assert_array_equal(ids, expected[1])
            np.testing.assert_array_equal(values.view(np.int32), expected[0].view(np.int32))
        assert (counts == min(k, 89)).all()


def test_parts_that_do_not_fit_are_named():
    part = (np.zeros((2, 3), dtype=np.float32), np.zeros((2, 3), dtype=np.int64))
    for parts in ([], [part, (part[0][:1], part[1][:1])], [(part[0], part[1][:, :1])]):
        with pytest.raises(InputError, match="of the same queries"):
            merge(parts, 1)
    with pytest.raises(InputError, match="k = 0"):
        merge([part], 0)


def test_back_end_is_named_with_a_reason():
    backend = search_backend()
    assert isinstance(backend, SearchBackend) and backend.reason
    if not torch.cuda.is_available():
        assert backend.name == "torch-cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_gpu_equals_cpu(metric, rng):
    items = rng.standard_normal((3000, 32))
    expected = search(items[:200], items, 50, metric=metric, backend="torch-cpu")
    for backend in {"torch-gpu", search_backend().name}:
        result = search(items[:200], items, 50, metric=metric, backend=backend)
        np.testing.assert_array_equal(result[1], expected[1])
        np.testing.assert_array_equal(result[0], expected[0])


@pytest.mark.parametrize(
    ("queries", "items", "k", "part"),
    [
        (np.zeros((2, 3)), np.zeros((4, 5)), 1, "3 wide"),
        (np.zeros((2, 3)), np.zeros((4, 3)), 0, "k = 0"),
        (np.zeros((2, 3)), np.full((4, 3), np.nan), 1, "row 0 holds NaN"),
        (np.zeros((2, 3)), np.full((4, 3), 1e30), 1, "row 0"),
        (np.zeros((0, 3)), np.zeros((4, 3)), 1, "shape (0, 3)"),
        (np.zeros(3), np.zeros((4, 3)), 1, "shape (3,)"),
    ],
)
def test_bad_input_is_named(queries, items, k, part):
    with pytest.raises(InputError) as caught:
        search(queries, items, k)
    assert part in str(caught.value)


def test_bad_query_ids_are_named():
    with pytest.raises(InputError, match="pass query_ids"):
        search_excluding_self(np.zeros((2, 3)), np.zeros((4, 3)), 1)
    with pytest.raises(InputError, match="leaves the range"):
        search_excluding_self(np.zeros((2, 3)), np.zeros((4, 3)), 1, query_ids_Q=np.array([0, 4]))
    with pytest.raises(InputError, match="2 integers"):
        search_excluding_self(np.zeros((2, 3)), np.zeros((4, 3)), 1, query_ids_Q=np.array([0.5, 1]))
