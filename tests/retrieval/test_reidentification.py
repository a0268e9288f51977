"""CMC and mAP of random galleries: by hand, by loops over a full sort, and with ties."""

from __future__ import annotations

import numpy as np
import pytest
from test_retrieval_metrics import clusters

from namr_dist.errors import InputError
from namr_dist.retrieval import reidentification
from namr_dist.retrieval.reidentification import METRICS, reidentify


def by_loops(z, s, labels, draws, mode):
    """The definition, one draw, one query and one gallery image at a time."""
    z, s = z.astype(np.float64), s.astype(np.float64)
    rows = []
    for gallery in draws:
        ranks = []
        for query in range(len(z)):
            if query in gallery:
                continue
            squares = (z[query] - z[gallery]) ** 2
            weights = {
                "sample": np.ones_like(squares),
                "adaptive": s[query],
                "symmetric": s[query] + s[gallery],
            }[mode]
            ranked = labels[gallery][
                np.argsort((weights * squares).sum(-1), kind="stable")
            ].tolist()
            ranks.append(ranked.index(labels[query]) + 1)
        rows.append(
            [
                100 * np.mean([rank <= 1 for rank in ranks]),
                100 * np.mean([rank <= 5 for rank in ranks]),
                100 * np.mean([1 / rank for rank in ranks]),
            ]
        )
    figures = dict(zip(METRICS, np.mean(rows, axis=0), strict=True))
    return figures | {
        f"{name} std": value for name, value in zip(METRICS, np.std(rows, axis=0), strict=True)
    }


def galleries(labels, draws, seed):
    """What the module draws."""
    return [
        reidentification._draw(labels, np.random.default_rng([seed, draw]))[1]
        for draw in range(draws)
    ]


def test_equals_loops():
    z, labels = clusters(30, sizes=[6, 2, 1, 9, 4, 1, 3, 5, 7, 2, 2, 8], noise=1.5)
    s = np.random.default_rng(30).uniform(0.5, 1.5, z.shape).astype(np.float32)
    block = reidentify(z, s, labels, draws=4, seed=9)
    counts = [block[name] for name in ("draws", "seed", "gallery", "queries", "gallery_only")]
    assert counts == [4, 9, 12, 38, 2]
    drawn = galleries(labels, 4, 9)
    for mode in ("sample", "adaptive", "symmetric"):
        expected = by_loops(z, s, labels, drawn, mode)
        assert block["modes"][mode] == pytest.approx(expected, abs=1e-9), mode
        assert block["modes"][mode]["CMC@1 std"] > 0
    for control in ("adaptive_s1", "symmetric_s1"):
        assert block["modes"][control] == pytest.approx(block["modes"]["sample"])
    assert block["modes"]["calibrated"] != block["modes"]["sample"]
    assert reidentify(z, s, labels, draws=4, seed=9) == block
    assert set(reidentify(z, None, labels, draws=1, seed=9)["modes"]) == {"sample", "calibrated"}


def test_draws_are_one_image_of_each_class_each_as_likely_as_another():
    labels = np.random.default_rng(31).permutation(np.repeat([4, 9, 2], [3, 1, 5]))
    drawn = galleries(labels, 3000, 0)
    for gallery in drawn:
        assert sorted(labels[gallery].tolist()) == [2, 4, 9] and (np.diff(gallery) > 0).all()
    counts = np.bincount(np.concatenate(drawn), minlength=9)
    for position, label in enumerate(labels):
        assert counts[position] == pytest.approx(3000 / {4: 3, 9: 1, 2: 5}[label], rel=0.15)


def test_a_case_by_hand():
    """Two images a class on a line, mirrored, so that every draw gives the same ranks: 0 finds 0,
    10 and 11 mix."""
    z = np.array([[0.0], [0.0], [10.0], [10.0], [20.0], [20.0]])
    labels = np.array([0, 0, 1, 1, 2, 2])
    right = reidentify(z, None, labels, draws=3, seed=0)["modes"]["sample"]
    assert [right[name] for name in METRICS] == [100, 100, 100] and right["mAP std"] == 0
    # Classes 0 and 1 have changed one image each: whichever is drawn, both queries find the other
    # class first.
    z = np.array([[0.0], [10.0], [10.5], [0.5], [99.0], [99.0]])
    wrong = {
        tuple(gallery): reidentify(z, None, labels, draws=1, seed=seed)["modes"]["sample"]
        for seed in range(40)
        for gallery in galleries(labels, 1, seed)
    }
    # Gallery 0 and 10.5: 10 finds 10.5 first, then its own at 0; 0.5 likewise: rank 2 each.
    assert [wrong[0, 2, 4][name] for name in METRICS] == pytest.approx(
        [100 / 3, 100, 100 * (1 / 2 + 1 / 2 + 1) / 3]
    )
    # Gallery 0 and 0.5: 10 finds 0.5 first, its own at rank 2; 10.5 finds 0.5, its own, first.
    assert [wrong[0, 3, 4][name] for name in METRICS] == pytest.approx(
        [200 / 3, 100, 100 * (1 / 2 + 1 + 1) / 3]
    )


def test_ties_go_to_the_image_that_comes_first():
    """All at one point: the class whose gallery image stands first is found by everybody."""
    labels = np.array([7, 7, 3, 3, 5, 5])
    figures = reidentify(np.ones((6, 4)), None, labels, draws=5, seed=1)["modes"]["sample"]
    assert [figures[name] for name in METRICS] == pytest.approx(
        [100 / 3, 100, 100 * (1 + 1 / 2 + 1 / 3) / 3]
    )


def test_bad_input_is_named():
    z, labels = clusters(32, sizes=[1] * 4)
    with pytest.raises(InputError, match="no class has two images.*reidentification_draws to 0"):
        reidentify(z, None, labels, draws=2, seed=0)
    with pytest.raises(InputError, match="draws = 0"):
        reidentify(z, None, labels, draws=0, seed=0)
    with pytest.raises(InputError, match="4 integers"):
        reidentify(z, None, labels[:3], draws=1, seed=0)
