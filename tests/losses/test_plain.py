"""Any PyTorch loss by name: on one rank, on many, its parameters, and what is said of one that does
not serve."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import small_run
from pytorch_metric_learning import losses as library
from safetensors import safe_open
from torch import Tensor, nn
from training_runs import Run, losses

from namr_dist import named_code
from namr_dist.config import LossConfig, MemoryConfig, RankingConfig
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.kernels import reference
from namr_dist.parallel.pool import Ranks
from namr_dist.train.objective import Objective, build_metric_loss

SUPCON = "pytorch_metric_learning.losses:SupConLoss"
PROXY = "pytorch_metric_learning.losses:ProxyAnchorLoss"
HERE = __name__
CLASSES, EACH, WIDTH = 6, 4, 8
B = CLASSES * EACH


class Scaled(nn.Module):
    """A parameter without dimensions, as temperatures often are, and embeddings that are drawn at
    random."""

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(start))
        self.calls = 0

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        chosen = torch.randperm(len(labels))[: len(labels) // 2]
        return self.scale * embeddings[chosen].square().sum(1).mean()


def spread(embeddings: Tensor, labels: Tensor, power: float = 2.0) -> Tensor:
    """A function, and one option."""
    return sum(embeddings[labels == label].std(0).pow(power).sum() for label in labels.unique())


def not_a_scalar(embeddings: Tensor, labels: Tensor) -> Tensor:
    return embeddings.sum(1)


def no_gradient(embeddings: Tensor, labels: Tensor) -> Tensor:
    return embeddings.detach().sum()


def fails(embeddings: Tensor, labels: Tensor) -> Tensor:
    raise KeyError("centres")


def leaves(embeddings: Tensor, labels: Tensor) -> Tensor:
    sys.exit(0)


def nothing_to_pull(embeddings: Tensor, labels: Tensor) -> Tensor:
    """As miners do that find no pair: a constant, here for the labels that `rows` gives."""
    return torch.zeros(()) if len(labels) == B else embeddings.sum()


NUMBER = 7


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z_BD = 30 * torch.randn(B, WIDTH, generator=generator, dtype=torch.float64)
    s_BD = 0.6 + 0.8 * torch.rand(B, WIDTH, generator=generator, dtype=torch.float64)
    return z_BD.to(dtype), s_BD.to(dtype), torch.arange(CLASSES).repeat(EACH)


def objective(metric: str, options: str = "") -> Objective:
    named_code.allow([metric])
    torch.manual_seed(0)
    config = LossConfig(metric=metric, options=options)
    return Objective(config, classes=CLASSES, images_per_class=EACH, width=WIDTH).double()


def step(metric: str, counts_W: tuple[int, ...], options: str = "") -> tuple[float, list[Tensor]]:
    """This rank's loss, and what an optimizer gets that averages over ranks: gradients of its rows
    of z and s, and of the loss's own parameters."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = slice(sum(counts_W[:rank]), sum(counts_W[: rank + 1]))
    made, (z_BD, s_BD, labels_B) = objective(metric, options), rows()
    z_bD, s_bD = (part[own].clone().requires_grad_() for part in (z_BD, s_BD))
    losses = made(z_bD, s_bD, labels_B[own], seed=5, counts_W=counts_W)
    losses.total.backward()
    learnt = [
        parameter.grad / world for parameter in made.parameters() if parameter.grad is not None
    ]
    for gradient in learnt if world > 1 else []:
        dist.all_reduce(gradient)
    return losses.total.item(), [z_bD.grad / world, s_bD.grad / world, *learnt]


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        (SUPCON, '{"temperature": 0.2}'),
        (PROXY, ""),
        (f"{HERE}:spread", '{"power": 1.5}'),
        (f"{HERE}:Scaled", ""),
    ],
)
@pytest.mark.parametrize("counts_W", [(12, 12), (23, 1), (0, 24)], ids=str)
@pytest.mark.dist
def test_two_ranks_are_one(
    two_ranks: Ranks, metric: str, options: str, counts_W: tuple[int, ...]
) -> None:
    loss, (grad_z_BD, grad_s_BD, *learnt) = step(metric, (B,), options)
    together = two_ranks(step, metric, counts_W, options)
    for of_rank, _ in together:
        assert of_rank == pytest.approx(loss, rel=1e-12)
    for got, want in zip(
        [torch.cat([gradients[position] for _, gradients in together]) for position in (0, 1)],
        (grad_z_BD, grad_s_BD),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for _, (_, _, *of_rank) in together:
        assert len(of_rank) == len(learnt) == (metric in (PROXY, f"{HERE}:Scaled"))
        for got, want in zip(of_rank, learnt, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", [SUPCON, PROXY])
def test_one_rank_is_the_loss_itself(metric: str) -> None:
    """Against autograd from end to end: the library's loss on z / m(z), and the ranking as
    defined."""
    loss, (grad_z_BD, grad_s_BD, *learnt) = step(metric, (B,))
    z_BD, s_BD, labels_B = rows()
    leaves = [z_BD.requires_grad_(), s_BD.requires_grad_()]
    x_BD = z_BD / reference.mean_pairwise_distance(z_BD)
    alone = (
        library.SupConLoss()
        if metric == SUPCON
        else library.ProxyAnchorLoss(CLASSES, WIDTH).double()
    )
    if metric == PROXY:
        alone.load_state_dict(objective(metric).metric_loss.loss.state_dict())
        leaves += list(alone.parameters())
    want = alone(x_BD, labels_B) + 2 * reference.multi_cluster_ranking(x_BD, s_BD)
    assert loss == pytest.approx(want.item(), rel=1e-12)
    for got, by_autograd in zip(
        [grad_z_BD, grad_s_BD, *learnt], torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(got, by_autograd, rtol=1e-8, atol=1e-11)


def test_trying_a_loss_leaves_no_trace() -> None:
    named_code.allow([f"{HERE}:Scaled"])
    before = torch.random.get_rng_state()
    made = build_metric_loss(
        LossConfig(metric=f"{HERE}:Scaled", options='{"start": 0.25}'),
        classes=CLASSES,
        images_per_class=EACH,
        width=WIDTH,
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made.loss.calls == 0
    assert {name: value.tolist() for name, value in made.named_parameters()} == {
        "loss.scale": [0.25]
    }


def test_a_batch_without_any_term_moves_nothing() -> None:
    made, (z_BD, s_BD, labels_B) = objective(f"{HERE}:nothing_to_pull"), rows()
    made.ranking_weight = 0.0
    z_BD.requires_grad_()
    made(z_BD, s_BD, labels_B).total.backward()
    assert not z_BD.grad.any()


def test_random_draws_follow_the_seed() -> None:
    made, (z_BD, s_BD, labels_B) = objective(f"{HERE}:Scaled"), rows()
    values = [made(z_BD, s_BD, labels_B, seed=seed).metric.item() for seed in (1, 2, 1)]
    assert values[0] == values[2] != values[1]


@pytest.mark.parametrize(
    ("metric", "options", "told"),
    [
        (
            f"{HERE}:not_a_scalar",
            "",
            "gives shape (8,) for (embeddings, labels); it should give a scalar",
        ),
        (f"{HERE}:no_gradient", "", "has no gradient for the embeddings"),
        (f"{HERE}:leaves", "", "and their labels (SystemExit: 0)"),
        (
            f"{HERE}:fails",
            "",
            "fails on 8 embeddings of 8 numbers and their labels (KeyError: 'centres')",
        ),
        (f"{HERE}:NUMBER", "", "cannot be called"),
        (f"{HERE}:Nothing", "", f"{HERE} has no Nothing"),
        (f"{HERE}:Scaled", '{"stop": 1}', "Scaled cannot be made with {'stop': 1} (TypeError"),
        (f"{HERE}:spread", '{"pwr": 1}', "fails on 8 embeddings"),
        (f"{HERE}:Scaled", "start=1", "loss.options is 'start=1', which is not JSON"),
        (f"{HERE}:Scaled", "[1]", "give a JSON object"),
    ],
)
def test_a_loss_that_does_not_serve_is_told(metric: str, options: str, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        objective(metric, options)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            LossConfig(metric=SUPCON, memory=MemoryConfig(rows=64)),
            "SupConLoss meets no rows of earlier batches",
        ),
        (
            LossConfig(metric="triplet", options='{"margin": 1}'),
            "the settings of triplet are loss.triplet.…",
        ),
    ],
)
def test_settings_that_do_not_go_with_it(config: LossConfig, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        config.check()


@pytest.mark.dist
@pytest.mark.slow
def test_supcon_trains_on_one_rank_and_on_two(
    shard_set: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    """At the default learning rates, with frozen batch norm: larger steps and that of a batch
    multiply the rounding of sums over ranks, which are added up in another order, from step to
    step."""
    words = [
        "homeware",
        *small_run(shard_set, steps=12),
        "--set.data.image_size",
        64,
        "--set.data.test_size",
        64,
        "--set.optim.backbone_lr",
        1e-5,
        "--set.optim.head_lr",
        1e-4,
        "--set.train.tensorboard",
        False,
        "--set.loss.metric",
        SUPCON,
        "--set.loss.options",
        '{"temperature": 0.1}',
    ]
    one = forked_namr("train", *words, "--run-dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    assert f"loss      {SUPCON}" in one.stderr and "memory B²" in one.stderr
    two = Run(2, [*words, "--run-dir", tmp_path / "two"], tmp_path / "two.txt")
    assert two.wait() == [0, 0], two.said()
    alone, together = (
        [of_step[0] for of_step in losses(tmp_path / name).values()] for name in ("one", "two")
    )
    assert len(alone) == 12 and alone[-1] < alone[0]
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.dist
@pytest.mark.slow
def test_parameters_of_a_loss_train_at_every_stage_and_resume(
    shard_set: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    """Under ZeRO 3 they are put away whenever the module that has them returns; a checkpoint of it
    goes on on two ranks."""
    words = ["homeware", *small_run(shard_set, steps=6), "--set.data.image_size", 64]
    words += ["--set.data.test_size", 64, "--set.optim.backbone_lr", 1e-5]
    words += ["--set.optim.head_lr", 1e-4, "--set.train.tensorboard", False]
    words += ["--set.loss.metric", PROXY, "--set.train.checkpoint_every", 3]
    for stage in (1, 3):
        words_of_stage = [*words, "--set.train.zero_stage", stage]
        done = forked_namr("train", *words_of_stage, "--run-dir", tmp_path / f"stage{stage}")
        assert done.returncode == 0, done.stderr
    first, third = ([one[0] for one in losses(tmp_path / f"stage{n}").values()] for n in (1, 3))
    assert third == pytest.approx(first, rel=1e-6)
    with safe_open(
        tmp_path / "stage3" / "checkpoints" / "step-00000003" / "rank-00000.safetensors", "pt"
    ) as file:
        proxies = file.get_tensor("model/objective.metric_loss.loss.proxies")
        assert proxies.shape == (12, 16) and proxies.isfinite().all()
        assert file.get_tensor("adamw/objective.metric_loss.loss.proxies/exp_avg").any()
    (tmp_path / "stage3" / "checkpoints" / "final.safetensors").unlink()
    again = Run(2, [*words, "--run-dir", tmp_path / "stage3", "--resume"], tmp_path / "said.txt")
    assert again.wait() == [0, 0], again.said()
    assert "resumed   at step 3" in again.said()
    resumed = [one[-1] for one in losses(tmp_path / "stage3").values()]
    assert resumed == pytest.approx(first, rel=1e-4)


def twelve_steps(metric: str) -> list[float]:
    """Losses of plain gradient descent on a linear map, in float64, with an optimizer that averages
    over ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    features_BF, labels_B = torch.randn(B, 10, dtype=torch.float64), rows()[2]
    network, heads = nn.Linear(10, WIDTH).double(), nn.Linear(10, WIDTH).double()
    made = objective(metric)
    learnt = [*network.parameters(), *heads.parameters(), *made.parameters()]
    optimizer = torch.optim.Adam(learnt, lr=0.02)
    own, values = slice(rank * B // world, (rank + 1) * B // world), []
    for number in range(12):
        optimizer.zero_grad()
        losses = made(
            network(features_BF[own]),
            1 + heads(features_BF[own]).tanh() / 2,
            labels_B[own],
            seed=number,
        )
        losses.total.backward()
        for parameter in learnt if world > 1 else []:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
        values.append(losses.total.item())
    return values


@pytest.mark.dist
@pytest.mark.parametrize("metric", [SUPCON, PROXY])
def test_twelve_steps_in_float64(two_ranks: Ranks, metric: str) -> None:
    alone = twelve_steps(metric)
    assert alone[-1] < alone[0]
    for together in two_ranks(twelve_steps, metric):
        assert together == pytest.approx(alone, rel=1e-9)


def test_without_ranking_too() -> None:
    named_code.allow([SUPCON])
    made = Objective(
        LossConfig(metric=SUPCON, ranking=RankingConfig(weight=0.0)),
        classes=CLASSES,
        images_per_class=EACH,
        width=WIDTH,
    ).double()
    z_BD, s_BD, labels_B = rows()
    x_BD = z_BD / reference.mean_pairwise_distance(z_BD)
    want = library.SupConLoss()(x_BD, labels_B).item()
    assert made(z_BD, s_BD, labels_B).total.item() == pytest.approx(want, rel=1e-12)
