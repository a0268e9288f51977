"""The losses of NAMR-dist as functions of tensors; nothing here knows of models, ranks or training.

`from namr_dist import kernels; kernels.multi_cluster_ranking(z, s)`.
Each op is defined under the same name in `reference/`; on a GPU it is Triton (`gpu/`), elsewhere
blocked PyTorch (`cpu/`).  The `*_of_rows` functions are the same ops for one rank's rows among all
(docs/kernels.md).
"""

from .checks import MINING, STATISTICS, check_clusters, check_mining
from .dispatch import describe
from .distances import mean_distance_of_rows, mean_pairwise_distance
from .margin import margin_loss, margin_of_rows
from .multi_cluster import multi_cluster_ranking, ranking_of_rows
from .multi_similarity import multi_similarity_loss, multi_similarity_of_rows
from .nearest import nearest_centres
from .ops import Gather, alone
from .proxy_anchor import proxy_anchor_loss, proxy_anchor_of_rows
from .reference.pairs import unit_rows
from .triplet import triplet_loss, triplet_of_rows

__all__ = [
    "MINING",
    "STATISTICS",
    "Gather",
    "alone",
    "check_clusters",
    "check_mining",
    "describe",
    "margin_loss",
    "margin_of_rows",
    "mean_distance_of_rows",
    "mean_pairwise_distance",
    "multi_cluster_ranking",
    "multi_similarity_loss",
    "multi_similarity_of_rows",
    "nearest_centres",
    "proxy_anchor_loss",
    "proxy_anchor_of_rows",
    "ranking_of_rows",
    "triplet_loss",
    "triplet_of_rows",
    "unit_rows",
]
