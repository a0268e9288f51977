"""`namr bench train`: training end to end on this machine's first device, and where its time goes.

Each figure comes from the log of a real `namr train`. Beside it: what the loader's workers make
when nobody trains, and what the loss would take in plain PyTorch.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from namr_dist.atomic import write_atomic
from namr_dist.bench.large_set import IMAGES, make_large_set
from namr_dist.bench.trace import Summary, summarise
from namr_dist.bench.training_losses import LossTimes, time_losses
from namr_dist.bench.training_run import (
    INTERVALS,
    Figures,
    Length,
    command,
    overrides,
    read_figures,
    start,
)
from namr_dist.config import Config
from namr_dist.data.read.augment import TrainTransform
from namr_dist.data.read.stream import ShardImages, TrainPlan, batches_ahead, stream
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.errors import InputError
from namr_dist.kernels.bench.measure import Spread
from namr_dist.model.backbones import build_backbone
from namr_dist.recipes.overrides import configure
from namr_dist.train.checks import check_run
from namr_dist.train.phases import STEP_PHASES
from namr_dist.train.profile import STEPS

_OWN = {
    "data.path": "--shards",
    "data.classes_per_batch": "--batch",
    "train.precision": "--precision",
    "optim.steps": "--steps",
    "optim.warmup_steps": "--steps",
    "train.log_every": "--steps",
    "train.profile": "--trace",
    "train.profile_after": "--trace",
}
"""Settings that the benchmark makes itself, each with the option that it follows."""
_LOADER_IMAGES = 512
"""Most images of a batch when the workers are timed alone."""
_SCALE = 0.2
"""Of batch norm that would begin with 0."""
Value = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What is measured where nothing else is asked for. Fields as in Work."""

    images: int
    batches: tuple[int, ...]
    steps: int
    precisions: tuple[str, ...]


GPU = Usual(images=IMAGES, batches=(512, 4096, 16_384), steps=40, precisions=("bf16",))
CPU = Usual(images=2000, batches=(64, 128), steps=5, precisions=("fp32",))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured: every batch in every precision."""

    recipe: str
    overrides: tuple[str, ...]
    """Words of `--set.section.field value …`."""
    shards: Path | None
    """A shard set; None: one is made."""
    images: int
    """Of the set that is made."""
    batches: tuple[int, ...]
    """Images of the global batch."""
    steps: int
    """That count; a multiple of INTERVALS."""
    precisions: tuple[str, ...]
    trace: Path | None
    """Where a Chrome trace of the first batch in the first precision goes."""

    @cached_property
    def images_per_class(self) -> int:
        """K of the recipe with its overrides; batches are multiples of it."""
        return configure(self.recipe, self.overrides).data.images_per_class

    def check(self) -> None:
        """Raise InputError for what cannot be measured, whatever the data."""
        for name, option in _OWN.items():
            if any(word.partition("=")[0] == f"--set.{name}" for word in self.overrides):
                raise InputError(f"--set.{name} is the benchmark's own; give {option} instead")
        if self.steps < INTERVALS or self.steps % INTERVALS:
            raise InputError(
                f"--steps is {self.steps}; set it to a multiple of {INTERVALS}, for figures are medians "
                f"over {INTERVALS} intervals"
            )
        if self.images < 1:
            raise InputError(f"--images is {self.images}; set it to at least 1")
        each = self.images_per_class
        for batch in self.batches:
            if batch < 2 * each or batch % each:
                raise InputError(
                    f"--batch {batch} is no multiple of data.images_per_class ({each}) with two classes "
                    f"or more; give {max(2, batch // each) * each}"
                )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run."""

    config: Config
    precision: str
    figures: Figures | None
    """None: the run did not finish."""
    losses: LossTimes
    workers_img_per_s: float
    """Images a second that the workers make while nobody trains."""
    steps: int
    """That count."""

    @property
    def batch(self) -> int:
        """Images of the global batch."""
        return self.config.data.classes_per_batch * self.config.data.images_per_class

    @property
    def loss_shares(self) -> tuple[float | None, float | None]:
        """Of a step, what the loss takes; and what it would take in the eager form, all else being
        equal."""
        if self.figures is None:
            return None, None
        step_ms, loss_ms = self.figures.step_ms.median, self.figures.phases_ms["loss"].median
        eager = self.losses.eager and self.losses.eager.median
        return loss_ms / step_ms, eager and eager / (step_ms - loss_ms + eager)

    def row(self) -> dict[str, Value]:
        """The figures by name, flat; None for what is not known."""
        config, figures, losses = self.config, self.figures, self.losses
        share, eager_share = self.loss_shares
        row: dict[str, Value] = {
            "recipe": config.recipe,
            "backbone": config.model.backbone,
            "image_size": config.data.image_size,
            "D": config.model.width,
            "precision": self.precision,
            "batch": self.batch,
            "micro_batch": config.train.micro_batch,
            "workers": config.data.workers,
            "steps": self.steps,
        }
        spreads: dict[str, Spread | None] = {
            "img_per_s": figures and figures.img_per_s,
            "step_ms": figures and figures.step_ms,
            **{
                f"{'optimizer' if name == 'step' else name}_ms": figures and figures.phases_ms[name]
                for name in STEP_PHASES
            },
            "loss_alone_ms": losses.ours,
            "eager_loss_ms": losses.eager,
        }
        for name, spread in spreads.items():
            row |= {
                name: spread and spread.median,
                f"{name}_p20": spread and spread.p20,
                f"{name}_p80": spread and spread.p80,
            }
        for name in ("mfu", "idle_share", "device_img_per_s", "peak_mib"):
            row[name] = getattr(figures, name) if figures else None
        return row | {
            "workers_img_per_s": self.workers_img_per_s,
            "loss_share": share,
            "eager_loss_share": eager_share,
            "note": "; ".join(
                filter(None, ("" if figures else "the run did not finish", losses.note))
            ),
        }


