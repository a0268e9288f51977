"""One training step on a fixed batch, in every way that parity is measured for.

Shapes: B rows of all ranks, b of one, D width, C classes.
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from namr_dist.config import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RankingConfig,
    StructureConfig,
    TrainConfig,
)
from namr_dist.kernels import reference
from namr_dist.losses import registry
from namr_dist.losses.centres import CentresObjective
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.ranks import Rank
from namr_dist.structure.centres import Centres
from namr_dist.train.objective import StepLoss, TrainingModule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Way = Literal["definition", "DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"]
Precision = Literal["float64", "float32"]
_Inputs = tuple[Tensor, Tensor, int, "tuple[int, ...] | None", Tensor]
"""Images, labels, seed, counts and which image each is, as TrainingModule.forward takes them."""

LOSSES = {
    name: LossConfig(metric=loss.name, **{loss.name: settings})
    for loss in registry.LOSSES
    for name, settings in loss.checked.items()
}
"""Every loss of the package, in each of the ways it computes."""
CONV4 = ModelConfig(
    backbone="conv4", pretrained=False, batchnorm="train", width=16, structure_hidden=16
)

_CLASSES, _EACH, _SIZE, _SEED = 8, 3, 16, 7
_INDEX = torch.arange(_CLASSES * _EACH) % (_CLASSES * _EACH // 2)
"""Which image each is: two views of each, which lie on different ranks."""
_CENTRES, _NEAREST, _PULL = 6, 3, 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table."""

    loss: str
    """A key of LOSSES."""
    namr: bool
    """Multi-cluster ranking is added to it."""
    way: Way
    """definition: one process, the definitions of kernels/reference differentiated by autograd."""
    ranks: int
    dtype: Precision
    """Of the parameters, the network and the loss."""
    learnt: CentresObjective | None = None
    """What centres are learnt by at the same time, if they are."""
    model: ModelConfig = CONV4
    pieces: int = 1
    """Pieces in which a rank's batch passes the backbone."""
    rows: tuple[int, ...] | None = None
    """Rows of each rank; None: equal shares."""
    counted: bool = True
    """Whether the ranks are told how many rows each has, or ask."""

    @property
    def rows_by_rank(self) -> tuple[int, ...]:
        """Rows of each rank, whether given or shared equally."""
        return self.rows or (_CLASSES * _EACH // self.ranks,) * self.ranks


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one rank arrived at."""

    loss: float
    gradients: dict[str, np.ndarray]
    """By parameter name, as the optimizer gets them; 0 where there is none. Only the first rank
    fills them in."""


def step_alone(case: Case) -> Step:
    """One process, no process group, no wrapper: the case's way and ranks do not matter."""
    module, images, labels = make_batch(case)
    losses = module(images, labels, _SEED, None, _INDEX)
    losses.total.backward()
    return Step(loss=losses.total.item(), gradients=_gradients(module))


def step_by_definition(case: Case) -> Step:
    """One process whose loss is as kernels/reference defines it, and differentiated by autograd."""
    module, images, labels_B = make_batch(case)
    config = _loss_config(case)
    z_BD, s_BD = module.network.heads(module.network.features(images))
    x_BD = z_BD / reference.mean_pairwise_distance(z_BD)
    loss = module.objective.metric_loss.definition(x_BD, labels_B, seed=_SEED)
    if case.namr:
        loss = loss + config.ranking.weight * reference.multi_cluster_ranking(x_BD, s_BD)
    learnt = module.objective.structure_loss
    if learnt is not None:
        # The share of its gradient that reaches z.
        pulled_BD = z_BD.detach() + learnt.pull * (z_BD - z_BD.detach())
        loss = loss + learnt.definition(pulled_BD, _INDEX)
    loss.backward()
    return Step(loss=loss.item(), gradients=_gradients(module))


def step_on_rank(case: Case) -> Step:
    """This rank's part of one training step; every rank of the process group calls it."""
    rank = dist.get_rank()
    module, images, labels = make_batch(case)
    rows = case.rows_by_rank
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    inputs = (images[own], labels[own], _SEED, rows if case.counted else None, _INDEX[own])
    if case.way == "DDP":
        return _ddp_step(module, inputs, unused=not case.namr)
    engine = zero_engine(module, case)
    try:
        return _zero_step(engine, inputs)
    finally:
        engine.destroy()


def _ddp_step(module: TrainingModule, inputs: _Inputs, *, unused: bool) -> Step:
    # Without NAMR the structure head has no part in the loss, which DDP must be told.
    wrapped = nn.parallel.DistributedDataParallel(module, find_unused_parameters=unused)
    losses: StepLoss = wrapped(*inputs)
    losses.total.backward()
    return Step(
        loss=losses.total.item(), gradients=_gradients(module) if dist.get_rank() == 0 else {}
    )


def zero_engine(module: TrainingModule, case: Case) -> DeepSpeedEngine:
    """The engine that training makes for a case, but without gradient clipping."""
    from namr_dist.train.engine import make_engine, start_group

    rank = Rank(
        rank=dist.get_rank(),
        world_size=case.ranks,
        local_rank=dist.get_rank(),
        device=torch.device("cpu"),
    )
    config = Config(
        recipe="parity",
        data=DataConfig(classes_per_batch=_CLASSES, images_per_class=_EACH),
        optim=OptimConfig(clip=0.0),
        train=TrainConfig(zero_stage=int(case.way[-1])),  # type: ignore[arg-type]
    )
    start_group(rank, timedelta(minutes=2))
    _settle()
    engine = make_engine(module, config, rank)
    engine.train()
    return engine


@cache
def _settle() -> None:
    """What is done once in a process that makes many engines."""
    from deepspeed.accelerator import get_accelerator

    # ZeRO 0 refuses to reduce float64, which a CPU's accelerator does not list; it casts to float32
    # all the same.
    accelerator = get_accelerator()
    listed = accelerator.supported_dtypes()
    accelerator.supported_dtypes = lambda: [*listed, torch.float64]
    # ZeRO 3 refuses it on processors that have float16, and nowhere else.
    accelerator.is_fp16_supported = lambda: False
    # Each ZeRO-3 engine collects garbage: what the libraries hold need not be walked through every
    # time.
    gc.collect()
    gc.freeze()


def _zero_step(engine: DeepSpeedEngine, inputs: _Inputs) -> Step:
    import deepspeed

    names = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    # What the optimizer got is put in place of what it made of it: the engine then collects
    # gradients from all ranks as it collects parameters, whoever holds which part of them.
    optimizer.register_step_post_hook(_parameters_become_gradients)
    losses: StepLoss = engine(*inputs)
    engine.backward(losses.total)
    engine.step()
    with deepspeed.zero.GatheredParameters(
        list(names.values()), enabled=engine.zero_optimization_stage() == 3
    ):
        gradients = (
            {name: _array(value) for name, value in names.items()} if dist.get_rank() == 0 else {}
        )
    return Step(loss=losses.total.item(), gradients=gradients)


@torch.no_grad()
def _parameters_become_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for value in group["params"]:
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)


