"""Milliseconds of a step's loss with its gradient: as training computes it, and as plain PyTorch
does.

B rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from namr_dist.config import Config
from namr_dist.kernels.bench import eager
from namr_dist.kernels.bench.cases import CLUSTERS, PER_CLASS, Batch, Form
from namr_dist.kernels.bench.measure import (
    Spread,
    Stopwatch,
    clear_gradients,
    run_pass,
    sample,
    spread,
)
from namr_dist.train.objective import Objective

ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class LossTimes:
    """Forward and backward pass, in milliseconds."""

    ours: Spread
    eager: Spread | None
    note: str
    """Why `eager` is missing; empty where it is not."""


def time_losses(config: Config, *, rows: int, device: torch.device) -> LossTimes:
    """Both forms of the recipe's objective on the same fp32 embeddings of `rows` images, one after
    the other within a round, after a call of each that is not counted. What the GPU's allocator
    keeps for them is given back."""
    batch, watch = embeddings(config, rows=rows, device=device), Stopwatch(device)
    forms, note = {"ours": objective_form(config, rows=rows, device=device)}, why_no_eager(config)
    if not note:
        forms["eager"] = eager_form(config)
    for name in tuple(forms):
        try:
            run_pass(forms[name], batch)
        except torch.OutOfMemoryError:
            if name == "ours":
                raise
            del forms[name]
            clear_gradients(batch)
            note = "the eager form does not fit the GPU's memory"
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            times[name].append(sample("forward+backward", form, batch, watch).ms)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return LossTimes(
        ours=spread(times["ours"]), eager=None if note else spread(times["eager"]), note=note
    )


def embeddings(config: Config, *, rows: int, device: torch.device) -> Batch:
    """z in loose clusters, a class each, so that mining has something to choose; s around 1."""
    generator = torch.Generator(device).manual_seed(0)
    labels_B = torch.arange(rows, device=device) // config.data.images_per_class
    z_BD, centre_BD = torch.randn(2, rows, config.model.width, generator=generator, device=device)
    s_BD = 0.5 + torch.rand(rows, config.model.width, generator=generator, device=device)
    return Batch(
        labels_B=labels_B,
        leaves=((1.5 * z_BD + centre_BD[labels_B]).requires_grad_(), s_BD.requires_grad_()),
    )


def objective_form(config: Config, *, rows: int, device: torch.device) -> Form:
    """Training's objective on one rank, with the fused kernels where the device has them: (labels,
    z, s) → loss."""
    each = config.data.images_per_class
    objective = Objective(
        config.loss, classes=rows // each, images_per_class=each, width=config.model.width
    ).to(device)

    def form(labels_B: Tensor, z_BD: Tensor, s_BD: Tensor) -> Tensor:
        return objective(z_BD, s_BD, labels_B, counts_W=(len(labels_B),)).total

    return form


def eager_form(config: Config) -> Form:
    """The same by kernels/bench/eager.py, for a configuration that `why_no_eager` lets pass. Its
    margin is the default's, whatever the configuration says: that costs no time."""
    triplet = eager.FORMS[f"triplet-{config.loss.triplet.mining.replace('_', '-')}"]
    weight = config.loss.ranking.weight

    def form(labels_B: Tensor, z_BD: Tensor, s_BD: Tensor) -> Tensor:
        B = len(z_BD)
        # In units of the mean distance between two rows, as docs/algorithm.md defines the scale.
        x_BD = z_BD / (eager.distance(z_BD).sum() / (B * (B - 1)))
        loss = triplet(labels_B, x_BD)
        return loss + weight * eager.multi_cluster_ranking(labels_B, x_BD, s_BD) if weight else loss

    return form


def why_no_eager(config: Config) -> str:
    """What the eager forms are not written for, or an empty string."""
    loss = config.loss
    if loss.metric != "triplet" or loss.memory.rows:
        return f"no eager form of {loss.metric} with {loss.memory.rows} rows of memory is timed"
    if config.data.images_per_class != PER_CLASS:
        return f"the eager forms are for {PER_CLASS} images of a class"
    if loss.ranking.weight and (
        loss.ranking.clusters != CLUSTERS or loss.ranking.statistics != "batch"
    ):
        return f"the eager form of multi-cluster ranking is for {CLUSTERS} clusters and the batch's statistics"
    return ""
