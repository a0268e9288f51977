"""Who queries and who is searched, among the images of a split.

Shapes: N images of the split, Q queries, G items searched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from namr_dist.data.shardset.manifest import ROLES
from namr_dist.errors import InputError
from namr_dist.retrieval.arrays import Int64, as_labels

_QUERY, _GALLERY = ROLES.index("query"), ROLES.index("gallery")


@dataclass(frozen=True, kw_only=True)
class Division:
    """Indices in the split, ascending. An image of role "" is on both sides."""

    query_Q: Int64
    item_G: Int64
    own_Q: Int64
    """each query's index among the items, −1 where it is not one of them"""

    @property
    def leave_one_out(self) -> bool:
        """Every image is both: each searches all the others."""
        return len(self.query_Q) == len(self.item_G) == int((self.own_Q >= 0).sum())

    def __str__(self) -> str:
        if self.leave_one_out:
            return (
                f"leave one out: each of {len(self.query_Q):,} images searches all the others; its own index is "
                "left out, not its first hit"
            )
        both = int((self.own_Q >= 0).sum())
        return f"{len(self.query_Q):,} queries search {len(self.item_G):,} gallery images" + (
            f"; {both:,} images are both, and of those the own index is left out" if both else ""
        )


def divide(roles_N: Any | None, count: int, name: str = "the images") -> Division:
    """Divide `count` images by their roles (N,), integers that count in manifest.ROLES; None: all
    are both.

    Raises InputError, naming `name`, where nothing is left to query or to be searched.
    """
    if roles_N is None:
        every = np.arange(count)
        return Division(query_Q=every, item_G=every, own_Q=every)
    roles = as_labels(roles_N, count, f"roles of {name}")
    if count and not 0 <= roles.min() <= roles.max() < len(ROLES):
        raise InputError(
            f"roles of {name}: {roles.min()}..{roles.max()} leaves 0..{len(ROLES) - 1}; evaluate the run "
            "again"
        )
    for only, missing in ((_QUERY, "gallery"), (_GALLERY, "query")):
        if (roles == only).all():
            raise InputError(
                f"{name} has {ROLES[only]} images only; rebuild the shard set with its {missing} images "
                "in the same split"
            )
    searched_N = roles != _QUERY
    query_Q = np.flatnonzero(roles != _GALLERY)
    index_N = np.where(searched_N, np.cumsum(searched_N) - 1, -1)
    return Division(query_Q=query_Q, item_G=np.flatnonzero(searched_N), own_Q=index_N[query_Q])
