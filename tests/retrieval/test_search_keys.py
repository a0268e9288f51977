"""Keys by their definition, in blocks, and on every device: what makes all back ends return the
same bits."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from namr_dist.bench.search import clustered_rows
from namr_dist.retrieval import keys as keys_module
from namr_dist.retrieval import search as search_module
from namr_dist.retrieval.keys import Keys, pack, unpack
from namr_dist.retrieval.search import ranks_of, search, search_excluding_self

BACKENDS = ["torch-cpu"] + ["faiss-cpu"] * (importlib.util.find_spec("faiss") is not None)
METRICS = ["l2", "ip"]


def definition(query, item, metric):
    """The key in Python's own float64: terms, the second half added to the first until one is left,
    one rounding."""
    pairs = [(float(q), float(x)) for q, x in zip(query, item, strict=True)]
    terms = [(x - q) * (x - q) if metric == "l2" else -(x * q) for q, x in pairs]
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        sums = [a + b for a, b in zip(terms, terms[half:], strict=False)]
        terms = sums + terms[len(sums) : half]
    return np.float32(terms[0])


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 100])
def test_keys_are_those_of_the_definition_bit_for_bit(width, metric, rng):
    rows = rng.standard_normal((40, width)).astype(np.float32)
    rows[7] = rows[3]
    keys = Keys(torch.from_numpy(rows[:9]), torch.from_numpy(rows), metric)
    expected = [[definition(query, item, metric) for item in rows] for query in rows[:9]]
    every = torch.arange(9)
    settled = keys.settle(keys.by_product(every, "fp64"), every, torch.arange(40).expand(9, 40))
    np.testing.assert_array_equal(settled.numpy(), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e8])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_products_stay_within_their_error(precision, metric, scale, rng):
    """Beside the x86's 80-bit floats, with 11 more bits than float64."""
    rows = (scale * (rng.standard_normal((300, 200)) + 5)).astype(np.float32)
    keys = Keys(torch.from_numpy(rows[:50]), torch.from_numpy(rows), metric)
    long = rows.astype(np.longdouble)
    true = -(long[:50] @ long.T)
    if metric == "l2":
        true = 2 * true + (long[:50] ** 2).sum(1)[:, None] + (long**2).sum(1)
    error = np.abs(keys.by_product(torch.arange(50), precision).numpy() - true).max(axis=1)
    bound = keys.error(torch.arange(50), precision).numpy()
    assert (error <= bound).all() and (error > 0).any()
    assert np.finfo(np.longdouble).eps < 2**-60


def test_packed_numbers_sort_as_key_and_index_do(rng):
    keys = np.array(
        [-np.inf, -3e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 1.5, 1.5, 3e38, np.inf], dtype=np.float32
    )
    keys = rng.choice(keys, 500)
    ids = rng.integers(0, 2**32 - 1, 500)
    packed = pack(torch.from_numpy(keys), torch.from_numpy(ids))
    order = np.lexsort((ids, keys))
    np.testing.assert_array_equal(packed.argsort().numpy(), order)
    back, back_ids = unpack(packed)
    np.testing.assert_array_equal(back.numpy(), keys)
    np.testing.assert_array_equal(back_ids.numpy(), ids)


@pytest.mark.parametrize("metric", METRICS)
def test_all_back_ends_return_the_same_bits_whatever_the_blocks(metric, monkeypatch):
    """Clusters with duplicates, each query left out: 201 items, so that the last block is a part of
    one."""
    rows, _ = clustered_rows(201, 24, seed=3)
    rows[150:190] = rows[100]  # more copies than spare candidates
    values, ids = search_excluding_self(rows, rows, 200, metric=metric, backend="torch-cpu")
    every = [definition(rows[5], item, metric) for item in rows]
    assert ids[5].tolist() == [i for i in sorted(range(201), key=lambda i: (every[i], i)) if i != 5]
    monkeypatch.setitem(keys_module._BLOCK_NUMBERS, "cpu", 7 * 201)
    monkeypatch.setitem(keys_module._TERM_NUMBERS, "cpu", 24 * 1000)
    monkeypatch.setattr(search_module, "_GROUP", 2)  # else such few items are not grouped
    monkeypatch.setattr(search_module, "_FEW_DOUBTS", 20)
    for backend in BACKENDS:
        for k in (1, 4, 32, 200):
            found_values, found_ids = search_excluding_self(
                rows, rows, k, metric=metric, backend=backend
            )
            np.testing.assert_array_equal(found_ids, ids[:, :k])
            np.testing.assert_array_equal(found_values.view(np.int32), values[:, :k].view(np.int32))
    for position in (0, 3, 60, 199):
        np.testing.assert_array_equal(
            ranks_of(rows, rows, ids[:, position], metric=metric), position + 1
        )


