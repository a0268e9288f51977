"""The only list of metric losses: name, settings, module. All else that lists losses reads it.

To add one: its settings and its row below, and its module in this folder (docs/design.md, "What is
added, and where"). Modules are named by string and imported on use, so that the command line and
the configuration know all losses without torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from namr_dist.errors import InputError
from namr_dist.named_code import is_named_code


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    """Triplet loss on embeddings scaled to mean pairwise distance 1."""

    margin: float = 0.2
    """Margin, in units of the mean pairwise distance."""
    mining: Literal["semihard", "hardest", "distance_weighted"] = "semihard"
    """Which negatives are met."""


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    """Margin loss with distance-weighted negatives (Wu et al. 2017)."""

    alpha: float = 0.2
    """α: half the gap between positives and negatives."""
    beta: float = 1.2
    """β: boundary between them at the start; it is learnt."""


@dataclass(frozen=True, kw_only=True)
class MultiSimilarityConfig:
    """Multi-similarity loss with its own mining of pairs (Wang et al. 2019)."""

    alpha: float = 2.0
    """α: sharpness of the positives' term."""
    beta: float = 50.0
    """β: sharpness of the negatives' term."""
    base: float = 0.5
    """λ: cosine similarity at which both are balanced."""
    epsilon: float = 0.1
    """ε: slack of the mining."""


@dataclass(frozen=True, kw_only=True)
class ProxyAnchorConfig:
    """Proxy-anchor loss with a learnt proxy for each class (Kim et al. 2020)."""

    alpha: float = 32.0
    """α: sharpness."""
    margin: float = 0.1
    """Margin in cosine similarity."""


@dataclass(frozen=True, kw_only=True)
class MetricLossConfig:
    """Which labelled loss is minimised, and the settings of each that the package has."""

    metric: str = "triplet"
    """The labelled loss on the sample embedding: triplet, margin, multi_similarity, proxy_anchor,
    or module:NAME for any PyTorch loss (embeddings, labels) → scalar, such as
    pytorch_metric_learning.losses:SupConLoss."""
    options: str = ""
    """Keywords for the constructor of a loss that is given as module:NAME, as a JSON object;
    num_classes and embedding_size are filled in where it takes them."""
    triplet: TripletConfig = field(default_factory=TripletConfig)
    margin: MarginConfig = field(default_factory=MarginConfig)
    multi_similarity: MultiSimilarityConfig = field(default_factory=MultiSimilarityConfig)
    proxy_anchor: ProxyAnchorConfig = field(default_factory=ProxyAnchorConfig)


@dataclass(frozen=True, kw_only=True)
class MetricLoss:
    """One loss of the package."""

    name: str
    """Value of loss.metric, and name of its section of settings in MetricLossConfig."""
    title: str
    """In a sentence."""
    module: str
    """module:NAME of its class in the package; see `rows.RowsLoss`."""
    op: str
    """Name of the operator in namr_dist.kernels that it rests on."""
    distance: Literal["euclidean", "cosine"] = "cosine"
    """By which its embeddings are searched: that of the loss itself."""
    memory: bool = True
    """Whether it can meet rows of earlier batches."""
    checked: Mapping[str, Any] = field(default_factory=dict)
    """Settings that checks of the loss run through, by name; none: the settings' defaults, under
    its own name."""

    def settings(self, config: MetricLossConfig) -> Any:
        """The loss's section of a configuration."""
        return getattr(config, self.name)

    def load(self) -> Any:
        """Its class, a `rows.RowsLoss`."""
        module, _, name = self.module.partition(":")
        return getattr(importlib.import_module(module), name)


LOSSES: tuple[MetricLoss, ...] = (
    MetricLoss(
        name="triplet",
        title="triplet loss",
        module="namr_dist.losses.triplet:TripletRows",
        distance="euclidean",
        op="triplet_loss",
        checked={
            "triplet semihard": TripletConfig(),
            "triplet hardest": TripletConfig(mining="hardest"),
            "triplet distance-weighted": TripletConfig(mining="distance_weighted"),
        },
    ),
    # β below its default, or as many pairs of a random batch would pull at it as push.
    MetricLoss(
        name="margin",
        title="margin loss",
        module="namr_dist.losses.margin:MarginRows",
        op="margin_loss",
        checked={"margin": MarginConfig(beta=1.0)},
    ),
    MetricLoss(
        name="multi_similarity",
        title="multi-similarity loss",
        module="namr_dist.losses.multi_similarity:MultiSimilarityRows",
        op="multi_similarity_loss",
        checked={"multi-similarity": MultiSimilarityConfig()},
    ),
    MetricLoss(
        name="proxy_anchor",
        title="proxy-anchor loss",
        module="namr_dist.losses.proxy_anchor:ProxyAnchorRows",
        op="proxy_anchor_loss",
        memory=False,
        checked={"proxy-anchor": ProxyAnchorConfig()},
    ),
)
NAMES: tuple[str, ...] = tuple(loss.name for loss in LOSSES)


def find(name: str) -> MetricLoss | None:
    """The package's loss of this name; None for a loss from outside, given as module:NAME.

    Raises InputError for what is neither, naming the nearest.
    """
    known = {loss.name: loss for loss in LOSSES}
    if name in known:
        return known[name]
    if is_named_code(name):
        return None
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"loss.metric is {name!r}; {hint}known are {', '.join(NAMES)}, and module:NAME for a loss of your "
        "own"
    )


def title(name: str) -> str:
    """What a sentence calls the loss that a configuration names, one of another version or from
    outside too."""
    return next((loss.title for loss in LOSSES if loss.name == name), name)
