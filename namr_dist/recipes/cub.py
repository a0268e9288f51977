"""CUB-200-2011 (Wah et al. 2011): birds; the first hundred classes train."""

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


def cub() -> Config:
    """ResNet-50 as in Roth et al. 2020: 150 epochs of 5,864 images in batches of 112, two a class.

    Ours: 512 wide, where their runs have 128.
    """
    return Config(
        recipe="cub",
        data=resnet_data("shards/cub", classes_per_batch=56, images_per_class=2),
        model=RESNET50,
        optim=resnet_optim(steps=150 * (5_864 // 112)),
        evaluation=EvaluationConfig(recall_at=(1, 2, 4, 8)),
    )


def cub_vit_small() -> Config:
    """ViT-S/16 from DINO as in Ermolov et al. 2022: 50 epochs of one batch, nine images of every
    class; tested on the middle 224 of 256 px.

    Ours: 512 wide, where theirs is 128; the patch embedding is trained, too.
    """
    return Config(
        recipe="cub_vit_small",
        data=vit_data("shards/cub", classes_per_batch=100, images_per_class=9, test_crop=224 / 256),
        model=VIT_SMALL,
        optim=vit_optim(steps=50),
        evaluation=EvaluationConfig(recall_at=(1, 2, 4, 8)),
    )
