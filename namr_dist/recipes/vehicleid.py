"""PKU VehicleID (Liu et al. 2016): vehicles under surveillance cameras; three test lists, two
protocols."""

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


def vehicleid() -> Config:
    """ResNet-50, 512 wide, as in Brown et al. 2020 (Smooth-AP): 400 epochs in batches of 384, four
    images a class; the rate drops at 120, 200, 220, 250, 280 and, twice, at 300.

    Ours: an epoch is 113,346 images, one pass over the training list as most count it.
    """
    return Config(
        recipe="vehicleid",
        data=resnet_data(
            "shards/vehicleid",
            classes_per_batch=96,
            images_per_class=4,
            sampling="proportional",
            test_split="test_800",
        ),
        model=RESNET50,
        optim=resnet_optim(
            steps=400 * (113_346 // 384),
            step_at=tuple(epoch / 400 for epoch in (120, 200, 220, 250, 280, 300, 300)),
        ),
        evaluation=EvaluationConfig(recall_at=(1, 5), reidentification_draws=10),
    )


def vehicleid_vit_small() -> Config:
    """ViT-S/16 from DINO with the settings of Ermolov et al. 2022 for Stanford Online Products, for
    they have none for VehicleID: 200 epochs, each of one visit to every one of 13,164 classes.

    Ours, beyond that choice: as in `sop_vit_small`.
    """
    return Config(
        recipe="vehicleid_vit_small",
        data=vit_data(
            "shards/vehicleid", classes_per_batch=448, images_per_class=2, test_split="test_800"
        ),
        model=VIT_SMALL,
        optim=vit_optim(steps=200 * (13_164 // 448)),
        evaluation=EvaluationConfig(recall_at=(1, 5), reidentification_draws=10),
    )
