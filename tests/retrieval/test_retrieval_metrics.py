"""Metrics against plain loops and against pytorch-metric-learning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans

from namr_dist.errors import InputError
from namr_dist.retrieval.evaluate import evaluate_sample
from namr_dist.retrieval.metrics import clustering_scores, relevant_counts, retrieval_scores
from namr_dist.retrieval.search import search_excluding_self


def clusters(
    seed: int, *, sizes: list[int], width: int = 10, noise: float = 1.1
) -> tuple[np.ndarray, np.ndarray]:
    """Points around class centres in random order, with so many images in each class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)) * 3 + 5, sizes)
    centres = rng.standard_normal((len(sizes), width))
    z = centres[(labels - 5) // 3] + noise * rng.standard_normal((len(labels), width))
    order = rng.permutation(len(labels))
    return z[order].astype(np.float32), labels[order]


def by_loops(ranked, query_labels, item_labels, own, ks):
    """The definitions, one query and one rank at a time."""
    totals = {f"R@{k}": 0.0 for k in ks} | {"MAP@R": 0.0, "R-precision": 0.0}
    counted = 0
    for query, label in enumerate(query_labels):
        relevant = sum(
            1 for i, other in enumerate(item_labels) if other == label and i != own[query]
        )
        if relevant == 0:
            continue
        counted += 1
        hits = [i >= 0 and item_labels[i] == label for i in ranked[query]]
        for k in ks:
            totals[f"R@{k}"] += any(hits[:k])
        totals["R-precision"] += sum(hits[:relevant]) / relevant
        totals["MAP@R"] += (
            sum(sum(hits[: i + 1]) / (i + 1) for i in range(relevant) if hits[i]) / relevant
        )
    return {name: 100 * total / counted for name, total in totals.items()}, counted


@pytest.mark.parametrize("sizes", [[6] * 20, [1, 2, 3, 9, 1, 30, 4, 1], [2] * 5, [40]])
def test_equals_loops(sizes):
    z, labels = clusters(1, sizes=sizes)
    k = max(8, max(sizes) - 1)
    ranked = search_excluding_self(z, z, k)[1]
    scores = retrieval_scores(ranked, labels, labels)
    expected, counted = by_loops(ranked, labels, labels, np.arange(len(z)), (1, 2, 4, 8))
    assert scores.percent == pytest.approx(expected, abs=1e-10)
    assert scores.queries == counted and scores.left_out == sizes.count(1)


def test_equals_pytorch_metric_learning():
    z, labels = clusters(2, sizes=[3, 8, 5, 6, 6, 6, 2, 12, 7])

    def same_clusters(x, count):
        return torch.from_numpy(KMeans(count, n_init=1, random_state=3).fit_predict(x.numpy()))

    oracle = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision", "NMI", "AMI"),
        k="max_bin_count",
        device=torch.device("cpu"),
        kmeans_func=same_clusters,
    ).get_accuracy(torch.from_numpy(z), torch.from_numpy(labels))
    scores = retrieval_scores(search_excluding_self(z, z, 11)[1], labels, labels).percent
    assert scores["R@1"] == pytest.approx(100 * oracle["precision_at_1"], abs=1e-4)
    assert scores["MAP@R"] == pytest.approx(100 * oracle["mean_average_precision_at_r"], abs=1e-4)
    assert scores["R-precision"] == pytest.approx(100 * oracle["r_precision"], abs=1e-4)
    agreement = clustering_scores(z, labels, seed=3)
    assert agreement.engine == "sklearn" and agreement.clusters == 9
    assert agreement.percent["NMI"] == pytest.approx(100 * oracle["NMI"], abs=1e-4)
    assert agreement.percent["AMI"] == pytest.approx(100 * oracle["AMI"], abs=1e-4)


def test_a_case_by_hand():
    # Classes a a a b b c; R of query 0 is 2; hits at ranks 1 and 3 of which only rank 1 counts.
    labels = np.array([0, 0, 0, 1, 1, 2])
    ranked = np.array([[1, 3, 2], [3, 0, 2], [3, 4, 5], [4, 0, 1], [0, 3, 1], [0, 1, 2]])
    scores = retrieval_scores(ranked, labels, labels, ks=(1, 2))
    assert scores.queries == 5 and scores.left_out == 1
    assert scores.percent["R@1"] == pytest.approx(100 * 2 / 5)
    assert scores.percent["R@2"] == pytest.approx(100 * 4 / 5)
    # query 0: P(1) = 1 of R = 2; query 1: rank 2 of 2; query 2: none; query 3: rank 1 of 1; query
    # 4: none
    assert scores.percent["R-precision"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 0 + 1 + 0) / 5)
    assert scores.percent["MAP@R"] == pytest.approx(100 * (1 / 2 + 0.5 / 2 + 0 + 1 + 0) / 5)


def further_by_loops(ranked, labels, own, k):
    """mAP@k, precision@k and MRR by their definitions, in Python's float64."""
    sums, counted = [0.0, 0.0, 0.0], 0
    for query, label in enumerate(labels):
        relevant = sum(other == label for other in labels) - 1
        if not relevant:
            continue
        counted += 1
        hits = [i >= 0 and i != own[query] and labels[i] == label for i in ranked[query]]
        found = sum(hits[:k])
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(min(k, len(hits))) if hits[i]]
        sums[0] += sum(precisions) / found if found else 0.0
        sums[1] += found / min(k, relevant)
        sums[2] += 1 / (hits.index(True) + 1)
    names = (f"mAP@{k}", f"precision@{k}", "MRR")
    return {name: 100 * total / counted for name, total in zip(names, sums, strict=True)}


