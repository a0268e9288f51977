"""Who am I: rank discovery and the process group, in one place.

Who launched this process is read from the environment; the first that matches counts:

1. RANK: torchrun, deepspeed, or variables set by hand
2. OMPI_COMM_WORLD_RANK: Open MPI's mpirun; MPI_LOCALRANKID: MPICH's and Intel's
3. SLURM_STEP_ID: srun with one task a rank, which is what `deepspeed --launcher slurm` starts
4. none: alone. So are the shells of sbatch and salloc, which have SLURM_NTASKS but belong to no
step.

mpirun stands before srun: within a Slurm job it starts its daemons by srun, and its ranks inherit
their variables.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from namr_dist.errors import InputError
from namr_dist.parallel.allocator import keep_freed_memory
from namr_dist.parallel.hostlist import expand_hosts

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_BY_HAND = "start with torchrun or deepspeed, or unset RANK and WORLD_SIZE for a single process"

_MPI_PORT = 29500
# Below the ports that Linux hands out by itself. Jobs that share a first host get ports of their
# own.
_STEP_PORTS = range(20_000, 30_000)
_STEPS_A_JOB = 16


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a launcher's variables say of this process."""

    launcher: str
    """torchrun, deepspeed, environment, mpirun, srun or none."""
    rank: int
    world_size: int
    local_rank: int
    """Place among the ranks of this machine."""
    master_addr: str
    master_port: int


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    launcher: str = "none"
    """Who started it, as in Launch."""

    @property
    def first(self) -> bool:
        """True for rank 0, which writes and speaks for all."""
        return self.rank == 0


def discover() -> Rank:
    """Find out who launched this process, and set the five variables that torch and DeepSpeed read.

    Raises InputError if a launcher's variables are incomplete or contradict each other.
    """
    launch = read_launch(os.environ)
    device, index = _device(launch)
    # Libraries take LOCAL_RANK for the number of the GPU.
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(index),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    return Rank(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        device=device,
        launcher=launch.launcher,
    )


def only_rank() -> Rank:
    """This process by itself, whatever launched it: for work that is not shared."""
    launch = _alone()
    return Rank(
        rank=0, world_size=1, local_rank=0, device=_device(launch)[0], launcher=launch.launcher
    )


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Who launched a process with these variables. Raises InputError as `discover` does."""
    if "RANK" in environ:
        return _from_variables(environ)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_mpirun(
            environ,
            rank="OMPI_COMM_WORLD_RANK",
            size="OMPI_COMM_WORLD_SIZE",
            local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
            local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
        )
    if "MPI_LOCALRANKID" in environ:
        return _from_mpirun(
            environ,
            rank="PMI_RANK",
            size="PMI_SIZE",
            local_rank="MPI_LOCALRANKID",
            local_size="MPI_LOCALNRANKS",
        )
    if environ.get("SLURM_STEP_ID", "").isdecimal():
        return _from_srun(environ)
    if "WORLD_SIZE" in environ:
        raise InputError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']}, but the launcher set no RANK; {_BY_HAND}"
        )
    if "PMI_RANK" in environ:
        raise InputError(
            f"PMI_RANK is {environ['PMI_RANK']}, but the launcher set no MPI_LOCALRANKID; start with the "
            "mpirun of Open MPI, MPICH or Intel, or unset PMI_RANK for a single process"
        )
    return _alone()


def _alone() -> Launch:
    return Launch(
        launcher="none",
        rank=0,
        world_size=1,
        local_rank=0,
        master_addr="127.0.0.1",
        master_port=_free_port(),
    )


def _from_variables(environ: Mapping[str, str]) -> Launch:
    _demand(environ, _VARIABLES, remedy=_BY_HAND)
    rank, world_size, local_rank = _rank_numbers(
        environ, "RANK", "WORLD_SIZE", "LOCAL_RANK", remedy=_BY_HAND
    )
    # Each launcher leaves a variable of its own.
    launcher = next(
        (
            name
            for name, own in (("torchrun", "TORCHELASTIC_RUN_ID"), ("deepspeed", "CROSS_RANK"))
            if own in environ
        ),
        "environment",
    )
    return Launch(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        master_addr=environ["MASTER_ADDR"],
        master_port=_port(environ),
    )


def _from_mpirun(
    environ: Mapping[str, str], *, rank: str, size: str, local_rank: str, local_size: str
) -> Launch:
    remedy = "start all ranks with one mpirun"
    _demand(environ, (rank, size, local_rank, local_size), remedy=remedy)
    own_rank, world_size, own_local_rank = _rank_numbers(
        environ, rank, size, local_rank, remedy=remedy
    )
    _agree(environ, world_size, by=size)
    address = environ.get("MASTER_ADDR")
    if address is None and environ[local_size] != environ[size]:
        raise InputError(
            f"{size} is {world_size} and {local_size} is {environ[local_size]}, so there are several "
            "machines, but MASTER_ADDR is not set; pass the first machine's name on to all ranks "
            "(mpirun -x MASTER_ADDR=HOST, or -genv MASTER_ADDR HOST)"
        )
    return Launch(
        launcher="mpirun",
        rank=own_rank,
        world_size=world_size,
        local_rank=own_local_rank,
        master_addr=address or "127.0.0.1",
        master_port=_port(environ) if "MASTER_PORT" in environ else _MPI_PORT,
    )


def _from_srun(environ: Mapping[str, str]) -> Launch:
    """One task of a step. SLURM_NTASKS is not asked: in an interactive step it is the whole
    job's."""
    remedy = "start all ranks with one srun, a task each"
    size = "SLURM_STEP_NUM_TASKS"
    _demand(
        environ,
        ("SLURM_PROCID", size, "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"),
        remedy=remedy,
    )
    rank, world_size, local_rank = _rank_numbers(
        environ, "SLURM_PROCID", size, "SLURM_LOCALID", remedy=remedy
    )
    _agree(environ, world_size, by=size)
    job, step = (
        _number(environ, name, remedy=remedy) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    if world_size == 1:
        address, port = "127.0.0.1", _free_port()
    else:
        # Slurm numbers tasks from the first host of the step's list.
        address = environ.get("MASTER_ADDR") or expand_hosts(environ["SLURM_STEP_NODELIST"])[0]
        port = (
            _port(environ)
            if "MASTER_PORT" in environ
            else _STEP_PORTS[(job * _STEPS_A_JOB + step) % len(_STEP_PORTS)]
        )
    return Launch(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        master_addr=address,
        master_port=port,
    )


def _demand(environ: Mapping[str, str], names: Sequence[str], *, remedy: str) -> None:
    if missing := [name for name in names if name not in environ]:
        there = next(name for name in names if name in environ)
        raise InputError(
            f"{there} is {environ[there]}, but the launcher set no {', '.join(missing)}; {remedy}"
        )


def _rank_numbers(
    environ: Mapping[str, str], rank: str, size: str, local_rank: str, *, remedy: str
) -> tuple[int, int, int]:
    """Rank, world size and local rank, each a number, the ranks below the size."""
    values = [_number(environ, name, remedy=remedy) for name in (rank, size, local_rank)]
    for name, value in ((rank, values[0]), (local_rank, values[2])):
        if value >= values[1]:
            raise InputError(
                f"{name} is {value}, but {size} is {values[1]}, and ranks count from 0; {remedy}"
            )
    return values[0], values[1], values[2]


def _agree(environ: Mapping[str, str], world_size: int, *, by: str) -> None:
    """Raise InputError if WORLD_SIZE, which people export themselves, says something else."""
    if environ.get("WORLD_SIZE", str(world_size)) != str(world_size):
        raise InputError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']}, but {by} is {world_size}; start one task a rank, or "
            "unset WORLD_SIZE"
        )


