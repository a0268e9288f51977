"""Exact searches of one gallery by all ranks: each searches its share of the items for all queries,
and the lists are merged.

Shapes: Q queries, N items, D width, K neighbours asked for. Every result is that of search.py for
the whole gallery, bit for bit, on every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import rank_number, world_size
from namr_dist.retrieval.arrays import Float32, Int64, as_float32
from namr_dist.retrieval.keys import Metric
from namr_dist.retrieval.search import (
    checked_query_ids,
    counts_before,
    exact_values,
    merge,
    ranks_of,
    search_excluding_self,
)

_BLOCK_NUMBERS = 2**24
"""of lists that are exchanged and merged at a time, those of all ranks together"""


class Searcher:
    """Searches a gallery that every rank holds: with a group, on all its ranks, which make each
    call together with the same arguments; without, alone."""

    def __init__(self, host: HostGroup | None = None) -> None:
        self._host = host if world_size() > 1 else None

    def nearest(
        self,
        queries_QD: Any,
        items_ND: Any,
        k: int,
        *,
        query_ids_Q: Int64 | None = None,
        metric: Metric = "l2",
    ) -> tuple[Float32, Int64]:
        """As `search_excluding_self`."""
        if self._host is None:
            return search_excluding_self(
                queries_QD, items_ND, k, query_ids_Q=query_ids_Q, metric=metric
            )
        own_Q = checked_query_ids(query_ids_Q, len(queries_QD), len(items_ND))
        share = _share(len(items_ND))
        values_QK = np.full((len(own_Q), k), np.inf if metric == "l2" else -np.inf, np.float32)
        ids_QK = np.full((len(own_Q), k), -1)
        if share.stop > share.start:  # there may be fewer items than ranks
            values_QK, ids_QK = search_excluding_self(
                queries_QD, items_ND[share], k, query_ids_Q=_within(own_Q, share), metric=metric
            )
            ids_QK[ids_QK >= 0] += share.start
        rows = max(1, _BLOCK_NUMBERS // (k * world_size()))
        for start in range(0, len(own_Q), rows):
            block = slice(start, start + rows)
            parts = [
                [part.numpy() for part in self._host.gather(torch.from_numpy(list_BK))]
                for list_BK in (values_QK[block], ids_QK[block])
            ]
            values_QK[block], ids_QK[block] = merge(
                list(zip(*parts, strict=True)), k, metric=metric
            )
        return values_QK, ids_QK

    def ranks_of(
        self,
        queries_QD: Any,
        items_ND: Any,
        ids_Q: Int64,
        *,
        query_ids_Q: Int64 | None = None,
        metric: Metric = "l2",
    ) -> Int64:
        """As `search.ranks_of`."""
        if self._host is None:
            return ranks_of(queries_QD, items_ND, ids_Q, query_ids_Q=query_ids_Q, metric=metric)
        own_Q = checked_query_ids(query_ids_Q, len(queries_QD), len(items_ND))
        queries, items = as_float32(queries_QD, "queries"), as_float32(items_ND, "items")
        values_Q = exact_values(queries, items, np.asarray(ids_Q)[:, None], metric)[:, 0]
        share = _share(len(items))
        before_Q = np.zeros(len(queries), dtype=np.int64)
        if share.stop > share.start:
            before_Q = counts_before(
                queries,
                items[share],
                values_Q,
                np.asarray(ids_Q) - share.start,
                query_ids_Q=_within(own_Q, share),
                metric=metric,
            )
        ranks_Q: Int64 = 1 + self._host.total(torch.from_numpy(before_Q)).numpy()
        return ranks_Q


def _share(items: int) -> slice:
    """This rank's items."""
    rank, world = rank_number(), world_size()
    return slice(items * rank // world, items * (rank + 1) // world)


def _within(own_Q: Int64, share: slice) -> Int64:
    """(Q,) indices among the share's items; −1 for others."""
    inside_Q = (own_Q >= share.start) & (own_Q < share.stop)
    return np.where(inside_Q, own_Q - share.start, -1)
