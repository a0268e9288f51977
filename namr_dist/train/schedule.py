"""Learning rates and the weight of multi-cluster ranking as pure functions of the step: nothing to
save, nothing to restore."""

from __future__ import annotations

import math

from namr_dist.config import OptimConfig, RankingConfig


def lr_factor(step: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, then half a cosine or
    steps down."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return config.step_factor ** sum(step >= share * config.steps for share in config.step_at)
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def ranking_share(config: RankingConfig, *, passes: float) -> float:
    """Share of λ after so many passes over the training images: 1, or rising linearly to it."""
    return min(1.0, passes / config.rise_passes) if config.rise_passes else 1.0
