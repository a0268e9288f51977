"""A gallery that four ranks search in parts: the arrays of one search of all, ties included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.pool import Ranks
from namr_dist.retrieval import over_ranks
from namr_dist.retrieval.over_ranks import Searcher
from namr_dist.retrieval.search import ranks_of, search_excluding_self

pytestmark = pytest.mark.dist


def on_a_rank(queries: Any, items: Any, own: Any, ids: Any, k: int, metric: Any) -> list[Any]:
    over_ranks._BLOCK_NUMBERS = 4 * k * 7  # lists of seven queries at a time
    searcher = Searcher(HostGroup())
    return [
        *searcher.nearest(queries, items, k, query_ids_Q=own, metric=metric),
        searcher.ranks_of(queries, items, ids, query_ids_Q=own, metric=metric),
    ]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(("items", "k"), [(41, 9), (41, 60), (3, 2)])
def test_parts_make_up_the_whole(four_ranks: Ranks, metric: Any, items: int, k: int) -> None:
    """Of three distinct rows each, so most are ties, across the parts too; three items leave one
    rank with none; more neighbours may be asked for than there are."""
    rng = np.random.default_rng(items)
    rows_ND = rng.standard_normal((3, 5))[rng.integers(3, size=items)]
    queries_QD = np.concatenate([rows_ND, rng.standard_normal((10, 5))])
    own_Q = np.concatenate([np.arange(items), np.full(10, -1)])
    ids_Q = (own_Q + 1 + rng.integers(items - 1, size=len(own_Q))) % items
    expected = [
        *search_excluding_self(queries_QD, rows_ND, k, query_ids_Q=own_Q, metric=metric),
        ranks_of(queries_QD, rows_ND, ids_Q, query_ids_Q=own_Q, metric=metric),
    ]
    for found in four_ranks(on_a_rank, queries_QD, rows_ND, own_Q, ids_Q, k, metric):
        for ours, alone in zip(found, expected, strict=True):
            assert ours.dtype == alone.dtype and (ours == alone).all()
    # The definition, for the ranks: nearer ones, and equal ones with a lower index.
    rows, query = rows_ND.astype(np.float32).astype(np.float64), 0
    value_N = ((rows - rows[query]) ** 2).sum(1) if metric == "l2" else -(rows * rows[query]).sum(1)
    order = [i for i in np.lexsort((np.arange(items), value_N.astype(np.float32))) if i != query]
    assert expected[2][query] == 1 + order.index(ids_Q[query])