def _number(environ: Mapping[str, str], name: str, *, remedy: str) -> int:
    if not environ[name].isdecimal():
        raise InputError(f"{name} is {environ[name]!r}, not a whole number from 0; {remedy}")
    return int(environ[name])


def _port(environ: Mapping[str, str]) -> int:
    remedy = "set it to a free port of the first machine, 1 to 65535"
    port = _number(environ, "MASTER_PORT", remedy=remedy)
    if not 1 <= port <= 65535:
        raise InputError(f"MASTER_PORT is {port}; {remedy}")
    return port


def _device(launch: Launch) -> tuple[torch.device, int]:
    """The rank's device, and the value of LOCAL_RANK that leads libraries to it."""
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu"), launch.local_rank
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "0") if launch.launcher == "srun" else "0"
    index = gpu_index(
        launch.local_rank,
        visible=torch.cuda.device_count(),
        on_node=int(on_node) if on_node.isdecimal() else 0,
    )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # Else gradients of convolutions add up in another order each time, and no run repeats or
    # resumes exactly.
    torch.backends.cudnn.deterministic = True
    return device, index


def gpu_index(local_rank: int, *, visible: int, on_node: int) -> int:
    """Which of the visible GPUs is the rank's. `on_node`: those that srun has on this machine; 0 if
    not srun.

    Raises InputError if there is none for it.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and local_rank < on_node:
        return 0  # srun --gpus-per-task shows each task only its own
    raise InputError(
        f"LOCAL_RANK is {local_rank}, but this machine shows {visible} GPUs; start one process a GPU"
    )


def start_group(rank: Rank, timeout: timedelta) -> None:
    """Start the process group of all ranks, whose collectives wait for each other so long; none for
    a single one. After `discover`, whose variables it reads."""
    if rank.world_size > 1:
        backend = "nccl" if rank.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)


def rank_number() -> int:
    """Of this process in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks in the process group; 1 where none was started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shut_down(code: int) -> None:
    """Leave the process group and, on many ranks, the process, with this exit code.

    gloo's threads may abort a process at its very end, after all its work (seen with ZeRO-3): what
    is left to do then is to flush and go.
    """
    if not dist.is_initialized():
        return
    many = dist.get_world_size() > 1
    dist.destroy_process_group()
    if many:
        end(code)


def end(code: int) -> NoReturn:
    """End this process at once, with what it has printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
