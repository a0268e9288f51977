"""homeware, the set inside the package: minutes on a laptop's CPU."""

from __future__ import annotations

from namr_dist.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RankingConfig,
    TrainConfig,
)


def homeware() -> Config:
    """EfficientNet-Lite0 from ImageNet, triplet loss with multi-cluster ranking."""
    return Config(
        recipe="homeware",
        data=DataConfig(
            classes_per_batch=20,
            images_per_class=4,
            image_size=96,
            test_size=128,
            crop_scale=(0.4, 1.0),
            test_crop=1.0,
        ),
        model=ModelConfig(backbone="efficientnet_lite0", width=128),
        # In so few steps a constant λ costs what it gains in more.
        loss=LossConfig(ranking=RankingConfig(rise_passes=10.0)),
        optim=OptimConfig(steps=120, backbone_lr=2e-4, head_lr=1e-3, warmup_steps=10),
        train=TrainConfig(validate_every=40),
    )


def homeware_conv4() -> Config:
    """A small network from scratch at 64 px: no pre-trained weights, a modest result."""
    return Config(
        recipe="homeware_conv4",
        data=DataConfig(classes_per_batch=20, images_per_class=4, image_size=64, test_crop=1.0),
        model=ModelConfig(backbone="conv4", pretrained=False, batchnorm="train", width=128),
        optim=OptimConfig(steps=400, backbone_lr=1e-3, head_lr=1e-3, warmup_steps=20),
        train=TrainConfig(validate_every=100),
    )
