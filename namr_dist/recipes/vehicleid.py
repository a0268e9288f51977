"""PKU VehicleID (Liu et al. 2016): vehicles under surveillance cameras; three test lists, two
protocols."""

from __future__ import annotations

from namr_dist.config import Config, DataConfig, EvaluationConfig, OptimConfig


def vehicleid() -> Config:
    """ResNet-50, triplet loss with multi-cluster ranking, some 50 passes over the training
    images."""
    return Config(
        recipe="vehicleid",
        data=DataConfig(
            path="shards/vehicleid",
            validation_split=None,
            test_split="test_800",
            classes_per_batch=128,
            images_per_class=4,
        ),
        optim=OptimConfig(steps=11_000, backbone_lr=1e-5, head_lr=1e-4, warmup_steps=500),
        evaluation=EvaluationConfig(recall_at=(1, 5), reidentification_draws=10),
    )
