"""Cross-batch memory: the ring against lists, the loss against its definition, ranks, checkpoints,
whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import small_run
from torch import Tensor

from namr_dist.config import LossConfig, MemoryConfig, ModelConfig
from namr_dist.data.read.plan import Sampling, epoch_plan
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.kernels import reference
from namr_dist.losses.memory import CrossBatchMemory
from namr_dist.losses.registry import TripletConfig
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.pool import Ranks
from namr_dist.recipes.overrides import configure
from namr_dist.train.objective import Objective, StepLoss, TrainingModule

CLASSES, EACH, WIDTH = 6, 4, 5
B = CLASSES * EACH
MODEL = ModelConfig(
    backbone="conv4", pretrained=False, batchnorm="train", width=10, structure_hidden=12
)


def some_rows(rows: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, labels, images; of few images, so that many come again."""
    generator = torch.Generator().manual_seed(seed)
    index_B = torch.randint(9, (rows,), generator=generator)
    return torch.randn(rows, WIDTH, generator=generator), index_B // 3, index_B


def test_the_ring_is_the_end_of_a_list() -> None:
    """Batches of any size, one of them larger than the ring; drift against the newest of the same
    image."""
    memory, seen = CrossBatchMemory(rows=11, width=WIDTH, start_step=2), []
    for step, size in enumerate((3, 5, 4, 30, 1, 11, 6)):
        z_BD, labels_B, index_B = some_rows(size, seed=step)
        held = seen[-11:]
        z_ND, labels_N = memory.behind(z_BD, labels_B)
        assert torch.equal(z_ND[:size], z_BD) and torch.equal(labels_N[:size], labels_B)
        given = sorted(
            (label, row)
            for label, row in zip(labels_N[size:].tolist(), z_ND[size:].tolist(), strict=True)
        )
        assert given == (sorted((label, z.tolist()) for z, label, _ in held) if step >= 2 else [])
        newest = {image: z for z, _, image in held}
        moves = [
            float((z - newest[image]).norm())
            for z, image in zip(z_BD, index_B.tolist(), strict=True)
            if image in newest
        ]
        distance, images = memory.moved(z_BD, index_B)
        assert int(images) == len(moves) and float(distance) == pytest.approx(
            sum(moves) / max(1, len(moves)), rel=1e-5
        )
        assert step < 2 or moves
        memory.add(z_BD, labels_B, index_B)
        seen += list(zip(z_BD, labels_B.tolist(), index_B.tolist(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(triplet=TripletConfig(mining="hardest")),
        LossConfig(triplet=TripletConfig(mining="distance_weighted")),
        LossConfig(metric="margin"),
        LossConfig(metric="multi_similarity"),
    ],
    ids=lambda config: f"{config.metric}-{config.triplet.mining}",
)
def test_loss_and_gradients_are_the_definitions(config: LossConfig) -> None:
    """Remembered rows are divided by the scale of the batch that meets them, and are constants."""
    config = LossConfig(
        metric=config.metric, triplet=config.triplet, memory=MemoryConfig(rows=40, start_step=1)
    )
    objective = Objective(config, classes=CLASSES, images_per_class=EACH, width=WIDTH).double()
    generator = torch.Generator().manual_seed(3)
    labels_B, batches, indices = torch.arange(CLASSES).repeat_interleave(EACH), [], []
    for step in range(3):
        z_BD = (
            (20 + 10 * step) * torch.randn(B, WIDTH, generator=generator, dtype=torch.float64)
        ).requires_grad_()
        s_BD = (
            0.6 + 0.8 * torch.rand(B, WIDTH, generator=generator, dtype=torch.float64)
        ).requires_grad_()
        index_B = torch.randperm(60, generator=generator)[:B]
        losses = objective(z_BD, s_BD, labels_B, seed=7, index_b=index_B)
        batches.append(z_BD.detach())
        indices += index_B.tolist()
    scale = reference.mean_pairwise_distance(z_BD)
    x_BD = z_BD / scale
    # A ring of 40 after two batches of 24: the second batch's last 8 rows have come round.
    memory_QD = torch.cat([batches[1][16:], batches[0][8:], batches[1][:16]]) / scale.detach()
    memory_labels_Q = torch.cat([labels_B[16:], labels_B[8:], labels_B[:16]])
    unit_BD, old_unit_QD = (
        torch.nn.functional.normalize(rows, dim=1) for rows in (x_BD, memory_QD)
    )
    beta = dict(objective.metric_loss.named_parameters()).get("beta")
    unit = {"memory_QD": old_unit_QD, "memory_labels_Q": memory_labels_Q}
    want = {
        "triplet": lambda: reference.triplet_loss(
            x_BD,
            labels_B,
            mining=config.triplet.mining,
            seed=7,
            memory_QD=memory_QD,
            memory_labels_Q=memory_labels_Q,
        ),
        "margin": lambda: reference.margin_loss(unit_BD, labels_B, beta=beta, seed=7, **unit),
        "multi_similarity": lambda: reference.multi_similarity_loss(unit_BD, labels_B, **unit),
    }[config.metric]() + 2 * reference.multi_cluster_ranking(x_BD, s_BD, memory_QD=memory_QD)
    torch.testing.assert_close(losses.total, want, rtol=1e-12, atol=0)
    leaves = [z_BD, s_BD, *objective.parameters()]
    got = torch.autograd.grad(losses.total, leaves)
    for ours, theirs in zip(got, torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    newest = dict(zip(indices[8:48], torch.cat(batches)[8:48], strict=True))
    moves = [
        float((z - newest[image]).norm()) / scale.item()
        for z, image in zip(batches[2], indices[48:], strict=True)
        if image in newest
    ]
    assert int(losses.drift_images) == len(moves) > 3
    assert float(losses.drift) == pytest.approx(sum(moves) / len(moves), rel=1e-12)


def test_only_training_fills_the_memory_and_images_must_be_told() -> None:
    objective = Objective(
        LossConfig(memory=MemoryConfig(rows=40, start_step=0)),
        classes=CLASSES,
        images_per_class=EACH,
        width=WIDTH,
    )
    z_BD, s_BD, labels_B = (
        torch.randn(B, WIDTH),
        torch.ones(B, WIDTH),
        torch.arange(CLASSES).repeat_interleave(EACH),
    )
    objective.eval()(z_BD, s_BD, labels_B, index_b=torch.arange(B))
    assert objective.memory.taken.tolist() == [0, 0]
    objective.train()(z_BD, s_BD, labels_B, index_b=torch.arange(B))
    assert objective.memory.taken.tolist() == [1, B]
    with pytest.raises(ValueError, match="index_b is missing"):
        objective(z_BD, s_BD, labels_B)


def three_steps(
    metric: str,
    rank: int,
    world_size: int,
    *,
    checkpoint: dict[str, Tensor] | None = None,
    first: int = 0,
) -> tuple[list[list[float]], dict[str, Tensor], dict[str, Tensor]]:
    """Steps first..2 on one rank's share of fixed batches, in float64, by plain gradient descent on
    gradients averaged over ranks: each step's StepLoss, the state after step 1 and at the end."""
    torch.manual_seed(0)
    config = LossConfig(metric=metric, memory=MemoryConfig(rows=30, start_step=1))  # type: ignore[arg-type]
    module = (
        TrainingModule(
            EmbeddingNetwork(MODEL, image_size=16), config, classes=CLASSES, images_per_class=EACH
        )
        .double()
        .train()
    )
    if checkpoint is not None:
        module.load_state_dict(checkpoint)
    share, losses, state = B // world_size, [], {}
    for step in range(first, 3):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (B, 16, 16, 3), dtype=torch.uint8, generator=generator)
        labels, index = (
            torch.arange(CLASSES).repeat_interleave(EACH),
            torch.randperm(60, generator=generator)[:B],
        )
        own = slice(rank * share, (rank + 1) * share)
        got: StepLoss = module(images[own], labels[own], step, None, index[own])
        module.zero_grad()
        got.total.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    if world_size > 1:
                        torch.distributed.all_reduce(parameter.grad)
                    parameter -= 1e-3 * parameter.grad / world_size
        losses.append([value.item() for value in got])
        if step == 1:
            state = {name: value.clone() for name, value in module.state_dict().items()}
    return losses, state, module.state_dict()


def on_rank(metric: str) -> tuple[list[list[float]], dict[str, Tensor], dict[str, Tensor]]:
    import torch.distributed as dist

    return three_steps(metric, dist.get_rank(), dist.get_world_size())


@pytest.mark.dist
@pytest.mark.parametrize("metric", ["triplet", "margin", "multi_similarity"])
def test_two_ranks_are_one(two_ranks: Ranks, metric: str) -> None:
    losses, _, state = three_steps(metric, 0, 1)
    (first_losses, _, first), (second_losses, _, second) = two_ranks(on_rank, metric)
    assert first_losses == second_losses and len(losses) == 3
    for ours, want in zip(first_losses, losses, strict=True):
        assert ours == pytest.approx(want, rel=1e-9)
    assert losses[1][-1] > 0, "no image came again"
    assert any("memory" in name for name in state)
    for name, value in state.items():
        torch.testing.assert_close(
            first[name], value, rtol=1e-8, atol=1e-11, msg=lambda text, of=name: f"{of}: {text}"
        )
        if "memory" in name:
            assert torch.equal(first[name], second[name])


def test_a_state_dict_holds_the_memory() -> None:
    losses, after_two, end = three_steps("triplet", 0, 1)
    resumed, _, again = three_steps("triplet", 0, 1, checkpoint=after_two, first=2)
    assert resumed == losses[2:]
    assert all(torch.equal(value, again[name]) for name, value in end.items())
    # A memory that has been in use notices that another was copied into it.
    used, fresh = (CrossBatchMemory(rows=7, width=WIDTH, start_step=0) for _ in range(2))
    used.add(*some_rows(5, seed=1))
    used.load_state_dict(fresh.state_dict())
    assert len(used.behind(*some_rows(3, seed=2)[:2])[0]) == 3


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ("--set.loss.metric", "proxy_anchor", "--set.loss.memory.rows", "64"),
            "proxy_anchor meets no rows",
        ),
        (("--set.loss.memory.rows", "64", "--set.optim.steps", "500"), "start_step is 1000"),
        (("--set.loss.memory.rows", "-1"), "loss.memory.rows is -1"),
    ],
)
def test_what_no_run_can_use_is_refused(overrides: tuple[str, ...], named: str) -> None:
    with pytest.raises(InputError, match=named):
        configure("homeware_conv4", [*overrides]).check()


def test_a_run_logs_how_far_images_moved(
    shard_set: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    done = forked_namr(
        "train",
        "homeware_conv4",
        "--run-dir",
        tmp_path / "run",
        *small_run(shard_set, steps=6),
        "--set.loss.memory.rows",
        36,
        "--set.loss.memory.start_step",
        3,
        "--set.train.tensorboard",
        "False",
    )
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    logged = [line.get("drift_images", 0) for line in lines if "loss" in line]
    sampling, images = Sampling(classes_per_batch=6, images_per_class=3), []
    for epoch in range(3):  # of two batches of 6 × 3
        plan = epoch_plan(shard_set.index("train"), sampling, seed=0, epoch=epoch)
        images += [set(batch.flatten().tolist()) for batch in plan]
    held = [set().union(*images[max(0, step - 2) : step]) for step in range(6)]
    assert (
        logged == [len(now & before) for now, before in zip(images, held, strict=True)]
        and sum(logged) > 4
    )
    assert all(line["drift"] > 0 for line in lines if "drift" in line)
