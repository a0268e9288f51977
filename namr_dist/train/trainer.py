"""The steps of a training run, and what is done between them."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from namr_dist.config import Config
from namr_dist.data.read.augment import TrainTransform
from namr_dist.data.read.stream import Batch, ShardImages, TrainPlan, stream
from namr_dist.data.read.to_device import on_device
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.data.remote.prefetch import fetched_ahead
from namr_dist.data.shardset.manifest import SplitIndex
from namr_dist.errors import InputError, TransientError
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import Rank
from namr_dist.provenance import provenance
from namr_dist.retrieval.evaluate import evaluate_sample
from namr_dist.structure.centres import Centres
from namr_dist.train.checkpoints import zero_fragments
from namr_dist.train.checkpoints.network import save_network
from namr_dist.train.checkpoints.policy import CheckpointPolicy
from namr_dist.train.embed import embed, test_transform
from namr_dist.train.logging import RunLog
from namr_dist.train.objective import StepLoss
from namr_dist.train.phases import Phases, StepTimes, take_peak_bytes
from namr_dist.train.profile import profiled
from namr_dist.train.schedule import lr_factor, ranking_share
from namr_dist.train.signals import StopRequests
from namr_dist.train.structure_fit import Embedded, Fitted, fit_structure

# DeepSpeed takes seconds to import and looks at the environment: only once that is set.
if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class _Pending(NamedTuple):
    """A step whose losses have not been read from the device yet."""

    step: int
    losses: StepLoss
    lr_factor: float
    time_s: float


class Trainer:
    """The steps of a run, and what is done between them. One on each rank; all must make each call
    together."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        config: Config,
        training_set: TrainingSet,
        rank: Rank,
        host: HostGroup,
        policy: CheckpointPolicy,
        *,
        log: RunLog | None,
        first_step: int,
    ) -> None:
        """log: on the first rank. first_step: steps done already."""
        self._engine = engine
        self._config = config
        self._training_set = training_set
        self._rank = rank
        self._host = host
        self._policy = policy
        self._log = log
        self._first_step = first_step
        self._images = config.data.classes_per_batch * config.data.images_per_class
        self._steps_per_epoch = training_set.steps_per_epoch
        self._phases: Phases = engine.module.objective.phases
        self._peak_lrs = [group["lr"] for group in engine.optimizer.param_groups]
        self._pending: list[_Pending] = []
        self._replaced: list[str] = []
        self._validated: Embedded | None = None
        self._learns = config.structure.form == "learnt"
        self._line_steps, self._line_began = 0, time.perf_counter()

    def run(self, requests: StopRequests) -> bool:
        """All steps; False if a signal ended them before the last."""
        with self._profiled() as begin_step:
            return self._all_steps(requests, begin_step)

    def _all_steps(self, requests: StopRequests, begin_step: Callable[[], None]) -> bool:
        data, train, steps = self._config.data, self._config.train, self._config.optim.steps
        self._engine.train()
        self._phases.take()
        self._line_began = time.perf_counter()
        batches = self._batches()
        for step in range(self._first_step, steps):
            begin_step()
            self._train_step(step, batches)
            done = step + 1
            last = done == steps
            line = done % train.log_every == 0 or last
            validate = bool(data.validation_split) and (done % train.validate_every == 0 or last)
            save, stop = (False, 0) if last else self._policy.decide(done, signal=requests.signal)
            self._tell_checkpoints()
            if line or validate or save or self._rank.device.type == "cpu":
                # On a GPU, reading a loss waits for it: once for many steps.
                self._tell_losses()
            if (line or save) and data.damaged_images == "replace":
                self._tell_replacements()
            if line:
                self._tell_speed(done)
            if validate:
                self._validate(done)
            if save:
                self._checkpoint(done, stop=bool(stop))
            if stop:
                requests.no_more()
                self._say(
                    f"stopped after step {done}, as {signal.Signals(stop).name} asked for; the same command "
                    "with --resume goes on"
                )
                return False
        return True

    def fit_structure(self) -> Fitted | None:
        """Centres from one pass over the training images, or learnt ones, and γ; None where the
        structure embedding is made of weights."""
        centres = self._engine.module.network.centres
        if centres is None:
            return None
        index = self._training_set.index
        with self._phases("structure"):
            z_ND = self._embedded(index)
            fitted = self._fit(centres, Embedded(z_ND=z_ND, label_N=index.label_N))
        if self._log:
            self._log.structure(self._config.optim.steps, fitted)
        return fitted

    def save_network(self, path: Path, fitted: Fitted | None) -> None:
        """Write the trained network, on the first rank; the others wait for it, so that an error
        there ends them too. fitted: what its centres came from."""
        import deepspeed

        with self._phases("checkpoint"):
            self._policy.finish()
        self._tell_checkpoints()
        network, training_set = self._engine.module.network, self._training_set
        zero_stage = self._config.train.zero_stage
        # Under ZeRO-3 no rank holds a whole parameter until it asks for it, and all ranks must ask
        # together.
        with (
            self._phases("checkpoint"),
            deepspeed.zero.GatheredParameters(list(network.parameters()), enabled=zero_stage == 3),
        ):
            if self._rank.first:
                trained = {
                    "steps": self._config.optim.steps,
                    "ranks": self._rank.world_size,
                    "zero_stage": zero_stage,
                    "precision": "bf16" if network.bf16 else "fp32",
                    "images": len(training_set.index),
                    "classes": training_set.classes,
                    "images_hash": training_set.manifest.hash_of(training_set.index),
                    **({"structure": fitted.record} if fitted else {}),
                    **provenance(),
                }
                save_network(path, network.state_dict(), self._config, trained=trained)
            self._host.largest(0)

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches, on its device."""
        data, optim, manifest = self._config.data, self._config.optim, self._training_set.manifest
        index, device = self._training_set.index, self._rank.device
        plan = TrainPlan(
            index=index,
            sampling=self._training_set.sampling,
            seed=self._config.train.seed,
            rank=self._rank.rank,
            world_size=self._rank.world_size,
            steps=optim.steps,
            first_step=self._first_step,
        )
        transform = TrainTransform.configured(data, size=data.image_size)
        source = ShardImages(manifest, index, transform, damaged=data.damaged_images)
        batches = stream(
            source,
            plan,
            workers=data.workers,
            pin_memory=device.type == "cuda",
            timeout_s=60 * data.batch_minutes,
        )
        return on_device(fetched_ahead(batches, manifest, plan), device)

    def _profiled(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Within it, steps are traced on the first rank if the settings say so; gives what to call
        as each begins."""
        train = self._config.train
        if train.profile is None or not self._rank.first:
            return contextlib.nullcontext(lambda: None)
        return profiled(train.profile, after=train.profile_after)

    def _train_step(self, step: int, batches: Iterator[Batch]) -> None:
        """One update. step: steps done before."""
        self._phases.step = step + 1
        with self._phases("data"):
            batch = next(batches)
        self._replaced += batch.replaced
        factor = lr_factor(step, self._config.optim)
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor
        losses = self._update(batch, step)
        self._pending.append(_Pending(step, losses, factor, self._log.time_s if self._log else 0.0))

    def _update(self, batch: Batch, step: int) -> StepLoss:
        with self._phases("forward"):
            losses: StepLoss = self._engine(
                batch.images_bHW3,
                batch.labels_b,
                (self._config.train.seed << 32) + step,
                (len(batch.labels_b),) * self._rank.world_size,
                batch.index_b,
                ranking_share(
                    self._config.loss.ranking,
                    passes=step * self._images / len(self._training_set.index),
                ),
            )
        with self._phases("backward"):
            self._engine.backward(losses.total)
        with self._phases("step"):
            self._engine.step()
        return losses._replace(total=losses.total.detach())

    def _tell_losses(self) -> None:
        """Read the losses of the pending steps, stop if one is not finite, and log them."""
        values = torch.stack([torch.stack(one.losses) for one in self._pending]).tolist()
        for one, (total, metric, ranking, structure, drift, images) in zip(
            self._pending, values, strict=True
        ):
            if not math.isfinite(total):
                raise InputError(
                    f"the loss is {total} at step {one.step + 1}; lower optim.backbone_lr and "
                    "optim.head_lr, or optim.clip"
                )
            if self._log:
                self._log.step(
                    {
                        "step": one.step + 1,
                        "epoch": one.step // self._steps_per_epoch,
                        "loss": total,
                        "metric_loss": metric,
                        "ranking_loss": ranking,
                        **({"structure_loss": structure} if self._learns else {}),
                        "lr": self._config.optim.head_lr * one.lr_factor,
                        "time_s": round(one.time_s, 3),
                        **({"drift": drift, "drift_images": int(images)} if images else {}),
                    }
                )
        self._line_steps += len(self._pending)
        self._pending.clear()

    def _tell_replacements(self) -> None:
        """Log which damaged images others stood in for."""
        of_ranks = self._host.of_all(self._replaced)
        if self._log:
            self._log.replaced(itertools.chain.from_iterable(of_ranks))
        self._replaced.clear()

    def _tell_speed(self, done: int) -> None:
        """Log where the time went since the last such line."""
        steps = self._line_steps
        spent = StepTimes.of_all_ranks(self._phases.take(), steps=steps, rank=self._rank)
        received = self._engine.module.objective.traffic.take() / steps
        (peak_bytes,) = self._host.largest(take_peak_bytes(self._rank.device))
        if self._log:
            self._log.speed(
                done,
                self._images * steps / (time.perf_counter() - self._line_began),
                spent,
                images=self._images,
                gathered_bytes=received,
                peak_bytes=peak_bytes,
            )
        self._line_steps, self._line_began = 0, time.perf_counter()

    def _validate(self, done: int) -> None:
        with self._pause():
            with self._phases("validation"):
                figures = self._validation_figures()
            if self._log:
                self._log.validation(done, figures)
            self._fit_recent(done)

    def _fit_recent(self, done: int) -> None:
        """Centres from embeddings of steps already taken, or as far as they are learnt, and what
        they are worth in validation: the last fit, on all training images, replaces them."""
        centres, recent = self._engine.module.network.centres, self._engine.module.objective.recent
        if centres is None or done == self._config.optim.steps or not recent.full():
            return
        with self._phases("validation"):
            rows = Embedded(z_ND=recent.z_RD.cpu().numpy(), label_N=np.zeros(0, dtype=np.int64))
            fitted = self._fit(centres, rows)
        if self._log:
            self._log.structure(done, fitted)

    def _fit(self, centres: Centres, training: Embedded) -> Fitted:
        return fit_structure(
            centres,
            training,
            self._validated,
            gamma=self._config.structure.gamma,
            seed=self._config.train.seed,
            host=self._host,
            learnt_MD=self._learnt(),
        )

    def _learnt(self) -> Tensor | None:
        """Learnt centres in units of the mean pairwise distance, on all ranks."""
        loss = self._engine.module.objective.structure_loss
        if loss is None:
            return None
        moves_MD = zero_fragments.get_value(self._engine, loss.moves)
        learnt_MD: Tensor = loss.centres(moves_MD.to(self._rank.device))
        return learnt_MD

    def _validation_figures(self) -> dict[str, float]:
        """Recall and the like, in percent, on the first rank."""
        config, manifest = self._config, self._training_set.manifest
        assert config.data.validation_split
        index = manifest.index(config.data.validation_split)
        z_ND = self._embedded(index)
        self._validated = Embedded(z_ND=z_ND, label_N=index.label_N, role_N=index.role_N)
        return (
            evaluate_sample(z_ND, index.label_N, distance=config.distance, roles_N=index.role_N)
            if self._rank.first
            else {}
        )

    def _embedded(self, index: SplitIndex) -> np.ndarray:
        """z of images, unaugmented, on all ranks."""
        config, manifest = self._config, self._training_set.manifest
        transform = test_transform(config)
        self._engine.eval()
        z_ND, _ = embed(
            self._engine,
            ShardImages(manifest, index, transform, damaged=config.data.damaged_images),
            rank=self._rank,
            batch_size=self._engine.train_micro_batch_size_per_gpu(),
            workers=config.data.workers,
            timeout_s=60 * config.data.batch_minutes,
        )
        self._engine.train()
        return z_ND

    def _checkpoint(self, done: int, *, stop: bool) -> None:
        """Begin to write a checkpoint. If that fails, training goes on, unless it shall stop here:
        then it is waited for, and the run ends."""
        with self._pause():
            if self._log:
                self._log.sync()
            with self._phases("checkpoint"):
                self._policy.save(done)
                saved = stop and self._policy.finish()
        self._tell_checkpoints()
        if stop and not saved:
            raise TransientError(
                f"a signal asked for an end after step {done}, and its checkpoint could not be written; "
                "free some space and go on from the one before with --resume"
            )

    def _tell_checkpoints(self) -> None:
        for line in self._policy.news():
            self._say(line)

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """What is done within takes no time of the steps."""
        began = time.perf_counter()
        yield
        self._line_began += time.perf_counter() - began

    def _say(self, text: str) -> None:
        """A line for people, on the first rank."""
        if self._log:
            self._log.say(text)
