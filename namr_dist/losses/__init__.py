"""Losses as modules, for one rank's rows among all ranks'.

The four metric losses share `forward(rows, *, seed) -> (loss, gradient for rows.z_bD)`: gradients are computed with
the loss, and what the loss itself carries to autograd is the gradient of the module's own parameters (β, proxies).
`train.objective.Objective` puts them together into one differentiable loss.
"""

from .margin import MarginLoss
from .memory import CrossBatchMemory
from .multi_cluster import MultiClusterRanking
from .multi_similarity import MultiSimilarityLoss
from .proxy_anchor import ProxyAnchorLoss
from .rows import Rows, all_rows
from .triplet import TripletLoss

__all__ = ["CrossBatchMemory", "MarginLoss", "MultiClusterRanking", "MultiSimilarityLoss", "ProxyAnchorLoss", "Rows",
           "TripletLoss", "all_rows"]
