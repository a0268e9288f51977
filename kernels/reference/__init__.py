"""What every op of this package computes, in plain PyTorch.

`losses.py` defines the ops, each under its public name, by the distances of `pairs.py` and the
choices of `mining.py`.
"""

from .losses import (
    margin_loss,
    mean_pairwise_distance,
    multi_cluster_ranking,
    multi_similarity_loss,
    nearest_centres,
    proxy_anchor_loss,
    triplet_loss,
)
from .pairs import pairwise_distance, pairwise_squared_distance, unit_rows

__all__ = [
    "margin_loss",
    "mean_pairwise_distance",
    "multi_cluster_ranking",
    "multi_similarity_loss",
    "nearest_centres",
    "pairwise_distance",
    "pairwise_squared_distance",
    "proxy_anchor_loss",
    "triplet_loss",
    "unit_rows",
]
