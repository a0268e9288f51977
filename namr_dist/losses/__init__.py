"""Losses as modules.  The four metric losses share `forward(z_BD, labels_B, *, seed) -> scalar`."""

from .margin import MarginLoss
from .multi_cluster import MultiClusterRanking
from .multi_similarity import MultiSimilarityLoss
from .proxy_anchor import ProxyAnchorLoss
from .triplet import TripletLoss

__all__ = ["MarginLoss", "MultiClusterRanking", "MultiSimilarityLoss", "ProxyAnchorLoss", "TripletLoss"]
