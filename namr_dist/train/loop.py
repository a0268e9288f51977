"""Training on DeepSpeed, for one rank or many, on CPU (gloo) or GPU (NCCL)."""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
import torch.distributed as dist

from namr_dist import kernels
from namr_dist.atomic import write_atomic
from namr_dist.config import Config
from namr_dist.data.read.augment import TrainTransform
from namr_dist.data.read.plan import Sampling, small_classes, steps_per_epoch
from namr_dist.data.read.stream import Batch, ShardImages, TrainPlan, stream
from namr_dist.data.read.to_device import on_device
from namr_dist.data.remote.prefetch import fetched_ahead
from namr_dist.data.shardset.manifest import Manifest, SplitIndex
from namr_dist.errors import InputError
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import Rank, shut_down
from namr_dist.provenance import provenance
from namr_dist.retrieval.evaluate import evaluate_sample
from namr_dist.run.folder import RunFolder
from namr_dist.run.log import cut_log, skipped, time_of
from namr_dist.train.checkpoints.network import initial_network, save_network
from namr_dist.train.checkpoints.policy import CheckpointKeeper
from namr_dist.train.checkpoints.resume import Start, find_start, hash_images
from namr_dist.train.checkpoints.state import check_fits, load_state, seed_generators
from namr_dist.train.embed import embed, test_transform
from namr_dist.train.engine import make_engine, start_group
from namr_dist.train.logging import RunLog
from namr_dist.train.mfu import device_peak, run_peak_img_per_s
from namr_dist.train.objective import StepLoss, TrainingModule
from namr_dist.train.peak_memory import take_peak_bytes
from namr_dist.train.phases import Phases, StepTimes
from namr_dist.train.preflight import check_sizes, preflight, run_bytes
from namr_dist.train.schedule import lr_factor
from namr_dist.train.signals import StopRequests
from namr_dist.train.watchdog import Watchdog, backend_timeout

if TYPE_CHECKING:  # deepspeed takes seconds to import and looks at the environment: only once that is set
    from deepspeed import DeepSpeedEngine


def train(config: Config, run: Path, rank: Rank, *, overwrite: bool = False, resume: bool = False) -> bool:
    """Train as `config` says and leave config.json, metrics.jsonl and the final checkpoint in the folder `run`.

    resume: go on from the newest checkpoint in `run`, if there is one. Every rank calls it. False, on all of them:
    a signal asked for an end before the last step, and `resume` goes on. Raises InputError, before the first step,
    for whatever can be known to be wrong by then.
    """
    folder = RunFolder(run)
    manifest, index, how = preflight(config, world_size=rank.world_size, local_rank=rank.local_rank)
    bf16, why = _precision(config, rank.device)
    # Built before the process group is up, so that a wrong backbone or file is said at once and once.
    share = config.data.classes_per_batch * config.data.images_per_class // rank.world_size
    pieces = math.ceil(share / (config.train.micro_batch or share))
    network = initial_network(config, device=rank.device, pretrained=True, bf16=bf16, pieces=pieces)
    check_sizes(network, config, rank.device)
    module = TrainingModule(network, config.loss, classes=len(np.unique(index.label_N)),
                            images_per_class=config.data.images_per_class, phases=Phases(rank.device)).to(rank.device)
    data_hash = hash_images(manifest, index)
    timeout = backend_timeout(config.train.timeout_minutes)
    start_group(rank, timeout)
    host = HostGroup(timeout)
    phases = module.objective.phases
    # Only now, when all ranks have come so far, may an old run be replaced.
    start, lock = _start(module, config, folder, data_hash, host, overwrite=overwrite, resume=resume)
    if host.from_first(start.finished):
        if rank.first:
            print(f"{run} is finished: {folder.final}", file=sys.stderr)
        return True
    hosts = host.of_all(socket.gethostname())
    peak_img_per_s = run_peak_img_per_s(network, device_peak(rank.device), size=config.data.image_size,
                                        device=rank.device, ranks=rank.world_size)
    with StopRequests() as requests, lock or contextlib.nullcontext(), contextlib.ExitStack() as stack:
        stack.enter_context(Watchdog(phases, rank, timeout_minutes=config.train.timeout_minutes))
        with phases("start"):
            engine = make_engine(module, config, rank)
            first_step = host.from_first(start.step)
            if first_step:
                load_state(engine, start.saved, host=host, seed=config.train.seed)
            else:
                seed_generators(seed=config.train.seed, step=0)
        keeper = CheckpointKeeper(engine, folder, config, data_hash=data_hash, host=host, first=rank.first)
        log = None
        if rank.first:
            before = cut_log(folder.log, first_step)
            before_s = max((time_of(entry) or 0.0 for entry in before.entries), default=0.0)
            log = stack.enter_context(RunLog(folder, steps=config.optim.steps, hosts=hosts,
                                             peak_img_per_s=peak_img_per_s, tensorboard=config.train.tensorboard,
                                             name=config.recipe, first_step=first_step, before_s=before_s))
            for line in _banner(config, manifest, index, how, run, rank,
                                precision=f"{'bf16' if bf16 else 'fp32'} ({why})"):
                log.say(line)
            for warning in start.warnings:
                log.say(f"WARNING: {warning}; an older one is used")
            if before.unreadable:
                log.say(f"WARNING: {skipped(before.unreadable, before.path)}; dropped")
            if start.saved:
                log.resumed(first_step, start.saved.path)
        finished = _steps(engine, config, manifest, index, how, rank, host, keeper, requests,
                          first_step=first_step, log=log)
        if finished:
            _save(engine, config, folder, rank, manifest, index)
        if finished and log:
            log.say(f"trained {config.optim.steps} steps in {log.time_s:.0f} s → {folder.final}")
    # A launcher ends all ranks when the first has left with a code that is not 0: that must not cut off the log.
    host.largest(0)
    return finished


