"""The losses of pytorch-metric-learning with the miner that belongs to each.

Distances and similarities are set to take the rows as they are, as the definition does; rows of
half types are widened first, because its distances refuse or loop over them.  Multi-cluster ranking
has no counterpart there. Its semi-hard miners differ by definition.  Timed is the one whose memory
is B² (one triplet an anchor: the hardest positive, the nearest negative beyond it);
TripletMarginMiner lists all triplets.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .cases import Form
from .eager import ALPHA, MARGIN, wide


@cache
def forms() -> dict[str, Form]:
    """The losses by name.  Raises ImportError without the package."""
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning.distances import DotProductSimilarity, LpDistance
    from pytorch_metric_learning.reducers import MeanReducer

    def euclidean() -> LpDistance:
        return LpDistance(normalize_embeddings=False)

    def dot() -> DotProductSimilarity:
        return DotProductSimilarity(normalize_embeddings=False)

    def triplets(miner: nn.Module) -> Form:
        loss = losses.TripletMarginLoss(margin=MARGIN, distance=euclidean(), reducer=MeanReducer())

        def form(labels_B: Tensor, z_BD: Tensor) -> Tensor:
            z_BD = wide(z_BD)
            return loss(z_BD, labels_B, miner(z_BD, labels_B))

        return form

    def margin(labels_B: Tensor, x_BD: Tensor, beta: Tensor) -> Tensor:
        x_BD = wide(x_BD)
        mined = sampler(x_BD, labels_B)
        return torch.func.functional_call(margin_loss, {"beta": beta}, (x_BD, labels_B, mined))

    def multi_similarity(labels_B: Tensor, x_BD: Tensor) -> Tensor:
        x_BD = wide(x_BD)
        return similarity_loss(x_BD, labels_B, similarity_miner(x_BD, labels_B))

    def proxy_anchor(labels_B: Tensor, x_BD: Tensor, proxies_CD: Tensor) -> Tensor:
        # The module holds proxies of its own; the given ones stand in for them.
        shell = proxy_shell(*proxies_CD.shape)
        return torch.func.functional_call(
            shell, {"proxies": wide(proxies_CD)}, (wide(x_BD), labels_B)
        )

    @cache
    def proxy_shell(classes: int, width: int) -> nn.Module:
        return losses.ProxyAnchorLoss(classes, width, margin=0.1, alpha=32, distance=dot())

    sampler = miners.DistanceWeightedMiner()
    margin_loss = losses.MarginLoss(margin=ALPHA, beta=1.2, learn_beta=True, distance=euclidean())
    similarity_miner = miners.MultiSimilarityMiner(epsilon=0.1, distance=dot())
    similarity_loss = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, distance=dot())
    semihard = miners.BatchEasyHardMiner(
        pos_strategy="hard", neg_strategy="semihard", distance=euclidean()
    )
    return {
        "triplet-hardest": triplets(miners.BatchHardMiner(distance=euclidean())),
        "triplet-semihard": triplets(semihard),
        "triplet-distance-weighted": triplets(sampler),
        "margin": margin,
        "multi-similarity": multi_similarity,
        "proxy-anchor": proxy_anchor,
    }
