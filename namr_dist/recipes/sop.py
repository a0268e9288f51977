"""Stanford Online Products (Oh Song et al. 2016): products of an online shop."""

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


def sop() -> Config:
    """ResNet-50 as in Roth et al. 2020: 100 epochs of 59,551 images in batches of 112, two a class.

    Ours: 512 wide, where their runs have 128.
    """
    return Config(
        recipe="sop",
        data=resnet_data("shards/sop", classes_per_batch=56, images_per_class=2),
        model=RESNET50,
        optim=resnet_optim(steps=100 * (59_551 // 112)),
        evaluation=EvaluationConfig(recall_at=(1, 10, 100, 1000)),
    )


def sop_vit_small() -> Config:
    """ViT-S/16 from DINO as in Ermolov et al. 2022: 200 epochs, each of one visit to every one of
    11,318 classes, two images a class.

    Ours: 448 classes in a batch, where theirs has 450, so that eight ranks can share it; 512 wide,
    where theirs is 128; the patch embedding is trained, too.
    """
    return Config(
        recipe="sop_vit_small",
        data=vit_data("shards/sop", classes_per_batch=448, images_per_class=2),
        model=VIT_SMALL,
        optim=vit_optim(steps=200 * (11_318 // 448)),
        evaluation=EvaluationConfig(recall_at=(1, 10, 100, 1000)),
    )
