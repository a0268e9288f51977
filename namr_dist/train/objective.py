"""What is minimised: the metric loss on z plus λ times multi-cluster ranking on (z, s), and the
loss of learnt centres where there are some, over the global batch.

Shapes: b rows of one rank, B rows of all ranks, N candidates, D width, W ranks. Formulas:
docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from namr_dist.config import LossConfig, StructureConfig
from namr_dist.losses import registry
from namr_dist.losses.centres import LearntCentres
from namr_dist.losses.memory import CrossBatchMemory
from namr_dist.losses.multi_cluster import MultiClusterRankingRows
from namr_dist.losses.plain import PlainRows
from namr_dist.losses.rows import (
    Batches,
    Rows,
    RowsLoss,
    ScaledRows,
    scaled_rows,
    with_gradients,
)
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.gather import RowGather, Traffic, count_rows, for_averaged_gradients
from namr_dist.structure.centres import ROWS_A_CENTRE, Centres
from namr_dist.structure.recent import RecentRows
from namr_dist.train.phases import Phases


class StepLoss(NamedTuple):
    """The parts of one step's loss, each a scalar. Only `total` carries a gradient.

    A tuple, because ZeRO-3 finds the tensors that a module returns in tuples, and not in
    dataclasses.
    """

    total: Tensor
    metric: Tensor
    ranking: Tensor
    structure: Tensor
    """Of learnt centres; 0 without them."""
    drift: Tensor
    """How far the batch's images have moved since the memory took them, in units of the mean
    pairwise distance: a mean over those that it holds."""
    drift_images: Tensor
    """How many those are; 0 without a memory."""


def build_metric_loss(
    config: LossConfig, *, classes: int, images_per_class: int, width: int
) -> RowsLoss:
    """The baseline loss that the configuration names, for labels 0..classes-1, so many rows of each
    in a batch.

    Raises InputError for a name that is no loss, and for a loss from outside that does not serve.
    """
    batches = Batches(
        classes=classes,
        images_per_class=images_per_class,
        width=width,
        memory=config.memory.rows > 0,
    )
    known = registry.find(config.metric)
    loss: RowsLoss = (
        PlainRows.configured(config, batches)
        if known is None
        else known.load().configured(known.settings(config), batches)
    )
    return loss


def build_structure_loss(
    structure: StructureConfig, loss: LossConfig, *, centres: Centres
) -> LearntCentres | None:
    """The loss of learnt centres, which are as many as `centres` and searched as these are; None
    for another form of the structure embedding."""
    if structure.form != "learnt":
        return None
    M, D = centres.centres_MD.shape
    return LearntCentres(
        centres=M,
        width=D,
        unit=centres.unit,
        objective=structure.objective,
        pull=structure.pull,
        sharpness=structure.sharpness,
        nearest=centres.nearest,
        clusters=loss.ranking.clusters,
        spread=loss.ranking.spread,
        floor=loss.ranking.floor,
        rank_sharpness=loss.ranking.sharpness,
    )


class Objective(nn.Module):
    """The loss of the global batch from one rank's embeddings: metric loss + λ · multi-cluster
    ranking, and `structure_weight` times the loss of learnt centres, if there are some.

    Every rank calls it with its own rows and gets the same loss. Its backward pass gives the rank
    the whole gradient of its own rows, as anchors and as candidates of all others, and sends
    nothing: what it needs was gathered with the loss. Made for optimizers that average gradients
    over ranks (DeepSpeed, DDP, FSDP): the gradients they arrive at are those of one process with
    the whole batch, for the loss's own parameters too.

    With a memory, embeddings of earlier batches are candidates too: constants, divided by the
    batch's scale. A call in training mode is a step of its own: the batch is remembered. The
    memory's buffers are equal on all ranks as they are; DDP need not send them at every forward
    (its broadcast_buffers=False).

    classes: labels are 0..classes-1.  images_per_class: K, rows of a class in a batch.  width: D.
    recent_rows: latest embeddings to keep, for centres that are fitted while training goes on.
    structure_loss: learnt centres.
    """

    def __init__(
        self,
        config: LossConfig,
        *,
        classes: int,
        images_per_class: int,
        width: int,
        recent_rows: int = 0,
        structure_loss: LearntCentres | None = None,
        structure_weight: float = 1.0,
        phases: Phases | None = None,
    ) -> None:
        super().__init__()
        self.metric_loss = build_metric_loss(
            config, classes=classes, images_per_class=images_per_class, width=width
        )
        ranking = config.ranking
        self.ranking_loss = MultiClusterRankingRows(
            clusters=ranking.clusters,
            spread=ranking.spread,
            floor=ranking.floor,
            sharpness=ranking.sharpness,
            statistics=ranking.statistics,
            geometry=ranking.geometry,
        )
        self.ranking_weight = ranking.weight
        self.structure_loss = structure_loss
        self.structure_weight = structure_weight
        memory = config.memory
        self.memory = (
            CrossBatchMemory(rows=memory.rows, width=width, start_step=memory.start_step)
            if memory.rows
            else None
        )
        self.recent = RecentRows(rows=recent_rows, width=width) if recent_rows else None
        self.phases = phases or Phases(torch.device("cpu"))
        self.traffic = Traffic()

    def forward(
        self,
        z_bD: Tensor,
        s_bD: Tensor,
        labels_b: Tensor,
        *,
        seed: int = 0,
        counts_W: Sequence[int] | None = None,
        index_b: Tensor | None = None,
        ranking_share: float = 1.0,
    ) -> StepLoss:
        """seed: fixes what the loss draws at random. counts_W: rows of each rank (None: asked for).
        Ranks may hold different numbers of rows, or none. index_b: which image each row is of; a
        memory needs it, and so do centres that are learnt from views. ranking_share: of λ, while it
        rises. Half types are gathered and computed in float32. Raises ValueError for fewer than two
        rows in all."""
        z_bD, s_bD = (
            rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (z_bD, s_bD)
        )
        with self.phases("gather"):
            gather = RowGather(
                counts_W or count_rows(len(labels_b), z_bD.device), traffic=self.traffic
            )
            if sum(gather.counts_W) < 2:
                raise ValueError(
                    f"the ranks have {sum(gather.counts_W)} rows in all, and a distance needs two"
                )
            z_BD, labels_B = gather(z_bD.detach()), gather(labels_b)
            s_BD = gather(s_bD.detach()) if self.ranking_weight else None
            if self.memory is not None and index_b is None:
                raise ValueError(
                    "index_b is missing: with a memory, pass which image each row is of"
                )
            index_B = gather(index_b) if index_b is not None and self._asks_for_images else None
        with self.phases("loss"):
            z_ND, labels_N = (
                self.memory.behind(z_BD, labels_B) if self.memory is not None else (z_BD, labels_B)
            )
            # Distances in units of their mean: margins and centres mean the same at any scale of z.
            rows = Rows(
                z_bD=z_bD.detach(),
                labels_b=labels_b,
                z_ND=z_ND,
                labels_N=labels_N,
                offset=gather.offset,
                gather=gather,
                gather_one=gather.one_each,
                ranks=len(gather.counts_W),
            )
            scaled = scaled_rows(rows, batch=len(z_BD))
            losses = self._loss(
                scaled,
                z_bD,
                s_bD,
                s_BD,
                index_B,
                batch=len(z_BD),
                seed=seed,
                share=ranking_share,
            )
            if self.recent is not None and self.training:
                self.recent.add(z_BD)
            if self.memory is None or index_B is None:
                return losses
            distance, images = self.memory.moved(z_BD, index_B)
            if self.training:
                self.memory.add(z_BD, labels_B, index_B)
            return losses._replace(drift=distance / scaled.mean, drift_images=images)

    @property
    def _asks_for_images(self) -> bool:
        views = self.structure_loss is not None and self.structure_loss.objective == "views"
        return self.memory is not None or views

    def _loss(
        self,
        scaled: ScaledRows,
        z_bD: Tensor,
        s_bD: Tensor,
        s_BD: Tensor | None,
        index_B: Tensor | None,
        *,
        batch: int,
        seed: int,
        share: float,
    ) -> StepLoss:
        rows, weight = scaled.rows, share * self.ranking_weight
        metric, grad_bD = self.metric_loss(rows, seed=seed)
        zero = torch.zeros_like(metric.detach())
        ranking, known = zero, []
        if s_BD is not None:
            ranking, grad_ranking_bD, grad_s_bD = self.ranking_loss(rows, s_bD.detach(), s_BD)
            grad_bD = grad_bD + weight * grad_ranking_bD
            known.append((s_bD, weight * grad_s_bD))
        # The metric loss itself carries the gradients of its own parameters, as learnt centres do.
        value = metric + weight * ranking
        known.append((metric, torch.ones_like(metric)))
        structure = zero
        if self.structure_loss is not None:
            of_batch = replace(rows, z_ND=rows.z_ND[:batch], labels_N=rows.labels_N[:batch])
            structure, grad_structure_bD = self.structure_loss(of_batch, index_B)
            value = value + self.structure_weight * structure
            grad_bD = grad_bD + self.structure_weight * grad_structure_bD
            known.append((structure, torch.full_like(structure, self.structure_weight)))
        total = with_gradients(value, (z_bD, scaled.through(grad_bD)), *known)
        return StepLoss(
            total=for_averaged_gradients(total),
            metric=metric.detach(),
            ranking=ranking,
            structure=structure.detach(),
            drift=zero,
            drift_images=zero,
        )


class TrainingModule(nn.Module):
    """Network and losses as the one module that DeepSpeed drives.

    The losses are inside, because ZeRO-3 gathers a parameter (a proxy, β) only within a forward of
    its engine, and evaluation comes through the same forward for the same reason.
    """

    def __init__(
        self,
        network: EmbeddingNetwork,
        config: LossConfig,
        *,
        classes: int,
        images_per_class: int,
        structure: StructureConfig | None = None,
        phases: Phases | None = None,
    ) -> None:
        """structure: how the centres of the network come about; None: as in no settings."""
        super().__init__()
        self.network = network
        structure, centres = structure or StructureConfig(), network.centres
        self.objective = Objective(
            config,
            classes=classes,
            images_per_class=images_per_class,
            width=network.sample_head.out_features,
            recent_rows=ROWS_A_CENTRE * len(centres.centres_MD) if centres else 0,
            structure_loss=build_structure_loss(structure, config, centres=centres)
            if centres
            else None,
            structure_weight=structure.weight,
            phases=phases,
        )

    def forward(
        self,
        images_bHW3: Tensor,
        labels_b: Tensor | None = None,
        seed: int = 0,
        counts_W: Sequence[int] | None = None,
        index_b: Tensor | None = None,
        ranking_share: float = 1.0,
    ) -> StepLoss | tuple[Tensor, Tensor]:
        """Without labels: this rank's (z, s), what is searched by. With labels: the loss of the
        global batch, the same on all ranks."""
        features_bF = self.network.features(images_bHW3)
        if labels_b is None:
            return self.network.embedding(features_bF)
        with self.objective.phases("heads"):
            z_bD, s_bD = self.network.heads(features_bF)
        return self.objective(
            z_bD,
            s_bD,
            labels_b,
            seed=seed,
            counts_W=counts_W,
            index_b=index_b,
            ranking_share=ranking_share,
        )