def _start(module: TrainingModule, config: Config, run: RunFolder, data_hash: str, host: HostGroup, *, overwrite: bool,
           resume: bool) -> tuple[Start, BinaryIO | None]:
    """Make the folder ready and say where to begin, on the first rank; with the lock that keeps others out of it.

    Raises InputError there if it cannot, and ends the other ranks.
    """
    trouble: InputError | OSError | None = None
    start, lock = Start(), None
    if dist.get_rank() == 0:
        try:
            start, lock = _claim(module, config, run, data_hash, overwrite=overwrite, resume=resume)
        except (InputError, OSError) as error:
            trouble = error
    _end_together(trouble, host)
    return start, lock


def _end_together(trouble: Exception | None, host: HostGroup) -> None:
    """Raise the first rank's trouble there, once, and end the others with the exit code it will have."""
    if not host.from_first(trouble is not None):
        return
    if trouble is None:
        shut_down(2)
    dist.destroy_process_group()
    assert trouble is not None
    raise trouble


def _claim(module: TrainingModule, config: Config, run: RunFolder, data_hash: str, *, overwrite: bool,
           resume: bool) -> tuple[Start, BinaryIO | None]:
    lock = run.lock() if run.path.is_dir() else None
    start = find_start(run, config, data_hash=data_hash) if resume else Start()
    if start.finished:
        return start, lock
    if start.saved:
        check_fits(start.saved, module)
    there_bytes = sum(path.stat().st_size for _, path in run.checkpoints()) if start.goes_on else 0
    run.claim(overwrite=overwrite, goes_on=start.goes_on,
              need_bytes=max(0, run_bytes(module, config) - there_bytes))
    lock = lock or run.lock()
    write_atomic(run.config, config.to_json())
    return start, lock


def _precision(config: Config, device: torch.device) -> tuple[bool, str]:
    wanted = config.train.precision
    if device.type != "cuda":
        if wanted == "bf16":
            return True, "asked for; on a CPU it saves no time unless it has AMX"
        return False, "CPU" if wanted == "auto" else "asked for"
    if wanted != "auto":
        return wanted == "bf16", "asked for"
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    return able, "the GPU has it" if able else "the GPU has no bf16 units"


