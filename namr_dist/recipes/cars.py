"""Cars196 (Krause et al. 2013): makes of cars; the first 98 classes train."""

from __future__ import annotations

from namr_dist.config import Config, EvaluationConfig
from namr_dist.recipes.papers import (
    RESNET50,
    VIT_SMALL,
    resnet_data,
    resnet_optim,
    vit_data,
    vit_optim,
)


def cars() -> Config:
    """ResNet-50 as in Roth et al. 2020: 150 epochs of 8,054 images in batches of 112, two a class.

    Ours: 512 wide, where their runs have 128.
    """
    return Config(
        recipe="cars",
        data=resnet_data("shards/cars", classes_per_batch=56, images_per_class=2),
        model=RESNET50,
        optim=resnet_optim(steps=150 * (8_054 // 112)),
        evaluation=EvaluationConfig(recall_at=(1, 2, 4, 8)),
    )


def cars_vit_small() -> Config:
    """ViT-S/16 from DINO as in Ermolov et al. 2022: 300 epochs of one batch, nine images a class.

    Ours: 96 classes in a batch, where theirs has all 98, so that four ranks can share it; 512 wide,
    where theirs is 128; the patch embedding is trained, too.
    """
    return Config(
        recipe="cars_vit_small",
        data=vit_data("shards/cars", classes_per_batch=96, images_per_class=9),
        model=VIT_SMALL,
        optim=vit_optim(steps=300),
        evaluation=EvaluationConfig(recall_at=(1, 2, 4, 8)),
    )
