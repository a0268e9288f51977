"""Settings that recipes of several data sets take from the same papers.

ResNet-50: three publications whose public code grew from one base, and which agree on nearly all:

- Roth, Brattoli and Ommer, *MIC: Mining Interclass Characteristics for Improved Deep Metric
  Learning*, ICCV 2019; the runs of its baselines, github.com/Confusezius/
  Deep-Metric-Learning-Baselines (Standard_Training.py, sample_training_runs.sh);
- Roth et al., *Revisiting Training Strategies and Generalization Performance in Deep Metric
  Learning*, ICML 2020, github.com/Confusezius/Revisiting_Deep_Metric_Learning_PyTorch
  (parameters.py, Revisit_Runs.sh);
- Brown et al., *Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval*, ECCV 2020,
  github.com/Andrew-Brown1/Smooth_AP (main.py, datasets.py, README).

ViT-S/16: Ermolov et al., *Hyperbolic Vision Transformers: Combining Improvements in Metric
Learning*, CVPR 2022, github.com/htdt/hyp_metric (train.py, sampler.py, README).

Ours in all recipes: the objective, triplet loss with multi-cluster ranking, and with it the
structure head; AdamW, where the first three have Adam with the decay in the gradient; no decay of
biases and norms; scale and shift of frozen batch norm, which the first three train; bf16 where the
GPU has it. docs/benchmarks.md lists what else differs.
"""

from __future__ import annotations

from typing import Literal

from namr_dist.config import DataConfig, ModelConfig, OptimConfig

# torchvision's first weights, which all three have; timm's own `resnet50` are others.
RESNET50 = ModelConfig(backbone="timm:resnet50.tv_in1k", batchnorm="frozen", width=512)
VIT_SMALL = ModelConfig(backbone="timm:vit_small_patch16_224.dino", width=512)


def resnet_data(
    path: str,
    *,
    classes_per_batch: int,
    images_per_class: int,
    sampling: Literal["uniform", "proportional"] = "uniform",
    test_split: str = "test",
) -> DataConfig:
    """Crops of 224 px that cover 8 to 100 % of an image, mirrored, in their own colours; tested on
    the middle 224 of 256 px."""
    return DataConfig(
        path=path,
        validation_split=None,
        test_split=test_split,
        classes_per_batch=classes_per_batch,
        images_per_class=images_per_class,
        sampling=sampling,
        image_size=224,
        crop_scale=(0.08, 1.0),
        brightness=0,
        contrast=0,
        saturation=0,
        test_crop=224 / 256,
    )


def resnet_optim(*, steps: int, step_at: tuple[float, ...] = ()) -> OptimConfig:
    """1e-5 for backbone and heads, 5e-4 for what a loss learns, times 0.3 at each of `step_at`
    (shares of the steps); no warm-up, no clipping."""
    return OptimConfig(
        steps=steps,
        backbone_lr=1e-5,
        head_lr=1e-5,
        loss_lr=5e-4,
        weight_decay=4e-4,
        schedule="step",
        step_at=step_at,
        step_factor=0.3,
        warmup_steps=0,
        clip=0,
    )


def vit_data(
    path: str,
    *,
    classes_per_batch: int,
    images_per_class: int,
    test_crop: float = 1.0,
    test_split: str = "test",
) -> DataConfig:
    """Crops of 224 px that cover 20 to 100 % of an image, mirrored, in their own colours."""
    return DataConfig(
        path=path,
        validation_split=None,
        test_split=test_split,
        classes_per_batch=classes_per_batch,
        images_per_class=images_per_class,
        image_size=224,
        crop_scale=(0.2, 1.0),
        brightness=0,
        contrast=0,
        saturation=0,
        test_crop=test_crop,
    )


def vit_optim(*, steps: int) -> OptimConfig:
    """1e-5 throughout for backbone and heads, the paper's rate for DINO's weights; AdamW's decay of
    0.01; gradients of norm 3 at most."""
    return OptimConfig(
        steps=steps,
        backbone_lr=1e-5,
        head_lr=1e-5,
        weight_decay=0.01,
        schedule="step",
        step_at=(),
        warmup_steps=0,
        clip=3.0,
    )
