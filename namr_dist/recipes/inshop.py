"""In-Shop Clothes Retrieval of DeepFashion (Liu et al. 2016): queries search a gallery of their
own."""

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


def inshop() -> Config:
    """ResNet-50 as in the baselines of Roth et al. 2019 (MIC): 40 epochs of 25,882 images in
    batches of 112, four a class; the rate drops after 25.

    Ours: 512 wide, where theirs is 128.
    """
    return Config(
        recipe="inshop",
        data=resnet_data("shards/inshop", classes_per_batch=28, images_per_class=4),
        model=RESNET50,
        optim=resnet_optim(steps=40 * (25_882 // 112), step_at=(25 / 40,)),
        evaluation=EvaluationConfig(recall_at=(1, 10, 20, 30)),
    )


def inshop_vit_small() -> Config:
    """ViT-S/16 from DINO as in Ermolov et al. 2022: 400 epochs, each of one visit to every one of
    3,997 classes, two images a class.

    Ours: 448 classes in a batch, where theirs has 450, so that eight ranks can share it; 512 wide,
    where theirs is 128; the patch embedding is trained, too.
    """
    return Config(
        recipe="inshop_vit_small",
        data=vit_data("shards/inshop", classes_per_batch=448, images_per_class=2),
        model=VIT_SMALL,
        optim=vit_optim(steps=400 * (3_997 // 448)),
        evaluation=EvaluationConfig(recall_at=(1, 10, 20, 30)),
    )
