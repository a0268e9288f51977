"""`namr bench search`: its rows, and that a wrong list is told."""

from __future__ import annotations

import csv
import importlib.util
import json

import numpy as np
import pytest

from namr_dist.bench.search import Case, clustered_rows, timed
from namr_dist.retrieval.search import search_backend, usable_backends

HAS_FAISS = importlib.util.find_spec("faiss") is not None


def test_rows_lie_in_clusters_of_five_with_a_duplicate_in_every_tenth_class():
    rows, labels = clustered_rows(200, 16, seed=1)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.unique(labels, return_counts=True)[1].tolist() == [5] * 40
    first, second = np.nonzero(np.triu((rows[:, None] == rows).all(-1), 1))
    assert len(first) == 4 and labels[first].tolist() == labels[second].tolist()
    own = (rows @ rows.T)[labels[:, None] == labels].mean()
    assert own > 0.6 > 0.1 > (rows @ rows.T)[labels[:, None] != labels].mean()


def test_every_back_end_is_measured_beside_the_witnesses(forked_namr, tmp_path):
    table = tmp_path / "search.csv"
    done = forked_namr(
        "bench",
        "search",
        "--items",
        300,
        "--queries",
        120,
        "--width",
        16,
        "-k",
        4,
        20,
        "--repeats",
        2,
        "--json",
        "--csv",
        table,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    exact = [*usable_backends(), f"{search_backend().name}, with metrics"]
    witnesses = ["matmul + topk"] + ["IndexFlatL2"] * HAS_FAISS
    assert [(row["k"], row["provider"]) for row in rows] == [
        (k, name) for k in (4, 20) for name in exact + witnesses
    ]
    for row in rows:
        assert (row["queries"], row["items"], row["width"], row["repeats"]) == (120, 300, 16, 2)
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        witness = row["provider"] in witnesses
        assert row["agrees"] == ("witness" if witness else "yes")
        assert 90 < row["same_percent"] <= 100 and (witness or row["same_percent"] == 100)
        assert row["commit"] and row["torch"] and (row["faiss"] != "none") == HAS_FAISS
    with table.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["provider"] for row in written] == [row["provider"] for row in rows]
    assert [float(row["median_s"]) for row in written] == [row["median_s"] for row in rows]


def test_one_wrong_index_is_told():
    right = np.arange(20).reshape(5, 4)
    wrong = right.copy()
    wrong[2, 1] = 0
    case = Case(queries=5, items=20, width=3, k=4)
    rows = timed(
        case,
        {"torch-cpu": lambda: right, "faiss-cpu": lambda: wrong},
        {"matmul + topk": lambda: wrong},
        repeats=1,
    )
    assert [(row.agrees, row.same_percent) for row in rows] == [
        ("yes", 100),
        ("no", 95),
        ("witness", 95),
    ]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--repeats", 0], "--repeats is 0"),
        (["--items", 10, "--queries", 11], "--queries 11"),
        (["--items", 10, "-k", 10], "-k from 4 to 9"),
        (["--backends", "magic"], "--backends has magic"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_line(forked_namr, options, part):
    done = forked_namr("bench", "search", *options)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1
