"""A run's whole configuration: frozen dataclasses, one per subject, a line of text under each field.

A recipe (namr_dist/recipes/) is a function that returns a Config; `--set.section.field value` changes a field.
The file config.json of a run holds all of it, and `Config.load` reads it back.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from namr_dist.config_json import from_object
from namr_dist.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    cache: Path | None = None
    """Folder on this machine for shards that lie behind a URL; None: namr-dist in the user's cache folder."""
    cache_gib: float = 100.0
    """Most GiB of shards kept there; those not used for longest go first."""
    retries: int = 5
    """Times a fetch is tried again, after 1, 2, 4 … seconds, from where it broke off."""
    stall_seconds: float = 30.0
    """Seconds without a byte after which a fetch counts as broken off."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str | None = None
    """Folder of the shard set, with its manifest.json, or its URL (http, https, s3, gs … or pipe:COMMAND with {} for
    the file). None: homeware, the set that comes with the package."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    train_splits: tuple[str, ...] = ("train",)
    """Splits whose images are trained on."""
    categories: tuple[str, ...] = ()
    """Super-classes that are trained on; none: all."""
    class_list: Path | None = None
    """Text file with a class a line, by name or label: only those are trained on."""
    least_images: int = 1
    """Classes with fewer training images are left out."""
    most_images: int | None = None
    """Of classes with more, so many are trained on, chosen once by train.seed."""
    validation_split: str | None = "val"
    """Split that may choose things; None: no validation."""
    test_split: str = "test"
    """Split that `namr evaluate` measures."""
    classes_per_batch: int = 32
    """P: classes in the global batch, over all ranks; a multiple of the number of ranks."""
    images_per_class: int = 4
    """K: images of each of those classes."""
    sampling: Literal["uniform", "proportional", "category"] = "uniform"
    """uniform: an epoch meets every class once. proportional: as often as shows each of its images once. category: as
    uniform, with batches of few super-classes, for harder negatives."""
    categories_per_batch: int = 1
    """G: super-classes that `category` puts into a batch, with P / G classes each."""
    shuffle: Literal["classes", "shards"] = "classes"
    """classes: any classes may share a batch; shards are read here and there. shards: each is read front to back by
    few ranks, for sets that lie elsewhere and are larger than the cache."""
    views: int = 1
    """Times each image stands in a batch, each time augmented anew; divides images_per_class."""
    across_groups: bool = False
    """Show images of as many of a class's groups as it has: In-Shop's colours, a table's column `group`."""
    damaged_images: Literal["stop", "replace"] = "stop"
    """A training image that cannot be decoded ends the run, or is replaced by the next of its class and counted."""
    image_size: int = 224
    """Side of the network's square input in pixels."""
    test_size: int | None = None
    """The same for validation, evaluation and embedding; None: image_size. Random crops enlarge what they show,
    so a network that pools often does better at a larger size than it was trained at (Touvron et al. 2019)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of an image's area that a training crop covers, least and most."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Width over height of a training crop, least and most."""
    flip: bool = True
    """Mirror half of the training images."""
    brightness: float = 0.2
    """Training images are brightened by a factor within 1 ± this."""
    contrast: float = 0.2
    """Likewise for contrast."""
    saturation: float = 0.2
    """Likewise for saturation."""
    test_crop: float = 0.875
    """Share of the shorter side that the test transform keeps."""
    workers: int = 2
    """Processes a rank that read, decode and transform images."""
    batch_minutes: float = 10.0
    """Minutes without a batch from them after which the run ends, naming the shards it waits for; fewer than
    train.timeout_minutes, or that ends it first."""
    verify: bool = True
    """Check every shard's size and SHA-256 before the first step."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    backbone: str = "timm:resnet50"
    """conv4, efficientnet_lite0 or timm:NAME."""
    pretrained: bool = True
    """Start from published weights; conv4 has none."""
    weights: Path | None = None
    """State dict for a timm: backbone, as .safetensors or .pt; None: the hub."""
    batchnorm: Literal["frozen", "train"] = "frozen"
    """Backbone batch norm: kept as pre-trained, or with statistics of the global batch."""
    width: int = 512
    """D: width of the sample and of the structure embedding."""
    structure_hidden: int = 512
    """Hidden width of the structure head."""
    delta: float = 0.5
    """δ: structure weights lie within 1 ± δ."""


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    margin: float = 0.2
    """Margin, in units of the mean pairwise distance."""
    mining: Literal["semihard", "hardest", "distance_weighted"] = "semihard"
    """Which negatives are met."""


@dataclass(frozen=True, kw_only=True)
class MarginConfig:
    alpha: float = 0.2
    """α: half the gap between positives and negatives."""
    beta: float = 1.2
    """β: boundary between them at the start; it is learnt."""


@dataclass(frozen=True, kw_only=True)
class MultiSimilarityConfig:
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
    alpha: float = 32.0
    """α: sharpness."""
    margin: float = 0.1
    """Margin in cosine similarity."""


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    weight: float = 2.0
    """λ: weight of multi-cluster ranking beside the metric loss; 0 leaves it out (the baseline)."""
    clusters: int = 2
    """M: ordered cluster centres; 2 is NASA's loss."""
    spread: float = 3.0
    """t: the nearest centre lies t standard deviations below the mean distance, …"""
    floor: float = 0.2
    """φ: … though not below φ times the mean."""
    sharpness: float = 10.0
    """a: sharpness of the soft assignment to clusters."""
    statistics: Literal["batch", "anchor"] = "batch"
    """Mean and deviation of the distances: of the whole batch, or of each anchor's row."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    rows: int = 0
    """Embeddings of earlier batches that the losses meet beside the batch's own (Wang et al. 2020); 0: none.
    Not for proxy_anchor, which compares with proxies alone."""
    start_step: int = 1000
    """Steps before they are met: at first embeddings move too fast. metrics.jsonl has their `drift` from the start."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    metric: Literal["triplet", "margin", "multi_similarity", "proxy_anchor"] = "triplet"
    """The labelled loss on the sample embedding."""
    triplet: TripletConfig = field(default_factory=TripletConfig)
    margin: MarginConfig = field(default_factory=MarginConfig)
    multi_similarity: MultiSimilarityConfig = field(default_factory=MultiSimilarityConfig)
    proxy_anchor: ProxyAnchorConfig = field(default_factory=ProxyAnchorConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    steps: int = 10_000
    """Training steps in all."""
    backbone_lr: float = 1e-5
    """Learning rate of the backbone at its peak."""
    head_lr: float = 1e-4
    """Learning rate of the two heads at its peak."""
    loss_lr: float = 1e-2
    """Learning rate of a loss's own parameters (proxies, β) at its peak."""
    weight_decay: float = 1e-4
    """AdamW's decay of weight matrices; biases, norms, proxies and β have none."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up: down to 0 by a half cosine, or down by `step_factor` at each of `step_at`."""
    warmup_steps: int = 100
    """Steps of linear rise."""
    step_at: tuple[float, ...] = (0.6, 0.85)
    """Shares of the steps at which the rate drops."""
    step_factor: float = 0.1
    clip: float = 10.0
    """Largest norm of the whole gradient; 0: not clipped."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    seed: int = 0
    """Fixes initial weights, plans, augmentation and sampling."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: share nothing, optimizer state, gradients, parameters among ranks."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the backbone's forward pass; auto: bf16 where the GPU has it, else fp32. Parameters stay fp32."""
    micro_batch: int | None = None
    """Images that a rank passes through the backbone at a time (gradient caching): batches larger than memory, for one
    more forward pass. None: all at once. Needs model.batchnorm frozen."""
    log_every: int = 10
    """Steps between two lines in the log; metrics.jsonl has every step."""
    validate_every: int = 500
    """Steps between two validations; one more follows the last step."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run's folder."""
    checkpoint_minutes: float = 15.0
    """Minutes between two checkpoints, from which --resume goes on; 0: none by time. SIGTERM and SIGUSR1 write one too.
    """
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: none by steps."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    timeout_minutes: float = 30.0
    """Minutes in one phase of a step after which a rank ends the run, saying which rank is where. Longer than one
    checkpoint takes, or the search among the validation images."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    """The k of R@k on the test split."""
    reidentification_draws: int = 0
    """Times that one random image of each class is made the gallery and the others search it (CMC and mAP, as VehicleID
    is measured), beside the leave-one-out figures; 0: not measured."""


@dataclass(frozen=True, kw_only=True)
class Config:
    recipe: str
    """Name of the recipe this came from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read a run's config.json. Raises InputError if it is missing or not one."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path} is missing: {path.parent} is not the folder of a run") from None
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}); copy it again: the metadata of every checkpoint holds it "
                             "too") from None
        return cls.from_object(value, str(path))

    @classmethod
    def from_object(cls, value: Any, where: str) -> Config:
        """The configuration in parsed JSON. Raises InputError, naming `where`, if it is not one."""
        config: Config = from_object(cls, value, where)
        return config

    @property
    def test_size(self) -> int:
        """Side of the network's input at test time in pixels."""
        return self.data.test_size or self.data.image_size

    def check(self) -> None:
        """Raise InputError for values that no run can use, whatever the data."""
        data, optim, train = self.data, self.optim, self.train
        at_least_one = {"data.classes_per_batch": data.classes_per_batch, "data.image_size": data.image_size,
                        "optim.steps": optim.steps, "train.log_every": train.log_every,
                        "train.validate_every": train.validate_every,
                        "train.keep_checkpoints": train.keep_checkpoints,
                        "data.views": data.views, "data.least_images": data.least_images,
                        "data.categories_per_batch": data.categories_per_batch,
                        "data.most_images": 1 if data.most_images is None else data.most_images,
                        "evaluation.recall_at": min(self.evaluation.recall_at, default=0),
                        "model.width": self.model.width, "model.structure_hidden": self.model.structure_hidden,
                        "data.test_size": self.test_size,
                        "train.micro_batch": 1 if train.micro_batch is None else train.micro_batch}
        for name, value in at_least_one.items():
            if value < 1:
                raise InputError(f"{name} is {value}; set it to at least 1")
        for name, period in (("train.checkpoint_minutes", train.checkpoint_minutes),
                             ("train.checkpoint_every", train.checkpoint_every)):
            if not period >= 0:
                raise InputError(f"{name} is {period}; set it to at least 0")
        if not 0 < train.timeout_minutes <= 100_000:
            raise InputError(f"train.timeout_minutes is {train.timeout_minutes}; set it above 0 and at most 100000")
        if train.seed >= 2**32:
            raise InputError(f"train.seed is {train.seed}; set it below 2^32")
        if data.images_per_class < 2:
            raise InputError(f"data.images_per_class is {data.images_per_class}; set it to at least 2, for a "
                             "batch without two images of a class has no positives")
        if data.classes_per_batch < 2:
            raise InputError("data.classes_per_batch is 1; set it to at least 2, for a batch of one class has "
                             "no negatives")
        self._check_sampling()
        model = self.model
        from_scratch = model.backbone == "conv4" or (not model.pretrained and model.weights is None)
        if from_scratch and model.batchnorm == "frozen":
            raise InputError(f"model.backbone {model.backbone} starts from scratch, so its batch norm cannot be "
                             "frozen; set model.batchnorm to train")
        if train.micro_batch is not None and model.batchnorm != "frozen":
            raise InputError("train.micro_batch embeds a batch in pieces, and batch norm of a piece is not that "
                             "of the batch; set model.batchnorm to frozen, or leave train.micro_batch out")
        if not 0 < self.model.delta < 1:
            raise InputError(f"model.delta is {self.model.delta}; set it between 0 and 1, both excluded")
        if optim.warmup_steps < 0 or optim.warmup_steps > optim.steps:
            raise InputError(f"optim.warmup_steps is {optim.warmup_steps}; set it between 0 and optim.steps "
                             f"({optim.steps})")
        if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
            raise InputError(f"data.crop_scale is {data.crop_scale}; give two shares in order, above 0 and at most 1")
        if not 0 < data.crop_ratio[0] <= data.crop_ratio[1]:
            raise InputError(f"data.crop_ratio is {data.crop_ratio}; give two ratios in order, above 0")
        if not 0 < data.test_crop <= 1:
            raise InputError(f"data.test_crop is {data.test_crop}; set it above 0 and at most 1")
        self._check_roles()
        ranking = self.loss.ranking
        if ranking.clusters < 2:
            raise InputError(f"loss.ranking.clusters is {ranking.clusters}; set it to at least 2, or "
                             "loss.ranking.weight to 0 for no ranking")
        if not 0 <= ranking.floor <= 1:
            raise InputError(f"loss.ranking.floor is {ranking.floor}; set it between 0 and 1")
        memory = self.loss.memory
        if memory.rows > 0 and self.loss.metric == "proxy_anchor":
            raise InputError(f"loss.memory.rows is {memory.rows}, but proxy_anchor compares with proxies alone; set it "
                             "to 0, or loss.metric to another")
        if memory.rows > 0 and memory.start_step >= optim.steps:
            raise InputError(f"loss.memory.start_step is {memory.start_step}, so the memory would not be met in "
                             f"{optim.steps} steps; set it below optim.steps, or loss.memory.rows to 0")
        not_negative: dict[str, float] = {
            "data.workers": data.workers, "data.remote.retries": data.remote.retries,
            "evaluation.reidentification_draws": self.evaluation.reidentification_draws,
            "data.brightness": data.brightness, "data.contrast": data.contrast,
            "data.saturation": data.saturation, "loss.ranking.weight": ranking.weight,
            "loss.memory.rows": memory.rows, "loss.memory.start_step": memory.start_step,
            "optim.backbone_lr": optim.backbone_lr, "optim.head_lr": optim.head_lr, "optim.loss_lr": optim.loss_lr,
            "optim.weight_decay": optim.weight_decay, "optim.clip": optim.clip, "train.seed": train.seed}
        for name, number in not_negative.items():
            if number < 0:
                raise InputError(f"{name} is {number}; set it to at least 0")

    def _check_sampling(self) -> None:
        data = self.data
        if data.images_per_class % data.views:
            raise InputError(f"data.views is {data.views}, which does not divide data.images_per_class "
                             f"({data.images_per_class}); set it to a divisor")
        if data.sampling == "category" and data.classes_per_batch % data.categories_per_batch:
            raise InputError(f"data.categories_per_batch is {data.categories_per_batch}, which does not divide "
                             f"data.classes_per_batch ({data.classes_per_batch}); set it to a divisor")
        if data.sampling == "category" and data.shuffle == "shards":
            raise InputError("data.sampling category picks classes from all shards at once, which data.shuffle shards "
                             "cannot; set data.shuffle to classes")
        for name, limit in (("data.batch_minutes", data.batch_minutes),
                            ("data.remote.cache_gib", data.remote.cache_gib),
                            ("data.remote.stall_seconds", data.remote.stall_seconds)):
            if not 0 < limit <= 1e6:
                raise InputError(f"{name} is {limit}; set it above 0 and at most 1000000")

    def _check_roles(self) -> None:
        """A split that trains may not choose, and neither may be tested on: figures would say nothing."""
        data = self.data
        if not data.train_splits:
            raise InputError("data.train_splits is empty; name at least one split")
        roles: dict[str, set[str | None]] = {
            "data.train_splits": {*data.train_splits}, "data.validation_split": {data.validation_split},
            "data.test_split": {data.test_split}}
        names = list(roles)
        for place, name in enumerate(names):
            for other in names[place + 1:]:
                if shared := sorted(filter(None, roles[name] & roles[other])):
                    raise InputError(f"split {shared[0]!r} is both in {name} and in {other}; give each its own")
