"""A user's own images, as `namr shards build folder` makes a set of them."""

from __future__ import annotations

from namr_dist.config import Config, DataConfig, OptimConfig


def folder() -> Config:
    """ResNet-50, triplet loss with multi-cluster ranking, batches that a set of sixteen classes can
    make."""
    return Config(
        recipe="folder",
        data=DataConfig(
            path="shards/folder", validation_split=None, classes_per_batch=16, images_per_class=4
        ),
        optim=OptimConfig(steps=3_000, backbone_lr=1e-5, head_lr=1e-4, warmup_steps=100),
    )
