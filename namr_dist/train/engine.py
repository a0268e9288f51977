"""DeepSpeed: the process group, the optimizer's parameter groups, the engine."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from namr_dist.config import Config, OptimConfig
from namr_dist.parallel.ranks import Rank
from namr_dist.train.objective import TrainingModule

# DeepSpeed takes seconds to import and looks at the environment: only once that is set.
if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def start_group(rank: Rank, timeout: timedelta) -> None:
    """Start the process group of all ranks, whose collectives wait for each other so long; half an
    hour at least, for before they meet one of them verifies the shards."""
    os.environ.setdefault("DS_ACCELERATOR", rank.device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor).*")
    import deepspeed

    if rank.device.type == "cpu":
        # A C++ op for faster sums within one machine: building it takes longer than it saves here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if rank.device.type == "cuda" else "gloo"
    if rank.world_size == 1 and not dist.is_initialized():
        # A single process has nobody to listen to.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, verbose=False, timeout=max(timeout, timedelta(minutes=30)))


def make_engine(module: TrainingModule, config: Config, rank: Rank) -> DeepSpeedEngine:
    """DeepSpeed's engine around the module."""
    import deepspeed

    images = config.data.classes_per_batch * config.data.images_per_class
    trained = sum(value.numel() for value in module.parameters() if value.requires_grad)
    settings = {
        "train_batch_size": images,
        "train_micro_batch_size_per_gpu": images // rank.world_size,
        "gradient_clipping": config.optim.clip,
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        # Its stop watch waits for the device twice a step; phases.py needs no such thing.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": config.train.zero_stage,
            "overlap_comm": rank.device.type == "cuda" and rank.world_size > 1,
            # Buffers of this size are made whatever the network's: by default of 2 GB, twice.
            "reduce_bucket_size": min(500_000_000, trained),
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 0,
        },
    }
    if config.train.zero_stage == 3:
        # A loss from outside has its parameters in a module of its own. Once that has returned,
        # ZeRO-3 puts them away, unless they are said to be used here, where gradients are made.
        metric_loss = module.objective.metric_loss
        for parameter in set(metric_loss.parameters()) - set(metric_loss.parameters(recurse=False)):
            deepspeed.zero.register_external_parameter(metric_loss, parameter)
    optimizer = torch.optim.AdamW(parameter_groups(module, config.optim))
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def parameter_groups(module: TrainingModule, config: OptimConfig) -> list[dict]:
    """AdamW's groups, each with its peak learning rate; empty ones (a loss without parameters) left
    out."""
    network = module.network
    parts = (
        (network.backbone, config.backbone_lr, True),
        (network.sample_head, config.head_lr, True),
        (network.structure_head, config.head_lr, True),
        (module.objective.metric_loss, config.loss_lr, False),
        (module.objective.structure_loss or nn.Module(), config.loss_lr, False),
    )
    groups = []
    for part, peak, may_decay in parts:
        parameters = [value for value in part.parameters() if value.requires_grad]
        for decays in (True, False):
            # Vectors are biases and norms: pulling them to zero regularises nothing.
            chosen = [value for value in parameters if (may_decay and value.dim() > 1) == decays]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": peak,
                        "weight_decay": config.weight_decay if decays else 0.0,
                    }
                )
    return groups
