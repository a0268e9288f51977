"""The whole loss and its gradients, put together by hand, against autograd on the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from namr_dist.config import LossConfig, RankingConfig
from namr_dist.kernels import reference
from namr_dist.losses.registry import TripletConfig
from namr_dist.train.objective import Objective

CLASSES, EACH, WIDTH = 5, 4, 7


def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z_BD = 40 * torch.randn(CLASSES * EACH, WIDTH, generator=generator, dtype=torch.float64)
    s_BD = 0.6 + 0.8 * torch.rand(CLASSES * EACH, WIDTH, generator=generator, dtype=torch.float64)
    return (
        z_BD.requires_grad_(),
        s_BD.requires_grad_(),
        torch.arange(CLASSES).repeat_interleave(EACH),
    )


def definition(
    config: LossConfig, objective: Objective, z_BD: Tensor, s_BD: Tensor, labels_B: Tensor
) -> Tensor:
    x_BD = z_BD / reference.mean_pairwise_distance(z_BD)
    unit_BD = torch.nn.functional.normalize(x_BD, dim=1)
    learnt = dict(objective.metric_loss.named_parameters())
    metric = {
        "triplet": lambda: reference.triplet_loss(
            x_BD, labels_B, margin=0.2, mining=config.triplet.mining, seed=7
        ),
        "margin": lambda: reference.margin_loss(
            unit_BD, labels_B, alpha=0.2, beta=learnt["beta"], seed=7
        ),
        "multi_similarity": lambda: reference.multi_similarity_loss(unit_BD, labels_B),
        "proxy_anchor": lambda: reference.proxy_anchor_loss(
            unit_BD, labels_B, torch.nn.functional.normalize(learnt["proxies"], dim=1)
        ),
    }[config.metric]()
    ranking = reference.multi_cluster_ranking(x_BD, s_BD, clusters=config.ranking.clusters)
    return metric + config.ranking.weight * ranking


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(metric="triplet"),
        LossConfig(metric="triplet", triplet=TripletConfig(mining="hardest")),
        LossConfig(metric="triplet", triplet=TripletConfig(mining="distance_weighted")),
        LossConfig(metric="margin"),
        LossConfig(metric="multi_similarity"),
        LossConfig(metric="proxy_anchor"),
        LossConfig(ranking=RankingConfig(weight=0.0)),
        LossConfig(ranking=RankingConfig(weight=4.0, clusters=3)),
    ],
    ids=lambda config: (
        f"{config.metric}-{config.triplet.mining}-{config.ranking.weight:g}x{config.ranking.clusters}"
    ),
)
def test_loss_and_gradients_are_the_definitions(config: LossConfig) -> None:
    z_BD, s_BD, labels_B = rows()
    objective = Objective(config, classes=CLASSES, images_per_class=EACH, width=WIDTH).double()
    losses = objective(z_BD, s_BD, labels_B, seed=7)
    want = definition(config, objective, z_BD, s_BD, labels_B)
    torch.testing.assert_close(losses.total, want, rtol=1e-12, atol=0)
    parts = losses.metric + config.ranking.weight * losses.ranking
    torch.testing.assert_close(parts, want.detach(), rtol=1e-12, atol=0)
    # Beside another term of a larger loss, with a factor: what reaches z and s is the gradient
    # times the factor.
    leaves = (
        [z_BD, s_BD, *objective.parameters()]
        if config.ranking.weight
        else [z_BD, *objective.parameters()]
    )
    got = torch.autograd.grad(3 * losses.total + z_BD.sum(), leaves)
    for ours, theirs in zip(got, torch.autograd.grad(3 * want + z_BD.sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["triplet", "margin", "multi_similarity", "proxy_anchor"])
def test_collapsed_embeddings_stay_finite(metric: str) -> None:
    """All rows equal: the mean distance is 0, and nothing may be divided by it."""
    objective = Objective(
        LossConfig(metric=metric), classes=CLASSES, images_per_class=EACH, width=WIDTH
    )
    z_BD = torch.full((CLASSES * EACH, WIDTH), 0.5, requires_grad=True)
    s_BD = torch.ones(CLASSES * EACH, WIDTH, requires_grad=True)
    losses = objective(z_BD, s_BD, torch.arange(CLASSES).repeat_interleave(EACH))
    losses.total.backward()
    assert losses.total.isfinite() and z_BD.grad.isfinite().all() and s_BD.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_lose_no_more_than_their_own_rounding(dtype: torch.dtype) -> None:
    """Under a loss scale too: gradients are rounded to the type once, after the scale is multiplied
    in."""
    z_BD, s_BD, labels_B = rows()
    objective = Objective(LossConfig(), classes=CLASSES, images_per_class=EACH, width=WIDTH)
    halves = [value.detach().to(dtype).requires_grad_() for value in (z_BD, s_BD)]
    wide = [value.detach().double().requires_grad_() for value in halves]
    scale = 2.0**14
    got = torch.autograd.grad(scale * objective(*halves, labels_B).total, halves)
    want = torch.autograd.grad(scale * objective(*wide, labels_B).total, wide)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < torch.finfo(dtype).eps * theirs.norm()


def test_a_single_row_has_no_distance() -> None:
    objective = Objective(LossConfig(), classes=2, images_per_class=1, width=WIDTH)
    with pytest.raises(ValueError, match="1 rows in all, and a distance needs two"):
        objective(torch.ones(1, WIDTH), torch.ones(1, WIDTH), torch.zeros(1, dtype=torch.int64))
