"""CUB-200-2011 (Wah et al. 2011): birds; the first hundred classes train."""

from __future__ import annotations

from namr_dist.config import Config, DataConfig, EvaluationConfig, OptimConfig


def cub() -> Config:
    """ResNet-50, triplet loss with multi-cluster ranking, some 60 passes over the training
    images."""
    return Config(
        recipe="cub",
        data=DataConfig(
            path="shards/cub", validation_split=None, classes_per_batch=32, images_per_class=4
        ),
        optim=OptimConfig(steps=3_000, backbone_lr=1e-5, head_lr=1e-4, warmup_steps=100),
        evaluation=EvaluationConfig(recall_at=(1, 2, 4, 8)),
    )