def _steps(engine: DeepSpeedEngine, config: Config, manifest: Manifest, index: SplitIndex, how: Sampling,
           rank: Rank, host: HostGroup, keeper: CheckpointKeeper, requests: StopRequests, *, first_step: int,
           log: RunLog | None) -> bool:
    """All steps from `first_step` on; False if a signal ended them before the last."""
    data, optim = config.data, config.optim
    transform = TrainTransform.configured(data, size=data.image_size)
    plan = TrainPlan(index=index, how=how, seed=config.train.seed, rank=rank.rank, world_size=rank.world_size,
                     steps=optim.steps, first_step=first_step)
    source = ShardImages(manifest, index, transform, damaged=data.damaged_images)
    batches = stream(source, plan, workers=data.workers, pin_memory=rank.device.type == "cuda",
                     timeout_s=60 * data.batch_minutes)
    batches = on_device(fetched_ahead(batches, manifest, plan), rank.device)
    phases, traffic = engine.module.objective.phases, engine.module.objective.traffic
    peaks = [group["lr"] for group in engine.optimizer.param_groups]
    per_epoch = steps_per_epoch(index, how)
    images = data.classes_per_batch * data.images_per_class
    pending: list[tuple[int, StepLoss, float, float]] = []
    replaced: list[str] = []
    line_steps, line_began = 0, time.perf_counter()
    engine.train()
    phases.take()
    for step in range(plan.first_step, optim.steps):
        phases.step = step + 1
        with phases("data"):
            batch = next(batches)
        replaced += batch.replaced
        factor = lr_factor(step, optim)
        for group, peak in zip(engine.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        losses = _one_step(engine, batch, rank, phases, seed=(config.train.seed << 32) + step)
        pending.append((step, losses, factor, log.time_s if log else 0.0))
        last = step + 1 == optim.steps
        line = (step + 1) % config.train.log_every == 0 or last
        validate = bool(data.validation_split) and ((step + 1) % config.train.validate_every == 0 or last)
        save, stop = (False, False) if last else keeper.decide(step + 1, signal=requests.signal)
        if line or validate or save or rank.device.type == "cpu":
            # On a GPU, reading a loss waits for it: once for many steps.
            _report(pending, config, per_epoch, log)
            line_steps += len(pending)
            pending.clear()
        if (line or save) and data.damaged_images == "replace":
            of_ranks = host.of_all(replaced)
            if log:
                log.replaced(itertools.chain.from_iterable(of_ranks))
            replaced.clear()
        if line:
            spent = StepTimes.of_all_ranks(phases.take(), steps=line_steps, rank=rank)
            received = traffic.take() / line_steps
            peak_bytes, = host.largest(take_peak_bytes(rank.device))
            if log:
                log.speed(step + 1, images * line_steps / (time.perf_counter() - line_began), spent,
                          images=images, gathered_bytes=received, peak_bytes=peak_bytes)
            line_steps, line_began = 0, time.perf_counter()
        if validate:
            paused = time.perf_counter()
            with phases("validation"):
                figures = _validate(engine, config, manifest, rank)
            if log:
                log.validation(step + 1, figures)
            line_began += time.perf_counter() - paused
        if save:
            paused = time.perf_counter()
            if log:
                log.sync()
            with phases("checkpoint"):
                saved, said = keeper.save(step + 1)
            if log:
                log.say(said)
            line_began += time.perf_counter() - paused
            if stop and not saved:
                if not rank.first:
                    shut_down(2)
                raise InputError(f"a signal asked for an end after step {step + 1}, and its checkpoint could not be "
                                 "written; free some space and go on from the one before with --resume")
        if stop:
            if log:
                log.say(f"stopped after step {step + 1}, as a signal asked for; the same command with --resume goes on")
            return False
    return True


def _one_step(engine: DeepSpeedEngine, batch: Batch, rank: Rank, phases: Phases, *, seed: int) -> StepLoss:
    with phases("forward"):
        losses: StepLoss = engine(batch.images_bHW3, batch.labels_b, seed, (len(batch.labels_b),) * rank.world_size,
                                  batch.index_b)
    with phases("backward"):
        engine.backward(losses.total)
    with phases("step"):
        engine.step()
    return losses._replace(total=losses.total.detach())


def _report(pending: list[tuple[int, StepLoss, float, float]], config: Config, per_epoch: int,
            log: RunLog | None) -> None:
    """Read the losses of the pending steps, stop if one is not finite, and log them."""
    values = torch.stack([torch.stack(loss) for _, loss, _, _ in pending]).tolist()
    for (step, _, factor, time_s), (total, metric, ranking, drift, images) in zip(pending, values, strict=True):
        if not math.isfinite(total):
            raise InputError(f"the loss is {total} at step {step + 1}; lower optim.backbone_lr and optim.head_lr, "
                             "or optim.clip")
        if log:
            log.step({"step": step + 1, "epoch": step // per_epoch, "loss": total, "metric_loss": metric,
                      "ranking_loss": ranking, "lr": config.optim.head_lr * factor, "time_s": round(time_s, 3),
                      **({"drift": drift, "drift_images": int(images)} if images else {})})


def _validate(engine: DeepSpeedEngine, config: Config, manifest: Manifest, rank: Rank) -> dict[str, float]:
    assert config.data.validation_split
    index = manifest.index(config.data.validation_split)
    images = ShardImages(manifest, index, test_transform(config))
    engine.eval()
    z_ND, _ = embed(engine, images, rank=rank, batch_size=engine.train_micro_batch_size_per_gpu(),
                    workers=config.data.workers, timeout_s=60 * config.data.batch_minutes)
    engine.train()
    return evaluate_sample(z_ND, index.label_N, roles_N=index.role_N) if rank.first else {}


def _save(engine: DeepSpeedEngine, config: Config, run: RunFolder, rank: Rank, manifest: Manifest,
          index: SplitIndex) -> None:
    import deepspeed

    network = engine.module.network
    # Under ZeRO-3 no rank holds a whole parameter until it asks for it, and all ranks must ask together.
    with engine.module.objective.phases("checkpoint"), \
            deepspeed.zero.GatheredParameters(list(network.parameters()), enabled=config.train.zero_stage == 3):
        if rank.first:
            trained = {"steps": config.optim.steps, "ranks": rank.world_size, "zero_stage": config.train.zero_stage,
                       "precision": "bf16" if network.bf16 else "fp32", "images": len(index),
                       "classes": len(np.unique(index.label_N)), "images_hash": manifest.hash_of(index), **provenance()}
            save_network(run.final, network.state_dict(), config, trained=trained)


def _banner(config: Config, manifest: Manifest, index: SplitIndex, how: Sampling, run: Path, rank: Rank, *,
            precision: str) -> list[str]:
    """What runs, on what, which fast paths are on, and why not where they are not."""
    device = torch.cuda.get_device_name(rank.device) if rank.device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads a rank"
    data, loss = config.data, config.loss
    few = small_classes(index, how)
    idle = [split for split in manifest.splits
            if split not in (*data.train_splits, data.validation_split, data.test_split)]
    ranking = f" + {loss.ranking.weight:g} × multi-cluster ranking (M = {loss.ranking.clusters})" \
        if loss.ranking.weight else ", no multi-cluster ranking"
    memory = f", memory of {loss.memory.rows} rows from step {loss.memory.start_step} on" if loss.memory.rows else ""
    return [
        f"run       {config.recipe} → {run}",
        f"device    {rank.world_size} × {device}; ZeRO {config.train.zero_stage}; {precision}"
        + (f"; started by {rank.launcher}" if rank.launcher != "none" else ""),
        f"data      {manifest.name}: {len(index)} images, {len(np.unique(index.label_N))} classes; batches of "
        f"{data.classes_per_batch} × {data.images_per_class} at {data.image_size} px"
        + (f", {config.train.micro_batch} a rank at a time" if config.train.micro_batch else "")
        + (f"; {few} classes have fewer images and repeat some" if few else "")
        + (f"; not used: {', '.join(idle)}" if idle and data.test_split in manifest.splits else ""),
        f"sampling  {how.sampling}, {steps_per_epoch(index, how)} steps an epoch; "
        + ("shards read front to back" if how.shuffle == "shards" else "any classes share a batch")
        + (f"; {how.views} views of an image" if how.views > 1 else "")
        + ("; across groups" if how.across_groups else ""),
        f"model     {config.model.backbone}, batch norm {config.model.batchnorm}, width {config.model.width}",
        f"loss      {loss.metric}{ranking}{memory}; {kernels.describe(rank.device)}",
    ]