def _loss_config(case: Case) -> LossConfig:
    base = LOSSES[case.loss]
    return base if case.namr else dataclasses.replace(base, ranking=RankingConfig(weight=0.0))


def make_batch(case: Case) -> tuple[TrainingModule, Tensor, Tensor]:
    """The module, and all ranks' images and labels: the same at every call.

    Images are coloured patches, so that embeddings differ by more than rounding. Rows of a class
    stand at several ranks, so that every rank needs all others' rows.
    """
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(
        0, 256, (_CLASSES * _EACH, 4, 4, 3), dtype=torch.uint8, generator=generator
    )
    images = patches.repeat_interleave(_SIZE // 4, 1).repeat_interleave(_SIZE // 4, 2)
    labels = torch.arange(_CLASSES).repeat(_EACH)
    torch.manual_seed(0)
    network = EmbeddingNetwork(
        case.model,
        image_size=_SIZE,
        pieces=case.pieces,
        centres=Centres(centres=_CENTRES, width=case.model.width, nearest=_NEAREST, unit=True)
        if case.learnt
        else None,
    )
    with torch.no_grad():
        # Embeddings of an untrained network have much in common, which unit vectors lose: the
        # ranks' gradients for the bias would cancel, and their rounding stay. Quarters, because
        # ranks round a mean in other ways.
        bias = network.double().sample_head.bias
        bias.copy_((bias - (4 * network(images)[0].mean(0)).round() / 4).float())
    structure = StructureConfig()
    if case.learnt:
        structure = StructureConfig(form="learnt", objective=case.learnt, pull=_PULL)
    module = TrainingModule(
        network,
        _loss_config(case),
        classes=_CLASSES,
        images_per_class=_EACH,
        structure=structure,
    )
    learnt = module.objective.structure_loss
    if learnt is not None:
        # As after some steps; at the first, centres are rows.
        learnt.base_MD.copy_(torch.randn(learnt.base_MD.shape) / case.model.width**0.5)
        learnt.taken.fill_(_CENTRES)
    return module.to(getattr(torch, case.dtype)).train(), images, labels


def _gradients(module: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: _array(torch.zeros_like(value) if value.grad is None else value.grad)
        for name, value in module.named_parameters()
        if value.requires_grad
    }


def _array(value: Tensor) -> np.ndarray:
    """As float64, and a copy: shared memory of a tensor would need the rank to stay."""
    return value.detach().double().numpy().copy()
