"""Stanford Online Products (Oh Song et al. 2016): products of an online shop."""

from __future__ import annotations

from namr_dist.config import Config, DataConfig, EvaluationConfig, OptimConfig


def sop() -> Config:
    """ResNet-50, triplet loss with multi-cluster ranking, some 100 passes over the training
    images."""
    return Config(
        recipe="sop",
        data=DataConfig(
            path="shards/sop", validation_split=None, classes_per_batch=128, images_per_class=4
        ),
        optim=OptimConfig(steps=12_000, backbone_lr=1e-5, head_lr=1e-4, warmup_steps=500),
        evaluation=EvaluationConfig(recall_at=(1, 10, 100, 1000)),
    )
