"""Every retrieval mode in every type of index, compared with its definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_items import (
    MODES,
    defined,
    densities,
    embeddings,
    gallery_of,
    items,
    nearest,
    reranked,
    rows,
)

from namr_dist.errors import InputError
from namr_dist.gallery.engine import TYPES, SearchSettings

ITEMS, QUERIES, K = 400, 30, 10
THOROUGH = SearchSettings(ef_search=2 * ITEMS, nprobe=ITEMS, candidates=ITEMS)


def _both(mode: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Queries, some of them items, and items, some of them twice."""
    queries, stored = (
        rows(count, MODES[mode], seed=seed) for count, seed in ((QUERIES, 1), (ITEMS, 2))
    )
    for column in stored:
        column[200:220] = column[:20]
    for asked, column in zip(queries, stored, strict=True):
        asked[:15] = column[:15]
    return queries, stored


def _expected(
    mode: str,
    queries: tuple[np.ndarray, np.ndarray],
    stored: tuple[np.ndarray, np.ndarray],
    candidates: int,
) -> np.ndarray:
    if mode == "rerank":
        return reranked(queries, stored, K, candidates)
    return nearest(defined(mode, queries, stored), K)


@pytest.mark.parametrize("mode", MODES)
def test_flat_gives_the_order_of_the_definition(mode: str) -> None:
    """Ties too: copies of an item follow it."""
    queries, stored = _both(mode)
    gallery = gallery_of(*stored, MODES[mode], mode=mode)
    squared_QK, ids_QK = gallery.nearest(*queries, K)
    np.testing.assert_array_equal(ids_QK, _expected(mode, queries, stored, 100))
    expected_QK = np.take_along_axis(defined(mode, queries, stored), ids_QK, 1)
    np.testing.assert_allclose(squared_QK, expected_QK, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_items_nearer_to_one_another_than_faiss_can_tell(mode: str) -> None:
    """Half of them in a clump so tight that it is one point once the items' mean is taken off in
    fp32: in which order faiss finds it says nothing."""
    queries, stored = _both(mode)
    rng = np.random.default_rng(3)
    stored[0][200:] += 50
    for z, count in ((stored[0], 200), (queries[0], QUERIES)):
        z[:count] = 1e-7 * rng.standard_normal((count, z.shape[1]))
    gallery = gallery_of(*stored, MODES[mode], mode=mode)
    _, ids_QK = gallery.nearest(*queries, K)
    expected_QK = _expected(mode, queries, stored, 100)
    if mode == "calibrated":  # densities are of rows in fp32
        density_N = gallery.side(np.arange(ITEMS)).density
        expected_QK = nearest(defined(mode, queries, stored, density_N=density_N), K)
    np.testing.assert_array_equal(ids_QK, expected_QK)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "flat"])
def test_a_type_that_looks_at_everything_finds_all(mode: str, kind: str) -> None:
    """sq8 and fp16 compare rounded vectors: what they miss lies at nearly the same distance."""
    queries, stored = _both(mode)
    gallery = gallery_of(*stored, MODES[mode], mode=mode, type=kind)
    squared_QK, ids_QK = gallery.nearest(*queries, K, settings=THOROUGH)
    expected_QK = _expected(mode, queries, stored, ITEMS)
    if kind not in ("sq8", "fp16"):
        np.testing.assert_array_equal(ids_QK, expected_QK)
    same = (ids_QK[:, :, None] == expected_QK[:, None]).any(2)
    assert same.mean() > 0.99
    assert (np.diff(squared_QK, axis=1) >= 0).all()


