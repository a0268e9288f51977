"""The losses of NAMR-dist as functions of tensors; nothing here knows of models, ranks or training.

`from namr_dist import kernels; kernels.multi_cluster_ranking(z, s)`.
Each op is defined under the same name in `reference.py`.
"""

from .reference import (
    MINING,
    STATISTICS,
    check_clusters,
    check_mining,
    margin_loss,
    mean_pairwise_distance,
    multi_cluster_ranking,
    multi_similarity_loss,
    pairwise_distance,
    pairwise_squared_distance,
    proxy_anchor_loss,
    triplet_loss,
    unit_rows,
)

__all__ = [
    "MINING",
    "STATISTICS",
    "check_clusters",
    "check_mining",
    "margin_loss",
    "mean_pairwise_distance",
    "multi_cluster_ranking",
    "multi_similarity_loss",
    "pairwise_distance",
    "pairwise_squared_distance",
    "proxy_anchor_loss",
    "triplet_loss",
    "unit_rows",
]
