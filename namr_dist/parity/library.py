"""What pytorch-metric-learning's DistributedLossWrapper makes of the same question, beside ours;
measured, not judged.

The smallest model that can show it: one linear map of a fixed batch, in float64, the loss with the
library's own settings and no miner, gradients averaged over ranks as DDP does. The yardstick of
each way is itself in one process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from namr_dist.config import LossConfig, RankingConfig
from namr_dist.losses import registry
from namr_dist.parallel.pool import Ranks
from namr_dist.train.objective import Objective

PACKAGE = "pytorch-metric-learning"
WAYS = ("ours", "wrapper", "wrapper, efficient")
_COUNTERPARTS = {
    "triplet": "TripletMarginLoss",
    "margin": "MarginLoss",
    "multi_similarity": "MultiSimilarityLoss",
    "proxy_anchor": "ProxyAnchorLoss",
}
"""The library's loss for each of ours that it has."""
LOSSES = tuple(name for name in registry.NAMES if name in _COUNTERPARTS)

_CLASSES, _EACH, _FEATURES, _WIDTH = 8, 3, 20, 16


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Gradients of W ranks beside those of one process."""

    way: str
    loss: str
    ranks: int
    part: str
    """network, or loss: the parameters that the loss itself has."""
    norm: float
    """‖g‖ / ‖g₁‖."""
    error: float
    """‖g - g₁‖ / ‖g₁‖."""


def version() -> str | None:
    """The library's version, None where it is not installed."""
    return (
        importlib.metadata.version(PACKAGE)
        if importlib.util.find_spec("pytorch_metric_learning")
        else None
    )


def measure(pool: Ranks) -> list[Ratio]:
    """Every way and loss on the ranks of the pool."""
    ratios = []
    for loss in LOSSES:
        for way in WAYS:
            if loss == "proxy_anchor" and "efficient" in way:
                continue  # the library refuses it
            alone, together = gradients(way, loss), pool(gradients, way, loss)[0]
            for part, value in alone.items():
                norm, error = (
                    _norm(of) / _norm(value) for of in (together[part], together[part] - value)
                )
                ratios.append(
                    Ratio(
                        way=way, loss=loss, ranks=pool.world_size, part=part, norm=norm, error=error
                    )
                )
    return ratios


def gradients(way: str, loss: str) -> dict[str, Tensor]:
    """The gradient of the linear map and of the loss's own parameters, flat, averaged over ranks if
    there are some."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    labels_B = torch.arange(_CLASSES).repeat(_EACH)
    # Classes lie apart, or as many pairs would pull at β as push.
    centres_CF, noise_BF = torch.randn(_CLASSES, _FEATURES), torch.randn(len(labels_B), _FEATURES)
    features_BF = (centres_CF[labels_B] + noise_BF).double()
    network = nn.Linear(_FEATURES, _WIDTH, bias=False).double()
    if way == "ours":
        config = LossConfig(metric=loss, ranking=RankingConfig(weight=0.0))
        criterion: nn.Module = Objective(
            config, classes=_CLASSES, images_per_class=_EACH, width=_WIDTH
        ).double()
    else:
        criterion = _library_loss(loss, efficient="efficient" in way, wrapped=world > 1)
    share = len(labels_B) // world
    own = slice(rank * share, (rank + 1) * share)
    z_bD = network(features_BF[own])
    value = (
        criterion(z_bD, torch.ones_like(z_bD), labels_B[own]).total
        if way == "ours"
        else criterion(z_bD, labels_B[own])
    )
    value.backward()
    modules: dict[str, nn.Module] = {"network": network, "loss": criterion}
    return {
        part: _average([_gradient(parameter) for parameter in module.parameters()], world)
        for part, module in modules.items()
        if list(module.parameters())
    }


def _library_loss(name: str, *, efficient: bool, wrapped: bool) -> nn.Module:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    options: dict[str, dict[str, Any]] = {
        "margin": {"learn_beta": True},
        "proxy_anchor": {"num_classes": _CLASSES, "embedding_size": _WIDTH},
    }
    loss: nn.Module = getattr(losses, _COUNTERPARTS[name])(**options.get(name, {})).double()
    return DistributedLossWrapper(loss, efficient=efficient) if wrapped else loss


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _average(gradients: list[Tensor], world: int) -> Tensor:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if world > 1:
        dist.all_reduce(flat)
    return flat / world


def _norm(value: Tensor) -> float:
    return float(value.norm())