def test_an_index_of_few_cells_misses_items() -> None:
    """What the test above could not tell from one that ignores its settings."""
    queries, stored = _both("sample")
    gallery = gallery_of(*stored, MODES["sample"], mode="sample", type="ivf")
    settings = SearchSettings(nprobe=1)
    _, ids_QK = gallery.nearest(*queries, K, settings=settings)
    assert (ids_QK != _expected("sample", queries, stored, 100)).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_items_that_are_added_move_no_other(mode: str, kind: str) -> None:
    _, (z_ND, s_NE) = _both(mode)
    gallery = gallery_of(z_ND[:300], s_NE[:300], MODES[mode], mode=mode, type=kind)
    before_NV = gallery.vectors(np.arange(300))
    gallery.add(embeddings(z_ND[300:], s_NE[300:]), items(100, first=300))
    np.testing.assert_array_equal(gallery.vectors(np.arange(300)), before_NV)
    gallery.remove([f"{number:05d}.jpg" for number in range(50)])
    np.testing.assert_array_equal(gallery.vectors(np.arange(250)), before_NV[50:])
    if kind == "flat":  # what faiss itself holds
        held_NV = gallery.engine.index.reconstruct_n(0, 250)
        np.testing.assert_array_equal(held_NV, before_NV[50:])


@pytest.mark.parametrize("mode", MODES)
def test_search_after_items_came_and_went(mode: str) -> None:
    """In the calibrated mode, an item's density is that of the day it was added."""
    queries, (z_ND, s_NE) = _both(mode)
    gallery = gallery_of(z_ND[:300], s_NE[:300], MODES[mode], mode=mode)
    gallery.add(embeddings(z_ND[300:], s_NE[300:]), items(100, first=300))
    gallery.remove([f"{number:05d}.jpg" for number in range(50)])
    _, ids_QK = gallery.nearest(*queries, K)
    wide_ND = z_ND.astype(np.float64)
    density_N = np.concatenate(
        [densities(wide_ND[:300], wide_ND[:300]), densities(wide_ND[300:], wide_ND)]
    )
    stored = (z_ND[50:], s_NE[50:])
    if mode == "calibrated":
        expected_QK = nearest(defined(mode, queries, stored, density_N=density_N[50:]), K)
        moved_QK = nearest(defined(mode, queries, stored), K)
        assert (expected_QK != moved_QK).any()  # the densities of today would give another order
    else:
        expected_QK = _expected(mode, queries, stored, 100)
    np.testing.assert_array_equal(ids_QK, expected_QK)


@pytest.mark.parametrize("mode", ["adaptive", "symmetric", "calibrated"])
def test_items_beyond_the_limit_are_refused(mode: str) -> None:
    """And the index stays as it was."""
    queries, stored = _both(mode)
    gallery = gallery_of(*stored, MODES[mode], mode=mode)
    before = gallery.nearest(*queries, K)
    z_ND, s_NE = rows(3, MODES[mode], seed=5)
    z_ND[1] += 100
    with pytest.raises(InputError, match=rf"1 of 3 items lie beyond .* mode {mode}"):
        gallery.add(embeddings(z_ND, s_NE), items(3, first=ITEMS))
    assert len(gallery) == len(gallery.engine) == ITEMS
    for one, other in zip(gallery.nearest(*queries, K), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rebuilt_in_another_type_keeps_items_and_vectors() -> None:
    queries, stored = _both("calibrated")
    gallery = gallery_of(*stored, MODES["calibrated"], mode="calibrated")
    some_M = np.arange(ITEMS)[::-1][:300]
    other = gallery.rebuilt(some_M, "hnsw")
    assert other.type == "hnsw" and other.items.ids == tuple(
        gallery.items.ids[position] for position in some_M
    )
    np.testing.assert_array_equal(other.vectors(np.arange(300)), gallery.vectors(some_M))
    density_N = densities(stored[0].astype(np.float64), stored[0].astype(np.float64))
    expected_QK = nearest(
        defined(
            "calibrated",
            queries,
            (stored[0][some_M], stored[1][some_M]),
            density_N=density_N[some_M],
        ),
        K,
    )
    _, ids_QK = other.nearest(*queries, K, settings=THOROUGH)
    np.testing.assert_array_equal(ids_QK, expected_QK)
