"""Heads trained on the features of a frozen backbone: what losses and structure embeddings are
worth, in seconds a run instead of minutes.

Each picture is embedded once: as it is, and in some augmented views. Heads then train with the
objective, batches and schedules of a whole run, in one process and without DeepSpeed.

Shapes: V augmented views, N training images, F features, B rows of a batch, D width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from namr_dist.config import Config
from namr_dist.data.read.augment import TrainTransform
from namr_dist.data.read.plan import augment_seed, epoch_plan
from namr_dist.data.read.stream import ShardImages, stream
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.data.shardset.manifest import SplitIndex
from namr_dist.errors import DamagedFileError
from namr_dist.json_file import parse_json
from namr_dist.model.heads import SampleHead, StructureHead
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import only_rank
from namr_dist.retrieval.evaluate import evaluate_sample
from namr_dist.structure.centres import Centres
from namr_dist.text import say
from namr_dist.train.checkpoints.network import initial_network
from namr_dist.train.checkpoints.verified_file import read_tensors, write_tensors
from namr_dist.train.checks import centres_for, check_run
from namr_dist.train.embed import embed, test_transform
from namr_dist.train.engine import parameter_groups
from namr_dist.train.objective import TrainingModule
from namr_dist.train.schedule import lr_factor, ranking_share
from namr_dist.train.structure_fit import Embedded, Fitted, fit_structure, rho_of

_BATCH = 64
_VIEW_STREAM = 7


@dataclass(frozen=True, kw_only=True)
class Features:
    """A set's pictures, as a frozen backbone sees them."""

    views_VNF: Tensor
    """augmented training images"""
    train_NF: Tensor
    """the same as they are"""
    validation: tuple[Tensor, SplitIndex]
    test: tuple[Tensor, SplitIndex]
    training_set: TrainingSet


def embed_once(config: Config, file: Path, *, views: int) -> Features:
    """The features of all splits, read from `file` if it holds just these; else made and written
    there."""
    assert config.data.validation_split is not None
    training_set = check_run(config, world_size=1, local_rank=0)
    manifest, data = training_set.manifest, config.data
    indices = {
        "train": training_set.index,
        "validation": manifest.index(config.data.validation_split),
        "test": manifest.index(data.test_split),
    }
    identity = {
        "images": {name: manifest.hash_of(index) for name, index in indices.items()},
        "backbone": config.model.backbone,
        "test transform": [config.test_size, data.test_crop],
        "views": [views, *(str(value) for value in _augmentation(config).__dict__.values())],
    }
    tensors = _read(file, identity)
    if tensors is None:
        tensors = _embed_all(config, training_set, indices, views=views)
        write_tensors(file, tensors, {"identity": json.dumps(identity)})
    return Features(
        views_VNF=tensors["views"],
        train_NF=tensors["train"],
        validation=(tensors["validation"], indices["validation"]),
        test=(tensors["test"], indices["test"]),
        training_set=training_set,
    )


def _augmentation(config: Config) -> TrainTransform:
    # At the size that the backbone will see at test time: frozen, it cannot adapt to another.
    return TrainTransform.configured(config.data, size=config.test_size)


def _read(file: Path, identity: dict[str, Any]) -> dict[str, Tensor] | None:
    if not file.exists():
        return None
    try:
        tensors, metadata = read_tensors(file)
    except DamagedFileError as error:
        say(f"WARNING: {file} is damaged ({error}); it is made again", file=sys.stderr)
        return None
    made_for = parse_json(metadata.get("identity", "null"), f"{file}: identity", f"remove {file}")
    return tensors if made_for == identity else None


def _embed_all(
    config: Config, training_set: TrainingSet, indices: dict[str, SplitIndex], *, views: int
) -> dict[str, Tensor]:
    rank, manifest = only_rank(), training_set.manifest
    network = initial_network(config, device=rank.device, pretrained=True).eval()

    def forward(images_bHW3: Tensor) -> tuple[Tensor]:
        return (network.features(images_bHW3),)

    tensors: dict[str, Tensor] = {}
    for name, index in indices.items():
        images = ShardImages(manifest, index, test_transform(config))
        (features_NF,) = embed(
            forward, images, rank=rank, batch_size=_BATCH, workers=config.data.workers
        )
        tensors[name] = torch.from_numpy(features_NF)
    images = ShardImages(manifest, indices["train"], _augmentation(config))
    seen_VNF = []
    for view in range(views):
        rows = range(len(indices["train"]))
        plan = [
            [
                (row, augment_seed(seed=0, step=view, slot=row))
                for row in rows[start : start + _BATCH]
            ]
            for start in range(0, len(rows), _BATCH)
        ]
        with torch.no_grad():
            parts = [
                network.features(batch.images_bHW3.to(rank.device)).cpu()
                for batch in stream(images, plan, workers=config.data.workers)
            ]
        seen_VNF.append(torch.cat(parts))
    return tensors | {"views": torch.stack(seen_VNF)}


class HeadsNetwork(EmbeddingNetwork):
    """The network without its backbone: features in place of images."""

    def __init__(
        self, config: Config, features: int, centres: Centres | None, *, weights_of_one: bool
    ) -> None:
        nn.Module.__init__(self)
        model = config.model
        self.backbone = nn.Identity()  # type: ignore[assignment]
        self.sample_head = SampleHead(features, model.width)
        self.structure_head = StructureHead(
            features, model.width, hidden=model.structure_hidden, delta=model.delta
        )
        self.centres = centres
        self.weights_of_one = weights_of_one

    def features(self, features_bF: Tensor) -> Tensor:
        """As they are."""
        return features_bF

    def heads(self, features_bF: Tensor) -> tuple[Tensor, Tensor]:
        """(b, F) → z, weights, both (b, D)."""
        z_bD = self.sample_head(features_bF)
        weights_bD = (
            torch.ones_like(z_bD) if self.weights_of_one else self.structure_head(features_bF)
        )
        return z_bD, weights_bD


