"""A run's whole configuration: frozen dataclasses, one per subject, a line of text under each
field.

A recipe (namr_dist/recipes/) is a function that returns a Config; `--set.section.field value`
changes a field. The file config.json of a run holds all of it, and `Config.load` reads it back.
What a single value may be stands beside its field (bounds.py), what values may be together in its
section's `check`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from namr_dist.bounds import above_up_to, at_least, between, check_bounds, strictly_between
from namr_dist.config_json import from_object
from namr_dist.errors import InputError
from namr_dist.json_file import parse_json
from namr_dist.losses import registry
from namr_dist.losses.registry import MetricLossConfig
from namr_dist.named_code import is_named_code


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How shards that lie behind a URL are fetched and kept."""

    cache: Path | None = None
    """Folder on this machine for shards that lie behind a URL; None: namr-dist in the user's cache
    folder."""
    cache_gib: Annotated[float, above_up_to(0, 1e6)] = 100.0
    """Most GiB of shards kept there; those not used for longest go first."""
    retries: Annotated[int, at_least(0)] = 5
    """Times a fetch is tried again, after 1, 2, 4 … seconds, from where it broke off."""
    stall_seconds: Annotated[float, above_up_to(0, 1e6)] = 30.0
    """Seconds without a byte after which a fetch counts as broken off."""
    manifest_seconds: Annotated[float, above_up_to(0, 1e6)] = 600.0
    """Seconds in which the manifest must have come, all tries together."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are trained on and how they become batches."""

    path: str | None = None
    """Folder of the shard set, with its manifest.json, or its URL (http, https, s3, gs, az, abfs,
    hf, or pipe:COMMAND with {} for the file). None: homeware, the set that comes with the
    package."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    train_splits: tuple[str, ...] = ("train",)
    """Splits whose images are trained on."""
    categories: tuple[str, ...] = ()
    """Super-classes that are trained on; none: all."""
    class_list: Path | None = None
    """Text file with a class a line, by name or label: only those are trained on."""
    least_images: Annotated[int, at_least(1)] = 1
    """Classes with fewer training images are left out."""
    most_images: Annotated[int | None, at_least(1)] = None
    """Of classes with more, so many are trained on, chosen once by train.seed."""
    validation_split: str | None = "val"
    """Split that may choose things; None: no validation."""
    test_split: str = "test"
    """Split that `namr evaluate` measures."""
    classes_per_batch: Annotated[
        int, at_least(2, ", for a batch of one class has no negatives")
    ] = 32
    """P: classes in the global batch, over all ranks; a multiple of the number of ranks."""
    images_per_class: Annotated[
        int, at_least(2, ", for a batch without two images of a class has no positives")
    ] = 4
    """K: images of each of those classes."""
    sampling: Literal["uniform", "proportional", "category"] = "uniform"
    """uniform: an epoch meets every class once. proportional: as often as shows each of its images
    once. category: as uniform, with batches of few super-classes, for harder negatives."""
    categories_per_batch: Annotated[int, at_least(1)] = 1
    """G: super-classes that `category` puts into a batch, with P / G classes each."""
    shuffle: Literal["classes", "shards"] = "classes"
    """classes: any classes may share a batch; shards are read here and there. shards: each is read
    front to back by few ranks, for sets that lie elsewhere and are larger than the cache."""
    views: Annotated[int, at_least(1)] = 1
    """Times each image stands in a batch, each time augmented anew; divides images_per_class."""
    across_groups: bool = False
    """Show images of as many of a class's groups as it has: In-Shop's colours, a table's column
    `group`."""
    damaged_images: Literal["stop", "replace"] = "stop"
    """A training image that cannot be decoded ends the run, or is replaced by the next of its class
    and counted."""
    image_size: Annotated[int, at_least(1)] = 224
    """Side of the network's square input in pixels."""
    test_size: Annotated[int | None, at_least(1)] = None
    """The same for validation, evaluation and embedding; None: image_size. Random crops enlarge
    what they show, so a network that pools often does better at a larger size than it was trained
    at (Touvron et al. 2019)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of an image's area that a training crop covers, least and most."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Width over height of a training crop, least and most."""
    flip: bool = True
    """Mirror half of the training images."""
    brightness: Annotated[float, at_least(0)] = 0.2
    """Training images are brightened by a factor within 1 ± this."""
    contrast: Annotated[float, at_least(0)] = 0.2
    """Likewise for contrast."""
    saturation: Annotated[float, at_least(0)] = 0.2
    """Likewise for saturation."""
    test_crop: Annotated[float, above_up_to(0, 1)] = 0.875
    """Share of the shorter side that the test transform keeps."""
    workers: Annotated[int, at_least(0)] = 2
    """Processes a rank that read, decode and transform images."""
    batch_minutes: Annotated[float, above_up_to(0, 1e6)] = 10.0
    """Minutes without a batch from them after which the run ends, naming the shards it waits for;
    fewer than train.timeout_minutes, or that ends it first."""
    verify: bool = True
    """Check every shard's size and SHA-256 before the first step."""

    def check(self) -> None:
        """Raise InputError for settings that do not go together."""
        if self.images_per_class % self.views:
            raise InputError(
                f"data.views is {self.views}, which does not divide data.images_per_class "
                f"({self.images_per_class}); set it to a divisor"
            )
        if self.sampling == "category" and self.classes_per_batch % self.categories_per_batch:
            raise InputError(
                f"data.categories_per_batch is {self.categories_per_batch}, which does not divide "
                f"data.classes_per_batch ({self.classes_per_batch}); set it to a divisor"
            )
        if self.sampling == "category" and self.shuffle == "shards":
            raise InputError(
                "data.sampling category picks classes from all shards at once, which data.shuffle shards "
                "cannot; set data.shuffle to classes"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(
                f"data.crop_scale is {self.crop_scale}; give two shares in order, above 0 and at most 1"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise InputError(
                f"data.crop_ratio is {self.crop_ratio}; give two ratios in order, above 0"
            )
        self._check_roles()

    def _check_roles(self) -> None:
        """A split that trains may not choose, and neither may be tested on: figures would say
        nothing."""
        if not self.train_splits:
            raise InputError("data.train_splits is empty; name at least one split")
        roles: dict[str, set[str | None]] = {
            "data.train_splits": {*self.train_splits},
            "data.validation_split": {self.validation_split},
            "data.test_split": {self.test_split},
        }
        for (name, splits), (other, others) in itertools.combinations(roles.items(), 2):
            if shared := sorted(filter(None, splits & others)):
                raise InputError(
                    f"split {shared[0]!r} is both in {name} and in {other}; give each its own"
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and the heads on it."""

    backbone: str = "timm:resnet50"
    """conv4, efficientnet_lite0, timm:NAME, or module:NAME for a backbone of your own."""
    pretrained: bool = True
    """Start from published weights; conv4 has none."""
    weights: Path | None = None
    """State dict for a timm: backbone, as .safetensors or .pt; None: the hub."""
    batchnorm: Literal["frozen", "train"] = "frozen"
    """Backbone batch norm: kept as pre-trained, or with statistics of the global batch."""
    width: Annotated[int, at_least(1)] = 512
    """D: width of the sample and of the structure embedding."""
    structure_hidden: Annotated[int, at_least(1)] = 512
    """Hidden width of the structure head."""
    delta: Annotated[float, strictly_between(0, 1)] = 0.5
    """δ: structure weights lie within 1 ± δ."""

    def check(self) -> None:
        """Raise InputError for settings that do not go together."""
        from_scratch = self.backbone == "conv4" or (not self.pretrained and self.weights is None)
        if from_scratch and self.batchnorm == "frozen":
            raise InputError(
                f"model.backbone {self.backbone} starts from scratch, so its batch norm cannot be frozen; "
                "set model.batchnorm to train"
            )


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """Multi-cluster ranking, the label-free loss that trains the structure embedding."""

    weight: Annotated[float, at_least(0)] = 2.0
    """λ: weight of multi-cluster ranking beside the metric loss; 0 leaves it out (the baseline)."""
    clusters: Annotated[int, at_least(2, ", or loss.ranking.weight to 0 for no ranking")] = 2
    """M: ordered cluster centres; 2 is NASA's loss."""
    spread: float = 3.0
    """t: the nearest centre lies t standard deviations below the mean distance, …"""
    floor: Annotated[float, between(0, 1)] = 0.2
    """φ: … though not below φ times the mean."""
    sharpness: float = 10.0
    """a: sharpness of the soft assignment to clusters."""
    statistics: Literal["batch", "anchor"] = "batch"
    """Mean and deviation of the distances: of the whole batch, or of each anchor's row."""
    geometry: Literal["scaled", "unit"] = "scaled"
    """Distances are those of z divided by its mean pairwise distance, or of z / ‖z‖ divided by
    theirs."""
    rise_passes: Annotated[float, at_least(0)] = 0.0
    """Passes over the training images in which λ rises from 0 to `weight`; 0: λ is constant."""


@dataclass(frozen=True, kw_only=True)
class StructureConfig:
    """The structure embedding: what an image is searched by in addition to its sample embedding."""

    form: Literal["centres", "learnt", "weights"] = "centres"
    """centres: where an image lies among M cluster centres of the training embeddings. learnt: the
    same with centres that are trained with the embeddings. weights: NASA's, one positive weight for
    each dimension of z."""
    centres: Annotated[int | None, at_least(1)] = None
    """M: cluster centres; None: a quarter as many as training images, at most 512."""
    nearest: Annotated[int, at_least(1)] = 10
    """k: an image's ρ is the mean squared distance to its k nearest centres."""
    gamma: Annotated[float | None, at_least(0)] = None
    """γ: γ ρ is subtracted from an item's squared distances; 0 is the plain search. None: chosen by
    MAP@R on the validation classes, or, without any, on a tenth of the training classes held out
    from the centres; no class can be held out from learnt ones, which then take 0.4."""
    objective: Literal["soft_k_means", "views", "ranking"] = "soft_k_means"
    """What learnt centres minimise. soft_k_means: a row's mean squared distance to them, by soft
    assignment. views: how differently two views of an image order them; needs data.views. ranking:
    multi-cluster ranking of a row's distances to its k nearest, with the thresholds of
    loss.ranking."""
    weight: Annotated[float, above_up_to(0, 1e6)] = 1.0
    """Of that loss, added to the others. The centres have an optimizer of their own rate
    (optim.loss_lr), to which it makes next to no difference: it is what `pull` is a share of."""
    pull: Annotated[float, at_least(0)] = 0.0
    """Share of its gradient that reaches z; 0: learnt centres follow z and do not change it."""
    sharpness: Annotated[float, above_up_to(0, 1e6)] = 20.0
    """κ: soft assignment is a softmax of -κ times squared distances, whose unit is the squared mean
    pairwise distance of the batch."""

    def check(self, *, views: int) -> None:
        """Raise InputError for settings that do not go together."""
        if self.form == "learnt" and self.objective == "views" and views < 2:
            raise InputError(
                f"structure.objective views compares views of an image, and data.views is {views}; set "
                "that to at least 2, or structure.objective to another"
            )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Cross-batch memory, which holds embeddings of earlier batches."""

    rows: Annotated[int, at_least(0)] = 0
    """Embeddings of earlier batches that the losses meet beside the batch's own (Wang et al. 2020);
    0: none. Not for proxy_anchor, which compares with proxies alone, nor for losses from
    outside."""
    start_step: Annotated[int, at_least(0)] = 1000
    """Steps before they are met: at first embeddings move too fast. metrics.jsonl has their `drift`
    from the start."""


@dataclass(frozen=True, kw_only=True)
class LossConfig(MetricLossConfig):
    """What is minimised: a metric loss, and multi-cluster ranking beside it."""

    ranking: RankingConfig = field(default_factory=RankingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def check(self) -> None:
        """Raise InputError for a loss that is not known, and settings that do not go together."""
        known = registry.find(self.metric)
        if self.options and known:
            raise InputError(
                f"loss.options is {self.options!r}, which goes with a loss that is given as module:NAME; "
                f"the settings of {known.name} are loss.{known.name}.…"
            )
        if self.memory.rows and not (known and known.memory):
            raise InputError(
                f"loss.memory.rows is {self.memory.rows}, but {self.metric} meets no rows of earlier "
                "batches; set it to 0, or loss.metric to another"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters are updated, and for how many steps."""

    steps: Annotated[int, at_least(1)] = 10_000
    """Training steps in all."""
    backbone_lr: Annotated[float, at_least(0)] = 1e-5
    """Learning rate of the backbone at its peak."""
    head_lr: Annotated[float, at_least(0)] = 1e-4
    """Learning rate of the two heads at its peak."""
    loss_lr: Annotated[float, at_least(0)] = 1e-2
    """Learning rate of a loss's own parameters (proxies, β, learnt centres) at its peak."""
    weight_decay: Annotated[float, at_least(0)] = 1e-4
    """AdamW's decay of weight matrices; biases, norms and a loss's own parameters have none."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up: down to 0 by a half cosine, or down by `step_factor` at each of
    `step_at`."""
    warmup_steps: Annotated[int, at_least(0)] = 100
    """Steps of linear rise."""
    step_at: tuple[float, ...] = (0.6, 0.85)
    """Shares of the steps at which the rate drops."""
    step_factor: float = 0.1
    clip: Annotated[float, at_least(0)] = 10.0
    """Largest norm of the whole gradient; 0: not clipped."""

    def check(self) -> None:
        """Raise InputError for settings that do not go together."""
        if self.warmup_steps > self.steps:
            raise InputError(
                f"optim.warmup_steps is {self.warmup_steps}; set it between 0 and optim.steps "
                f"({self.steps})"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run is carried out and what it writes."""

    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    """Fixes initial weights, plans, augmentation and sampling."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: share nothing, optimizer state, gradients, parameters among ranks."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the backbone's forward pass; auto: bf16 where the GPU has it, else fp32. Parameters stay
    fp32."""
    micro_batch: Annotated[int | None, at_least(1)] = None
    """Images that a rank passes through the backbone at a time (gradient caching): batches larger
    than memory, for one more forward pass. None: all at once. Needs model.batchnorm frozen."""
    log_every: Annotated[int, at_least(1)] = 10
    """Steps between two lines in the log; metrics.jsonl has every step."""
    validate_every: Annotated[int, at_least(1)] = 500
    """Steps between two validations; one more follows the last step."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run's folder."""
    checkpoint_minutes: Annotated[float, at_least(0)] = 15.0
    """Minutes between two checkpoints, from which --resume goes on; 0: none by time. Signals that
    end a run write one too.
    """
    checkpoint_every: Annotated[int, at_least(0)] = 0
    """Steps between two checkpoints; 0: none by steps."""
    keep_checkpoints: Annotated[int, at_least(1)] = 2
    """Newest checkpoints that are kept."""
    timeout_minutes: Annotated[float, above_up_to(0, 1e5)] = 30.0
    """Minutes in one phase of a step after which a rank ends the run, saying which rank is where.
    Longer than one checkpoint takes, or the search among the validation images."""
    profile: Path | None = None
    """Write a Chrome trace of three steps of the first rank to this file (packed, if its name ends
    in .gz), in place of one that is there; None: none."""
    profile_after: int = 10
    """Steps of each start before those of the trace: the first are slow."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the test split."""

    recall_at: Annotated[tuple[int, ...], at_least(1)] = (1, 2, 4, 8)
    """The k of R@k on the test split."""
    distance: Literal["auto", "euclidean", "cosine"] = "auto"
    """By which images are searched, in validation too. auto: by the distance of the metric loss,
    which is Euclidean for triplet and the cosine for the other losses of the package; Euclidean for
    a loss from outside, so set it for one on unit vectors."""
    reidentification_draws: Annotated[int, at_least(0)] = 0
    """Times that one random image of each class is made the gallery and the others search it (CMC
    and mAP, as VehicleID is measured), beside the leave-one-out figures; 0: not measured."""

    def check(self) -> None:
        """Raise InputError for settings that do not go together."""
        if not self.recall_at:
            raise InputError("evaluation.recall_at is empty; give at least one k")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, by subject."""

    recipe: str
    """Name of the recipe this came from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    structure: StructureConfig = field(default_factory=StructureConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_json(self) -> str:
        """The text of config.json; `load` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read a run's config.json. Raises InputError if it is missing or not one."""
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{path} is missing: {path.parent} is not the folder of a run"
            ) from None
        remedy = "copy it again: the metadata of every checkpoint holds it too"
        return cls.from_object(parse_json(text, str(path), remedy), str(path))

    @classmethod
    def from_object(cls, value: Any, where: str) -> Config:
        """The configuration in parsed JSON. Raises InputError, naming `where`, if it is not one."""
        config: Config = from_object(cls, value, where)
        return config

    @property
    def test_size(self) -> int:
        """Side of the network's input at test time in pixels."""
        return self.data.test_size or self.data.image_size

    @property
    def distance(self) -> Literal["euclidean", "cosine"]:
        """By which its embeddings are searched."""
        if self.evaluation.distance != "auto":
            return self.evaluation.distance
        known = registry.find(self.loss.metric)
        return known.distance if known else "euclidean"

    def code_names(self) -> dict[str, str]:
        """Settings that name code from outside the package, each with that name (see
        named_code.py)."""
        values = {"loss.metric": self.loss.metric, "model.backbone": self.model.backbone}
        return {field: name for field, name in values.items() if is_named_code(name)}

    def check(self) -> None:
        """Raise InputError for values that no run can use, whatever the data."""
        check_bounds(self)
        self.data.check()
        self.model.check()
        self.loss.check()
        self.structure.check(views=self.data.views)
        self.optim.check()
        self.evaluation.check()
        memory, steps = self.loss.memory, self.optim.steps
        if memory.rows and memory.start_step >= steps:
            raise InputError(
                f"loss.memory.start_step is {memory.start_step}, so the memory would not be met in "
                f"{steps} steps; set it below optim.steps, or loss.memory.rows to 0"
            )
        if self.train.micro_batch is not None and self.model.batchnorm != "frozen":
            raise InputError(
                "train.micro_batch embeds a batch in pieces, and batch norm of a piece is not that of the "
                "batch; set model.batchnorm to frozen, or leave train.micro_batch out"
            )
