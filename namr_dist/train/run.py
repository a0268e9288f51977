"""A training run on DeepSpeed, on one rank or many, on CPU (gloo) or GPU (NCCL): all that comes
before its steps, and its end."""

from __future__ import annotations

import contextlib
import math
import socket
import sys
from pathlib import Path

from namr_dist.config import Config
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.meeting import Meeting
from namr_dist.parallel.ranks import Rank
from namr_dist.run.folder import RunFolder
from namr_dist.run.log import cut_log, skipped, time_of
from namr_dist.text import say
from namr_dist.train.banner import banner
from namr_dist.train.checkpoints.network import initial_network
from namr_dist.train.checkpoints.policy import CheckpointPolicy
from namr_dist.train.checkpoints.resume import hash_images
from namr_dist.train.checkpoints.state import check_saveable, load_state, seed_generators
from namr_dist.train.checks import centres_for, check_run, check_sizes
from namr_dist.train.engine import make_engine, start_group
from namr_dist.train.logging import RunLog
from namr_dist.train.mfu import device_peak, run_peak_img_per_s
from namr_dist.train.objective import TrainingModule
from namr_dist.train.phases import Phases
from namr_dist.train.precision import choose_precision
from namr_dist.train.signals import StopRequests
from namr_dist.train.start import begin
from namr_dist.train.trainer import Trainer
from namr_dist.train.watchdog import Watchdog, backend_timeout


def train(
    config: Config,
    run: Path,
    rank: Rank,
    meeting: Meeting,
    requests: StopRequests,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> bool:
    """Train as `config` says and leave config.json, metrics.jsonl and the final checkpoint in the
    folder `run`.

    resume: go on from the newest checkpoint in `run`, if there is one.  requests: heard once
    training begins. Every rank calls this. Returns False, on all ranks, if a signal asked for an
    end before the last step; `resume` goes on from there. Raises InputError, before the first step,
    for whatever can be known to be wrong by then.
    """
    folder = RunFolder(run)
    # A checkpoint holds every parameter and buffer, so the weights that training started from need
    # not be had again; `begin` accepts no other run's.
    goes_on = resume and folder.has_parameters
    # Before the process group is up, so that a wrong backbone or file is said at once and once.
    with meeting.all_or_none():
        training_set = check_run(config, world_size=rank.world_size, local_rank=rank.local_rank)
        precision = choose_precision(config.train.precision, rank.device)
        module = _training_module(
            config, training_set, rank, bf16=precision.bf16, pretrained=not goes_on
        )
        data_hash = hash_images(training_set.manifest, training_set.index)
    timeout = backend_timeout(config.train.timeout_minutes)
    phases = module.objective.phases
    with contextlib.ExitStack() as stack:
        starting = stack.enter_context(contextlib.ExitStack())
        starting.enter_context(meeting.watched())
        start_group(rank, timeout)
        host = HostGroup(timeout)
        # Only now, when all ranks have come so far, may an old run be replaced.
        start, lock = begin(
            module, config, folder, data_hash, host, overwrite=overwrite, resume=resume
        )
        if host.from_first(start.finished):
            if rank.first:
                for warning in start.warnings:
                    say(f"WARNING: {warning}", file=sys.stderr)
                say(f"{run} is finished: {folder.final}", file=sys.stderr)
            return True
        hosts = host.of_all(socket.gethostname())
        peak_img_per_s = run_peak_img_per_s(
            module.network,
            device_peak(rank.device),
            size=config.data.image_size,
            device=rank.device,
            ranks=rank.world_size,
        )
        stack.enter_context(requests)
        stack.enter_context(lock or contextlib.nullcontext())
        stack.enter_context(
            Watchdog(phases, rank, requests, timeout_minutes=config.train.timeout_minutes)
        )
        starting.close()
        with phases("start"):
            engine = make_engine(module, config, rank)
            first_step, saved = host.from_first((start.step, start.saved is not None))
            if saved:
                load_state(engine, start.saved, host=host, seed=config.train.seed)
            else:
                seed_generators(seed=config.train.seed, step=0)
        policy = stack.enter_context(
            CheckpointPolicy(
                engine,
                folder,
                config,
                data_hash=data_hash,
                host=host,
                first=rank.first,
                timeout=timeout,
            )
        )
        log = None
        if rank.first:
            kept = cut_log(folder.log, first_step)
            log = stack.enter_context(
                RunLog(
                    folder,
                    steps=config.optim.steps,
                    hosts=hosts,
                    peak_img_per_s=peak_img_per_s,
                    tensorboard=config.train.tensorboard,
                    name=config.recipe,
                    first_step=first_step,
                    before_s=max((time_of(entry) or 0.0 for entry in kept.entries), default=0.0),
                )
            )
            for line in banner(config, training_set, folder, rank, precision):
                log.say(line)
            for warning in start.warnings:
                log.say(f"WARNING: {warning}")
            if kept.unreadable:
                log.say(f"WARNING: {skipped(kept.unreadable, kept.path)}; dropped")
            if start.saved:
                log.resumed(first_step, start.saved.path)
        trainer = Trainer(
            engine, config, training_set, rank, host, policy, log=log, first_step=first_step
        )
        finished = trainer.run(requests)
        if finished:
            fitted = trainer.fit_structure()
            trainer.save_network(folder.final, fitted)
        if finished and log:
            log.say(f"trained {config.optim.steps} steps in {log.time_s:.0f} s → {folder.final}")
    # A launcher ends all ranks when the first has left with a code that is not 0: that must not cut
    # off the log.
    host.largest(0)
    return finished


def _training_module(
    config: Config, training_set: TrainingSet, rank: Rank, *, bf16: bool, pretrained: bool
) -> TrainingModule:
    """The network and what it is trained for, on the rank's device; not `pretrained`, to be filled
    from a checkpoint. Raises InputError if it cannot be built."""
    share = config.data.classes_per_batch * config.data.images_per_class // rank.world_size
    pieces = math.ceil(share / (config.train.micro_batch or share))
    network = initial_network(
        config,
        device=rank.device,
        pretrained=pretrained,
        bf16=bf16,
        pieces=pieces,
        centres=centres_for(config.structure, images=len(training_set.index)),
    )
    check_sizes(network, config, rank.device)
    module = TrainingModule(
        network,
        config.loss,
        classes=training_set.classes,
        images_per_class=config.data.images_per_class,
        structure=config.structure,
        phases=Phases(rank.device),
    )
    check_saveable(module)
    return module.to(rank.device)