@dataclass(frozen=True, kw_only=True)
class Training:
    """How heads are trained, beyond their configuration."""

    weights_of_one: bool = False
    """s = 1 in the ranking loss"""
    spread_penalty: float = 0.0
    """times the squared coefficient of variation of the batch's distances, added to the loss"""
    stops: tuple[int, ...] = ()
    """steps at which validation may choose to stop; none: all steps are made"""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Embeddings by trained heads, and the centres among them."""

    z: dict[str, np.ndarray]
    """(N, D) of "train", "validation" and "test" """
    rho: dict[str, np.ndarray]
    """(N,) of "validation" and "test" """
    centres: Centres
    fitted: Fitted
    step: int
    """after which they are those of"""


def train_heads(features: Features, config: Config, training: Training) -> Trained:
    """Train heads by the configuration's loss, optimizer and seed, and fit the structure embedding
    to them."""
    steps, seed, index = config.optim.steps, config.train.seed, features.training_set.index
    torch.manual_seed(seed)
    centres = Centres(
        centres=centres_for(config.structure, images=len(index)),
        width=config.model.width,
        nearest=config.structure.nearest,
        unit=config.distance == "cosine",
    )
    network = HeadsNetwork(
        config,
        features.train_NF.shape[1],
        centres,
        # Weights that no loss reads need not be computed.
        weights_of_one=training.weights_of_one or not config.loss.ranking.weight,
    )
    module = TrainingModule(
        network,
        config.loss,
        classes=features.training_set.classes,
        images_per_class=config.data.images_per_class,
        structure=config.structure,
    ).train()
    optimizer = torch.optim.AdamW(parameter_groups(module, config.optim), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    label_N = torch.from_numpy(np.unique(index.label_N, return_inverse=True)[1])
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for step, (view_B, index_B) in enumerate(_batches(features, config)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, config.optim)
        rows_BF = features.views_VNF[view_B, index_B]
        share = ranking_share(config.loss.ranking, passes=step * len(index_B) / len(index))
        losses = module(
            rows_BF,
            label_N[index_B],
            (seed << 32) + step,
            (len(index_B),),
            index_B,
            share,
        )
        total = losses.total
        if training.spread_penalty:
            total = total + training.spread_penalty * _spread(network.sample_head(rows_BF))
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        if config.optim.clip:
            nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip)
        optimizer.step()
        if step + 1 in training.stops:
            figures = evaluate_sample(
                _embed(network, features.validation[0]),
                features.validation[1].label_N,
                distance=config.distance,
            )
            if best is None or figures["MAP@R"] > best[0]:
                state = {name: value.clone() for name, value in network.state_dict().items()}
                best = figures["MAP@R"], step + 1, state
    if best is not None:
        network.load_state_dict(best[2])
    learnt = module.objective.structure_loss
    return _finish(
        network,
        features,
        config,
        learnt_MD=learnt.centres(learnt.moves).detach() if learnt else None,
        step=best[1] if best else steps,
    )


def _finish(
    network: HeadsNetwork,
    features: Features,
    config: Config,
    *,
    learnt_MD: Tensor | None,
    step: int,
) -> Trained:
    centres = network.centres
    assert centres is not None
    validation_VF, chooser = features.validation
    z = {
        "train": _embed(network, features.train_NF),
        "validation": _embed(network, validation_VF),
        "test": _embed(network, features.test[0]),
    }
    fitted = fit_structure(
        centres,
        Embedded(z_ND=z["train"], label_N=features.training_set.index.label_N),
        Embedded(z_ND=z["validation"], label_N=chooser.label_N, role_N=chooser.role_N),
        gamma=config.structure.gamma,
        seed=config.train.seed,
        host=HostGroup(),
        learnt_MD=learnt_MD,
    )
    rho = {name: rho_of(centres, z[name]) for name in ("validation", "test")}
    return Trained(z=z, rho=rho, centres=centres, fitted=fitted, step=step)


def _batches(features: Features, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """(view (B,), image (B,)) of every step: the plan of a whole run, and a view at random; where
    `data.views` shows an image several times in a row, different ones."""
    index, seen = features.training_set.index, config.data.views
    sampling = replace(features.training_set.sampling, views=seen)
    views, seed = len(features.views_VNF), config.train.seed
    step = 0
    for epoch in range(config.optim.steps):
        for batch_PK in epoch_plan(index, sampling, seed=seed, epoch=epoch):
            if step == config.optim.steps:
                return
            rng = np.random.default_rng([_VIEW_STREAM, seed, step])
            index_B = torch.from_numpy(batch_PK.reshape(-1))
            view_B = rng.integers(views, size=len(index_B))
            if seen > 1:
                view_B = (view_B.reshape(-1, seen)[:, :1] + np.arange(seen)).reshape(-1) % views
            yield torch.from_numpy(view_B), index_B
            step += 1


def _spread(z_BD: Tensor) -> Tensor:
    distances_P = nn.functional.pdist(z_BD)
    return distances_P.var() / distances_P.mean().square()


@torch.no_grad()
def _embed(network: HeadsNetwork, features_NF: Tensor) -> np.ndarray:
    z_ND: np.ndarray = network.sample_head(features_NF).numpy()
    return z_ND
