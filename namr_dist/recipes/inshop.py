"""In-Shop Clothes Retrieval of DeepFashion (Liu et al. 2016): queries search a gallery of their
own."""

from __future__ import annotations

from namr_dist.config import Config, DataConfig, EvaluationConfig, OptimConfig


def inshop() -> Config:
    """ResNet-50, triplet loss with multi-cluster ranking, some 100 passes over the training
    images."""
    return Config(
        recipe="inshop",
        data=DataConfig(
            path="shards/inshop", validation_split=None, classes_per_batch=128, images_per_class=4
        ),
        optim=OptimConfig(steps=5_000, backbone_lr=1e-5, head_lr=1e-4, warmup_steps=500),
        evaluation=EvaluationConfig(recall_at=(1, 10, 20, 30)),
    )
