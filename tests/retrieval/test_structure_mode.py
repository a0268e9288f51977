"""The structure mode: its order by the definition, through ordinary indexes, with its control."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import unit_rows
from namr_dist.retrieval.evaluate import evaluate, evaluate_sample, evaluate_structure
from namr_dist.retrieval.modes import STRUCTURE, Side
from namr_dist.retrieval.vectors import structure_products, structure_vectors


def data(count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, a third of which has a twin of another class with the same ρ, so that they tie; labels;
    γ ρ."""
    rng = np.random.default_rng(0)
    z_ND, bonus_N = rng.standard_normal((count, 4)), rng.integers(0, 8, count) / 4
    twins = rng.choice(count, (count // 6, 2), replace=False).T
    z_ND[twins[1]], bonus_N[twins[1]] = z_ND[twins[0]], bonus_N[twins[0]]
    return z_ND, np.arange(count) // 4, bonus_N


def order(z_QD: np.ndarray, z_ND: np.ndarray, bonus_N: np.ndarray) -> np.ndarray:
    """By the definition, ties by the lowest index."""
    squared_QN = ((z_QD[:, None] - z_ND) ** 2).sum(2) - bonus_N
    return np.argsort(squared_QN.round(9), axis=1, kind="stable")


def test_vectors_give_the_distances_of_the_definition() -> None:
    z_ND, _, bonus_N = data()
    served = structure_vectors(z_ND[:9], z_ND, bonus_N, limit=3.0)
    values_QN = ((served.queries_QV[:, None] - served.items_NV) ** 2).sum(2)
    squared_QN = ((z_ND[:9, None] - z_ND) ** 2).sum(2) - bonus_N
    np.testing.assert_allclose(served.squared_distances(values_QN), squared_QN, atol=1e-4)
    unit_ND = unit_rows(z_ND)
    served = structure_products(unit_ND[:9], unit_ND, bonus_N)
    values_QN = served.queries_QV @ served.items_NV.T
    squared_QN = ((unit_ND[:9, None] - unit_ND) ** 2).sum(2) - bonus_N
    np.testing.assert_allclose(served.squared_distances(values_QN), squared_QN, atol=1e-5)


@pytest.mark.parametrize("form", ["l2", "ip"])
def test_flat_indexes_of_faiss_return_the_order(form: str) -> None:
    rng = np.random.default_rng(1)
    z_ND = unit_rows(rng.standard_normal((200, 16)))
    bonus_N = rng.random(200)
    if form == "l2":
        served, index = structure_vectors(z_ND, z_ND, bonus_N, limit=1.0), faiss.IndexFlatL2(17)
    else:
        served, index = structure_products(z_ND, z_ND, bonus_N), faiss.IndexFlatIP(17)
    index.add(served.items_NV)
    found_QK = index.search(served.queries_QV, 20)[1]
    want_QN = order(z_ND, z_ND, bonus_N)
    assert (found_QK == want_QN[:, :20]).mean() > 0.999


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_figures_are_those_of_the_definition(distance: str) -> None:
    z_ND, labels_N, bonus_N = data()
    metrics = evaluate(
        z_ND, None, labels_N, delta=0.5, bonus_N=bonus_N, distance=distance, clustering=False
    )
    assert set(metrics["test"]) == {"sample", "structure", "structure_shuffled", "calibrated"}
    x_ND = unit_rows(z_ND) if distance == "cosine" else z_ND
    for row, gamma in (("sample", 0.0), ("structure", 1.0)):
        right = []
        for query, ranked_N in enumerate(order(x_ND, x_ND, gamma * bonus_N)):
            first = ranked_N[ranked_N != query][0]
            right.append(labels_N[first] == labels_N[query])
        assert metrics["test"][row]["R@1"] == pytest.approx(100 * np.mean(right))
        by_class = metrics["test_classes"][row]["R@1"]
        assert by_class == pytest.approx(
            [100 * np.mean(right[first : first + 4]) for first in range(0, 60, 4)], abs=1e-3
        )
    assert metrics["test_classes"]["queries"] == [4] * 15


def test_the_control_is_the_mode_with_rho_of_another_image() -> None:
    z_ND, labels_N, bonus_N = data()
    shuffled = evaluate(z_ND, None, labels_N, delta=0.5, bonus_N=bonus_N, seed=3, clustering=False)
    order_N = np.random.default_rng(3).permutation(len(bonus_N))
    by_hand = evaluate(z_ND, None, labels_N, delta=0.5, bonus_N=bonus_N[order_N], clustering=False)
    assert shuffled["test"]["structure_shuffled"] == by_hand["test"]["structure"]
    assert shuffled["test"]["structure_shuffled"] != shuffled["test"]["structure"]


def test_each_gamma_is_measured_and_none_is_the_plain_search() -> None:
    z_ND, labels_N, rho_N = data()
    figures = evaluate_structure(z_ND, rho_N, labels_N, gammas=(0.0, 0.5), ks=(1, 2))
    assert figures[0.0] == evaluate_sample(z_ND, labels_N, ks=(1, 2))
    whole = evaluate(
        z_ND, None, labels_N, delta=0.5, ks=(1, 2), bonus_N=0.5 * rho_N, clustering=False
    )
    assert figures[0.5] == whole["test"]["structure"]


def test_bad_values_are_named() -> None:
    z_ND, _, bonus_N = data()
    with pytest.raises(InputError, match=r"60 numbers are needed.*shape \(59,\)"):
        Side.of(z_ND, bonus_N=bonus_N[1:], distance="euclidean", name="test")
    with pytest.raises(InputError, match="-0.5 is negative"):
        structure_vectors(z_ND, z_ND, bonus_N - 0.5, limit=9)
    with pytest.raises(InputError, match=r"1\.75 is above the limit, 1; clamp it"):
        structure_vectors(z_ND, z_ND, bonus_N, limit=1)
    with pytest.raises(InputError, match="a row has length .*take structure_vectors"):
        structure_products(z_ND, z_ND, bonus_N)
    assert not STRUCTURE.can_serve(Side.of(z_ND, distance="euclidean", name="test"))
