"""Two ranks compute what one does: loss and, after the optimizer's mean over ranks, every gradient."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from namr_dist.config import LossConfig, ModelConfig, RankingConfig, TripletConfig
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.train.objective import TrainingModule

LOSSES = {
    "semihard": LossConfig(metric="triplet"),
    "sampled": LossConfig(metric="triplet", triplet=TripletConfig(mining="distance_weighted")),
    "margin": LossConfig(metric="margin"),
    "multi_similarity": LossConfig(metric="multi_similarity"),
    "proxy_anchor": LossConfig(metric="proxy_anchor"),
    "four clusters": LossConfig(ranking=RankingConfig(clusters=4)),
    "no ranking": LossConfig(ranking=RankingConfig(weight=0.0)),
}
MODEL = ModelConfig(backbone="conv4", pretrained=False, batchnorm="train", width=10, structure_hidden=12)
CLASSES, EACH = 6, 4


def gradients(config: LossConfig, rank: int, world_size: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and parameter gradients of one rank's share of a fixed batch, in float64."""
    torch.manual_seed(0)
    module = TrainingModule(EmbeddingNetwork(MODEL, image_size=16), config, classes=CLASSES,
                            images_per_class=EACH).double().train()
    images = torch.randint(0, 256, (CLASSES * EACH, 16, 16, 3), dtype=torch.uint8)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    share = len(labels) // world_size
    own = slice(rank * share, (rank + 1) * share)
    losses = module(images[own], labels[own], 7)
    losses.total.backward()
    return losses.total.item(), {name: value.grad for name, value in module.named_parameters()
                                 if value.grad is not None}


def on_rank(config: LossConfig) -> tuple[float, dict[str, Tensor]]:
    import torch.distributed as dist

    return gradients(config, dist.get_rank(), dist.get_world_size())


@pytest.mark.dist
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_are_one(two_ranks: Ranks, name: str) -> None:
    loss, expected = gradients(LOSSES[name], 0, 1)
    (first_loss, first), (second_loss, second) = two_ranks(on_rank, LOSSES[name])
    assert first_loss == pytest.approx(loss, rel=1e-12) and second_loss == first_loss
    assert first.keys() == expected.keys() and expected
    for parameter, gradient in expected.items():
        mean = (first[parameter] + second[parameter]) / 2  # as DeepSpeed and DDP combine ranks
        torch.testing.assert_close(mean, gradient, rtol=1e-9, atol=1e-11,
                                   msg=lambda text, of=parameter: f"{of}: {text}")
    structure = expected.get("network.structure_head.layers.0.weight")
    assert (structure is None or not structure.any()) == (name == "no ranking")