@pytest.mark.parametrize("items", [63, 64, 200])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_the_smallest_are_found_by_groups(group, items, monkeypatch, rng):
    """Equal numbers in all groups, and columns behind the last whole one."""
    monkeypatch.setattr(search_module, "_GROUP", group)
    near = rng.integers(0, 50, (40, items)).astype(np.float32)
    near[:, -3:] -= 9
    for count in (1, 2, 9):
        values, columns = search_module._smallest(torch.from_numpy(near), count)
        assert all(len(set(row)) == count for row in columns.tolist())
        np.testing.assert_array_equal(np.take_along_axis(near, columns.numpy(), 1), values)
        np.testing.assert_array_equal(np.sort(values), np.sort(near)[:, :count])


def test_products_are_not_trusted_where_others_allowed_fewer_digits():
    rows = torch.ones(3, 2)
    assert Keys(rows, rows, "l2").quick == "fp32"
    assert Keys(rows * 1e19, rows, "l2").quick == "fp64"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert Keys(rows, rows, "l2").quick == "fp64"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_rows_end_with_none_where_items_run_out(metric, backend):
    rows, _ = clustered_rows(30, 8, seed=0)
    nothing = np.inf if metric == "l2" else -np.inf
    for k in (29, 30, 45):
        values, ids = search_excluding_self(rows, rows, k, metric=metric, backend=backend)
        assert (
            np.sort(ids[:, :29], axis=1) == [[i for i in range(30) if i != q] for q in range(30)]
        ).all()
        assert (ids[:, 29:] == -1).all() and (values[:, 29:] == nothing).all()
    some = np.array([4, -1])
    values, ids = search_excluding_self(
        rows[4:6], rows, 30, query_ids_Q=some, metric=metric, backend=backend
    )
    assert ids[0, -1] == -1 and 4 not in ids[0] and sorted(ids[1]) == list(range(30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_item_is_found_by_others_and_not_by_itself(backend):
    one = np.ones((1, 3), dtype=np.float32)
    values, ids = search_excluding_self(one, one, 2, backend=backend)
    assert ids.tolist() == [[-1, -1]] and np.isposinf(values).all()
    values, ids = search(one + 1, one, 2, backend=backend)
    assert ids.tolist() == [[0, -1]] and values.tolist() == [[3.0, np.inf]]
    assert ranks_of(one + 1, one, np.array([0]), query_ids_Q=np.array([-1])).tolist() == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("metric", METRICS)
def test_a_gpu_returns_the_bits_of_the_cpu(metric, monkeypatch):
    """Also in blocks, beyond the spare candidates, and for 1,000 neighbours."""
    rows, _ = clustered_rows(6007, 96, seed=5)
    rows[3000:3040] = rows[100]
    cpu, gpu = (
        Keys(*(torch.from_numpy(rows).to(device),) * 2, metric) for device in ("cpu", "cuda")
    )
    row_P, id_P = torch.from_numpy(np.random.default_rng(0).integers(0, len(rows), (2, 100_000)))
    assert torch.equal(gpu.of_pairs(row_P.cuda(), id_P.cuda()).cpu(), cpu.of_pairs(row_P, id_P))
    values, ids = search_excluding_self(rows, rows, 1000, metric=metric, backend="torch-cpu")
    for numbers in (keys_module._BLOCK_NUMBERS["cuda"], 100 * len(rows)):
        monkeypatch.setitem(keys_module._BLOCK_NUMBERS, "cuda", numbers)
        for k in (1, 32, 1000):
            found_values, found_ids = search_excluding_self(
                rows, rows, k, metric=metric, backend="torch-gpu"
            )
            np.testing.assert_array_equal(found_ids, ids[:, :k])
            np.testing.assert_array_equal(found_values.view(np.int32), values[:, :k].view(np.int32))
    for position in (0, 999):
        np.testing.assert_array_equal(
            ranks_of(rows, rows, ids[:, position], metric=metric), position + 1
        )