@pytest.mark.parametrize("sizes", [[6] * 20, [1, 2, 3, 9, 1, 30, 4, 1], [40]])
def test_further_metrics_equal_loops(sizes):
    z, labels = clusters(8, sizes=sizes, noise=2.5)
    ranked = search_excluding_self(z, z, len(z) - 1)[1]
    for k in (1, 5, 12, 200):
        also = (f"mAP@{k}", f"precision@{k}", "MRR")
        filled = np.pad(ranked, ((0, 0), (0, 200)), constant_values=-1)
        scores = retrieval_scores(filled, labels, labels, also=also).percent
        expected = further_by_loops(ranked, labels, np.arange(len(z)), k)
        assert {name: scores[name] for name in also} == pytest.approx(expected, abs=1e-10)
        assert list(scores)[-3:] == list(also)
        # Lists that end at the largest R: the first right item is beyond some of them.
        short = evaluate_sample(z, labels, ks=(1,), also=also)
        assert {name: short[name] for name in also} == pytest.approx(expected, abs=1e-10)


def test_further_metrics_by_hand():
    """OML's mAP@k divides by the right items that it found, not by those that there are."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    ranked = np.array([[4, 1, 5], [0, 4, 2], [4, 5, 0], [4, 5, 1], [0, 1, 2], [4, 0, 1]])
    scores = retrieval_scores(
        ranked, labels, labels, ks=(1,), also=("mAP@3", "precision@3"), first_right_Q=np.ones(6)
    ).percent
    assert scores["mAP@3"] == pytest.approx(
        100 * (1 / 2 + (1 + 2 / 3) / 2 + 1 / 3 + 1 / 3 + 0 + 1) / 6
    )
    assert scores["precision@3"] == pytest.approx(100 * (1 / 3 + 2 / 3 + 1 / 3 + 1 / 3 + 0 + 1) / 6)


def test_further_metrics_that_cannot_be_are_named():
    ranked = np.array([[1], [0], [1]])
    for name in ("map@5", "mAP@0", "mAP", "MRR@3", 5):
        with pytest.raises(InputError, match="is no further metric; take mAP@k"):
            retrieval_scores(ranked, [0, 0, 0], [0, 0, 0], also=(name,))
    with pytest.raises(InputError, match="search with k = 7"):
        retrieval_scores(ranked, [0, 1, 0], [0, 1, 0], ks=(1,), also=("mAP@7",))
    with pytest.raises(InputError, match="give first_right_Q"):
        retrieval_scores(ranked, [0, 1, 0], [0, 1, 0], ks=(1,), also=("MRR",))


def test_duplicates_of_another_class_count_against():
    """Two classes at the very same points: ties go by index, and nothing is dropped for free."""
    z = np.zeros((6, 4))
    labels = np.array([0, 1, 0, 1, 0, 1])
    ranked = search_excluding_self(z, z, 5)[1]
    assert ranked[0].tolist() == [1, 2, 3, 4, 5] and ranked[3].tolist() == [0, 1, 2, 4, 5]
    scores = retrieval_scores(ranked, labels, labels, ks=(1, 2))
    expected, _ = by_loops(ranked, labels, labels, np.arange(6), (1, 2))
    assert scores.percent == pytest.approx(expected)


def test_a_gallery_of_its_own():
    z, labels = clusters(4, sizes=[5] * 12)
    queries, query_labels, items, item_labels = z[:20], labels[:20], z[20:], labels[20:]
    own = np.full(20, -1)
    ranked = search_excluding_self(queries, items, 10, query_ids_Q=own)[1]
    scores = retrieval_scores(ranked, query_labels, item_labels, ks=(1, 10), query_ids_Q=own)
    expected, counted = by_loops(ranked, query_labels, item_labels, own, (1, 10))
    assert scores.percent == pytest.approx(expected) and scores.queries == counted
    assert scores.left_out == sum(label not in item_labels for label in query_labels)


def test_nothing_to_find():
    z, labels = clusters(5, sizes=[1] * 6)
    scores = retrieval_scores(search_excluding_self(z, z, 8)[1], labels, labels)
    assert (
        scores.queries == 0
        and scores.left_out == 6
        and all(np.isnan(v) for v in scores.percent.values())
    )


def test_fewer_items_than_the_cut_off():
    z, labels = clusters(6, sizes=[2, 2])
    scores = retrieval_scores(search_excluding_self(z, z, 8)[1], labels, labels)
    assert scores.percent["R@4"] == scores.percent["R@8"] == 100


@pytest.mark.parametrize("engine", ["sklearn", "faiss"])
def test_clustering_finds_clear_clusters_and_repeats(engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    z, labels = clusters(7, sizes=[25] * 4, noise=0.01)
    scores = clustering_scores(z, labels, seed=1, engine=engine)
    assert scores == clustering_scores(z, labels, seed=1, engine=engine)
    if engine == "sklearn":
        assert scores.percent == pytest.approx({"NMI": 100, "AMI": 100})
    noise = np.random.default_rng(0).standard_normal((100, 8))
    assert abs(clustering_scores(noise, labels, seed=1, engine=engine).percent["AMI"]) < 12


def test_too_few_neighbours_and_wrong_labels_are_named():
    ranked = np.zeros((3, 2), dtype=np.int64)
    with pytest.raises(InputError, match="search with k = 4"):
        retrieval_scores(ranked, [0, 0, 0], [0, 0, 0], ks=(1, 4))
    with pytest.raises(InputError, match="3 integers"):
        retrieval_scores(ranked, [0.5, 0, 0], [0, 0, 0], ks=(1, 2))
    with pytest.raises(InputError, match="its own item 2 has label 7"):
        relevant_counts([0, 0, 0], [0, 0, 7])
