"""What is minimised: the metric loss on z plus λ times multi-cluster ranking on (z, s), over the global batch.

Shapes: b rows of one rank, B rows of all ranks, D width. Formulas: docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.config import LossConfig
from namr_dist.losses.margin import MarginLoss
from namr_dist.losses.multi_cluster import MultiClusterRanking
from namr_dist.losses.multi_similarity import MultiSimilarityLoss
from namr_dist.losses.proxy_anchor import ProxyAnchorLoss
from namr_dist.losses.triplet import TripletLoss
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.gather import gather_rows


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The parts of one step's loss, each a scalar. Only `total` carries a gradient."""

    total: Tensor
    metric: Tensor
    ranking: Tensor


def build_metric_loss(config: LossConfig, *, classes: int, images_per_class: int, width: int) -> nn.Module:
    """The baseline loss that the configuration names, for labels 0..classes-1, so many rows of each in a batch."""
    positives = images_per_class - 1
    if config.metric == "triplet":
        return TripletLoss(margin=config.triplet.margin, mining=config.triplet.mining, most_positives=positives)
    if config.metric == "margin":
        return MarginLoss(alpha=config.margin.alpha, beta=config.margin.beta, most_positives=positives)
    if config.metric == "multi_similarity":
        similarity = config.multi_similarity
        return MultiSimilarityLoss(alpha=similarity.alpha, beta=similarity.beta, base=similarity.base,
                                   epsilon=similarity.epsilon)
    return ProxyAnchorLoss(classes=classes, width=width, alpha=config.proxy_anchor.alpha,
                           margin=config.proxy_anchor.margin)


class TrainingModule(nn.Module):
    """Network and losses as the one module that DeepSpeed drives.

    The losses are inside, because ZeRO-3 gathers a parameter (a proxy, β) only within a forward of its engine,
    and evaluation comes through the same forward for the same reason.
    """

    def __init__(self, network: EmbeddingNetwork, config: LossConfig, *, classes: int, images_per_class: int) -> None:
        super().__init__()
        self.network = network
        width = network.sample_head.out_features
        self.metric_loss = build_metric_loss(config, classes=classes, images_per_class=images_per_class, width=width)
        ranking = config.ranking
        self.ranking_loss = MultiClusterRanking(clusters=ranking.clusters, spread=ranking.spread,
                                                floor=ranking.floor, sharpness=ranking.sharpness,
                                                statistics=ranking.statistics)
        self.ranking_weight = ranking.weight

    def forward(self, images_bHW3: Tensor, labels_b: Tensor | None = None,
                seed: int = 0) -> StepLoss | tuple[Tensor, Tensor]:
        """Without labels: this rank's (z, s). With labels: the loss of the global batch, the same on all ranks.

        `seed` fixes what the loss draws at random.
        """
        z_bD, s_bD = self.network(images_bHW3)
        if labels_b is None:
            return z_bD, s_bD
        z_BD, s_BD, labels_B = gather_rows(z_bD), gather_rows(s_bD), gather_rows(labels_b)
        # Distances in units of their mean: margins and centres mean the same at any scale of z.
        z_BD = z_BD / kernels.mean_pairwise_distance(z_BD).clamp_min(torch.finfo(z_BD.dtype).tiny)
        metric = self.metric_loss(z_BD, labels_B, seed=seed)
        if self.ranking_weight == 0:
            return StepLoss(total=metric, metric=metric.detach(), ranking=torch.zeros_like(metric.detach()))
        ranking = self.ranking_loss(z_BD, s_BD)
        return StepLoss(total=metric + self.ranking_weight * ranking, metric=metric.detach(),
                        ranking=ranking.detach())