def measure(work: Work) -> Iterator[Measured | Summary]:
    """Each run as it ends; last, if a trace is asked for, what it says. Raises InputError for bad
    input."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="namr-bench-") as name:
        folder = Path(name)
        common = _common_words(work, folder, device)
        words = {
            batch: [*common, *overrides({"data.classes_per_batch": batch // work.images_per_class})]
            for batch in work.batches
        }
        configs = {batch: configure(work.recipe, own) for batch, own in words.items()}
        training_set = check_run(configs[min(configs)], world_size=1, local_rank=0)
        _check_classes(work, training_set.classes)
        workers_img_per_s = loader_img_per_s(configs[min(configs)], training_set)
        in_flight = {
            batch: _in_flight(config, _source(config, training_set), batch)
            for batch, config in configs.items()
        }
        for batch, config in configs.items():
            losses = time_losses(config, rows=batch, device=device)
            length = Length.of(work.steps, in_flight=in_flight[batch])
            for precision in work.precisions:
                run = folder / f"{batch}-{precision}"
                ended = start(
                    command(
                        work.recipe,
                        run,
                        [*words[batch], *overrides({"train.precision": precision})],
                        steps=length.steps,
                        log_every=length.interval,
                    )
                )
                yield Measured(
                    config=config,
                    precision=precision,
                    losses=losses,
                    steps=work.steps,
                    workers_img_per_s=workers_img_per_s,
                    figures=None if ended else read_figures(run, length, batch=batch),
                )
        if work.trace:
            batch = work.batches[0]
            traced = [*words[batch], *overrides({"train.precision": work.precisions[0]})]
            yield _trace(work, work.trace, traced, folder, wait=in_flight[batch])


def _common_words(work: Work, folder: Path, device: torch.device) -> list[str]:
    """Overrides of all runs; those of the user come last, and so count."""
    base = configure(work.recipe, work.overrides)
    settings: dict[str, object] = {"data.validation_split": None, "data.verify": False}
    if work.shards:
        settings["data.path"] = work.shards
    else:
        (folder / "shards").mkdir()
        make_large_set(folder / "shards", images=work.images)
        settings |= {"data.path": folder / "shards", "data.test_split": "test"}
    if device.type == "cuda":
        # One core issues the kernels; on a CPU, all of them train.
        settings["data.workers"] = max(base.data.workers, len(os.sched_getaffinity(0)) - 1)
    if base.model.batchnorm == "frozen":
        settings["train.micro_batch"] = min(work.batches)
    if base.model.backbone.startswith("timm:") and base.model.weights is None:
        settings["model.weights"] = folder / "weights.safetensors"
        safetensors.torch.save_file(random_weights(base), folder / "weights.safetensors")
    return [*overrides(settings), *work.overrides]


def random_weights(config: Config) -> dict[str, torch.Tensor]:
    """A state dict for a timm: backbone, so that nothing is downloaded: a file, for batch norm may
    then be frozen.

    Where batch norm begins with a scale of 0, as at the end of ResNet's blocks, it gets a small
    one: products with zeros take a GPU less power and time than those of a trained network.
    """
    torch.manual_seed(0)
    backbone = build_backbone(
        config.model.backbone,
        batchnorm="frozen",
        pretrained=False,
        weights=None,
        image_size=config.data.image_size,
    )
    for layer in backbone.layers.modules():
        if (
            isinstance(layer, nn.modules.batchnorm._BatchNorm)
            and layer.affine
            and not layer.weight.any()
        ):
            nn.init.constant_(layer.weight, _SCALE)
    return backbone.layers.state_dict()


def _check_classes(work: Work, classes: int) -> None:
    most = max(work.batches)
    if most > classes * work.images_per_class:
        raise InputError(
            f"--batch {most} needs {most // work.images_per_class} classes, the training images are of "
            f"{classes}; give at most {classes * work.images_per_class}"
            + ("" if work.shards else ", or more --images")
        )


def _source(config: Config, training_set: TrainingSet) -> ShardImages:
    return ShardImages(
        training_set.manifest,
        training_set.index,
        TrainTransform.configured(config.data, size=config.data.image_size),
    )


def _in_flight(config: Config, source: ShardImages, batch: int) -> int:
    """Batches that have been begun while one is trained on: a worker's, and the one on its way to
    the device."""
    workers = config.data.workers
    return 1 + (workers * batches_ahead(source, batch, workers=workers) if workers else 0)


def loader_img_per_s(config: Config, training_set: TrainingSet) -> float:
    """Images a second that the configuration's workers make while nobody trains.

    In batches of the smallest size, or of _LOADER_IMAGES if that is less: what a worker makes a
    second does not depend on it. Twice as many batches are counted as are made at a time, after the
    first ones: they come in bursts.
    """
    source, sampling = _source(config, training_set), training_set.sampling
    each = config.data.images_per_class
    sampling = replace(
        sampling, classes_per_batch=min(sampling.classes_per_batch, _LOADER_IMAGES // each)
    )
    batch = sampling.classes_per_batch * each
    in_flight = _in_flight(config, source, batch)
    plan = TrainPlan(
        index=training_set.index,
        sampling=sampling,
        seed=config.train.seed,
        rank=0,
        world_size=1,
        steps=4 * in_flight,
    )
    arrived_s = [time.perf_counter() for _ in stream(source, plan, workers=config.data.workers)]
    return 2 * in_flight * batch / (arrived_s[3 * in_flight - 1] - arrived_s[in_flight - 1])


def _trace(work: Work, target: Path, words: list[str], folder: Path, *, wait: int) -> Summary:
    """Write the Chrome trace of a run, packed if its name ends in .gz, and say what it holds."""
    # One step more, so that what a run does at its end is no part of the last that is recorded.
    made, steps = folder / "trace.json", wait + STEPS + 1
    profiling = overrides({"train.profile": made, "train.profile_after": wait})
    if (
        start(
            command(
                work.recipe, folder / "traced", [*words, *profiling], steps=steps, log_every=steps
            )
        )
        or not made.is_file()
    ):
        raise InputError(
            f"--trace {target} was not written, for the traced run did not finish; see above, or leave "
            "--trace out"
        )
    write_atomic(
        target, gzip.compress(made.read_bytes()) if target.suffix == ".gz" else made.read_bytes()
    )
    return summarise(made)
