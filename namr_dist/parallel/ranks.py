"""Who am I: rank discovery and the process group, in one place."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from namr_dist.errors import InputError
from namr_dist.parallel.allocator import keep_freed_memory

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def discover() -> Rank:
    """Read the launcher's variables (torchrun, deepspeed); without a launcher, be the only rank.

    Raises InputError if the launcher set some of the variables and not others.
    """
    missing = [name for name in _LAUNCH_VARIABLES if name not in os.environ]
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(_free_port()))
    elif missing:
        raise InputError(f"the launcher set no {', '.join(missing)}; start with torchrun or deepspeed, or unset "
                         "RANK and WORLD_SIZE for a single process")
    local_rank = int(os.environ["LOCAL_RANK"])
    return Rank(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), local_rank=local_rank,
                device=_device(local_rank))


def only_rank() -> Rank:
    """This process by itself, whatever launched it: for work that is not shared."""
    return Rank(rank=0, world_size=1, local_rank=0, device=_device(0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"LOCAL_RANK is {local_rank}, but this machine shows {torch.cuda.device_count()} GPUs; "
                         "start one process a GPU")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def world_size() -> int:
    """Ranks in the process group; 1 where none was started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shut_down() -> None:
    """Leave the process group and, on many ranks, the process.

    gloo's threads may abort a process at its very end, after all its work (seen with ZeRO-3): what is left to do
    then is to flush and go.
    """
    if not dist.is_initialized():
        return
    many = dist.get_world_size() > 1
    dist.destroy_process_group()
    if many:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
