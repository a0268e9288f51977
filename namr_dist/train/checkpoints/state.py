"""A training state: what each rank writes of it, and how a fresh engine is filled from it.

A checkpoint (parts.py) holds by name: `model/…`, every parameter and every buffer;
`adamw/…/exp_avg`, `…/exp_avg_sq` and `…/step`, what AdamW knows of each parameter; `rank/00000/…`,
each rank's random generators. Tensors are named as the model names them, whatever the ZeRO stage.
Data position and learning rate are functions of the step.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from namr_dist import __version__
from namr_dist.config import Config
from namr_dist.data.remote.address import without_credentials
from namr_dist.errors import InputError
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import world_size
from namr_dist.train.checkpoints import parts, zero_fragments
from namr_dist.train.checkpoints.parts import Piece, SavedTensors
from namr_dist.train.checkpoints.verified_file import DTYPES

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_FORMAT = "namr-training/2"
_MOST = 10**15
_OF_RANK = re.compile(r"rank/([0-9]{5,9})/\w+")
_DEPENDED_ON = ("deepspeed", "numpy", "simplejpeg")
_RNG_STREAM = 3  # others are the plan's and the augmentation's (data/read/plan.py)


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A checkpoint whose bytes have been verified, and what it says of itself."""

    path: Path
    step: int
    """Steps done."""
    ranks: int
    """World size that wrote it."""
    zero_stage: int
    data_hash: str
    """Of the images that were trained on."""
    config: Config
    versions: dict[str, str]
    """What wrote it, as `versions` gives them."""
    files: tuple[str, ...]
    """Names of the parts."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """This rank's part of the state after some step, copied to the host: training may go on."""

    pieces: dict[str, Piece]
    trained: frozenset[str]
    """Names of those that are parameters."""
    about: dict[str, Any]
    """What the index says."""


class HostMemory:
    """Where a rank's snapshots lie, one at a time: as much as its part of the state takes, from the
    first on. Where a GPU copies to it, it is page-locked, and torch rounds it up to a power of
    two."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, pieces: Mapping[str, Piece], device: torch.device) -> dict[str, Piece]:
        """The pieces with values on the host. Overwrites what was copied before. Raises
        MemoryError."""
        # Widest dtype first, so that each begins at a multiple of its own width.
        ordered = sorted(pieces.items(), key=lambda item: -item[1].values.dtype.itemsize)
        needed = sum(piece.values.nbytes for _, piece in ordered)
        if len(self._bytes) != needed:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # not both at a time
            try:
                self._bytes = torch.empty(
                    needed, dtype=torch.uint8, pin_memory=device.type == "cuda"
                )
            except RuntimeError:
                raise MemoryError(
                    f"the host has no {needed / 2**30:.1f} GiB of memory left for a copy of the state"
                ) from None
        copied, offset = {}, 0
        for name, piece in ordered:
            room = self._bytes[offset : offset + piece.values.nbytes]
            values = room.view(piece.values.dtype).reshape(piece.values.shape)
            values.copy_(piece.values, non_blocking=True)
            copied[name] = Piece(values=values, start=piece.start, shape=piece.shape)
            offset += piece.values.nbytes
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return copied


def versions() -> dict[str, str]:
    """Of the packages on which the bits of a step depend: what computes it, and what makes its
    batches."""
    of_others = {name: importlib.metadata.version(name) for name in _DEPENDED_ON}
    return {"namr-dist": __version__, "torch": torch.__version__, **of_others}


def state_bytes(module: nn.Module) -> int:
    """Size of a checkpoint, but for its header and random generators."""
    held = sum(value.numel() * value.element_size() for _, value in named_state(module))
    return held + 2 * sum(value.numel() * 4 for value in module.parameters() if value.requires_grad)


def check_saveable(module: nn.Module) -> None:
    """Raise InputError for a part of the module's state that no checkpoint can hold, as a backbone
    or a loss from outside may have one: better before the first step than at the first checkpoint.
    """
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"{name} is {kind}, which no checkpoint can hold; make it a tensor of numbers of another "
                "type, or a buffer that is not persistent"
            )


@torch.no_grad()
def take_snapshot(
    engine: DeepSpeedEngine, memory: HostMemory, *, step: int, config: Config, data_hash: str
) -> Snapshot:
    """This rank's part of the state after `step` steps. No message is sent.

    Raises MemoryError where the host has none for it. The snapshot before is overwritten.
    """
    pieces = memory.copy(_own_pieces(engine), engine.device)
    return Snapshot(
        pieces=pieces,
        trained=frozenset(f"model/{name}" for name, _ in engine.module.named_parameters()),
        about={
            "format": _FORMAT,
            "version": __version__,
            "versions": versions(),
            "step": step,
            "ranks": world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "data": data_hash,
            "config": json.loads(without_credentials(config).to_json()),
        },
    )


def write_snapshot(snapshot: Snapshot | str, path: Path, host: HostGroup) -> str | None:
    """Write what all ranks took, each its own part; None, or why it could not be written. All ranks
    call it, and learn that.

    snapshot: or why this rank has none. The checkpoint appears whole and verified or not at all.
    """
    trouble, part = (snapshot, None) if isinstance(snapshot, str) else _write_part(snapshot, path)
    written = host.of_all((trouble, part))
    trouble = next((there for there, _ in written if there is not None), None)
    if dist.get_rank() == 0:
        try:
            if trouble is None:
                assert isinstance(snapshot, Snapshot)
                parts.finish(path, snapshot.about, [part for _, part in written])
        except OSError as error:
            trouble = error.strerror or str(error)
        if trouble is not None:
            parts.discard(path)
    return host.from_first(f"{trouble}: {path}" if trouble else None)


def _write_part(snapshot: Snapshot, path: Path) -> tuple[str | None, dict[str, Any] | None]:
    """(why it could not be written, its entry in the index)"""
    # Buffers may hold what they like, such as the least value so far, which begins as infinity.
    for name in sorted(snapshot.trained & snapshot.pieces.keys()):
        if not snapshot.pieces[name].values.isfinite().all():
            return f"{name.removeprefix('model/')} is not finite", None
    try:
        return None, parts.write_part(path, dist.get_rank(), snapshot.pieces)
    except OSError as error:
        return error.strerror or str(error), None


def open_state(path: Path) -> SavedState:
    """Read and verify every byte of a checkpoint.

    Raises DamagedFileError, or InputError for one that is whole but of another format.
    """
    about = parts.open_index(path)
    where = path / parts.INDEX
    if about.get("format") != _FORMAT:
        raise InputError(
            f"{where} has format {about.get('format')!r}, expected {_FORMAT!r}; it was written by "
            f"version {about.get('version')} of namr-dist: go on with that one, or start again with "
            "--overwrite"
        )
    for name in ("step", "ranks", "zero_stage"):
        if not isinstance(about.get(name), int) or not 0 <= about[name] < _MOST:
            raise InputError(f"{where}: {name} is {about.get(name)!r}, not a count; {parts.REMEDY}")
    others = about.get("versions")
    if not isinstance(others, dict) or not isinstance(about.get("data"), str):
        raise InputError(f"{where} lacks versions or data; {parts.REMEDY}")
    files = tuple(part["file"] for part in about["parts"])
    for name in SavedTensors(path, files).specs:
        if name.startswith("rank/"):
            rank = _OF_RANK.fullmatch(name)
            if not rank or int(rank[1]) >= about["ranks"]:
                raise InputError(f"{path} has {name!r} of {about['ranks']} ranks; {parts.REMEDY}")
    return SavedState(
        path=path,
        step=about["step"],
        ranks=about["ranks"],
        zero_stage=about["zero_stage"],
        data_hash=about["data"],
        config=Config.from_object(about.get("config"), f"{where}: config"),
        versions={name: str(version) for name, version in others.items()},
        files=files,
    )


def check_fits(saved: SavedState, module: nn.Module) -> None:
    """Raise InputError unless the checkpoint holds just the parameters and buffers of `module`."""
    specs = SavedTensors(saved.path, saved.files).specs
    there = {
        name.removeprefix("model/"): spec.shape
        for name, spec in specs.items()
        if name.startswith("model/")
    }
    wanted = {name: tuple(value.shape) for name, value in named_state(module)}
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise InputError(
                f"{saved.path} does not fit the model: {name} is {_shape(there, name)} there and "
                f"{_shape(wanted, name)} here; it belongs to another run or version"
            )
        known = {key: specs.get(f"adamw/{name}/{key}") for key in ("step", *zero_fragments.MOMENTS)}
        shapes = {key: spec.shape for key, spec in known.items() if spec}
        if shapes and shapes != {"step": (), **dict.fromkeys(zero_fragments.MOMENTS, wanted[name])}:
            raise InputError(
                f"{saved.path}: what AdamW knows of {name} is not whole; {parts.REMEDY}"
            )


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "missing"


@torch.no_grad()
def load_state(
    engine: DeepSpeedEngine, saved: SavedState | None, *, host: HostGroup, seed: int
) -> None:
    """Fill a fresh engine. All ranks call it.

    saved: on the first rank a checkpoint that fits; it alone reads the files. With as many ranks as
    wrote it, each gets its random generators back, so every later bit is that of an unbroken run;
    else they are seeded by (seed, step, rank).
    """
    file = None
    if saved is not None:
        file = SavedTensors(saved.path, saved.files)
        about = file.specs, saved.step, saved.ranks
    specs, step, ranks = host.from_first(about if file else None)

    def read(name: str) -> Tensor:
        if file:
            tensor = file.get(name).to(engine.device)
        else:
            tensor = torch.empty(specs[name].shape, dtype=specs[name].dtype, device=engine.device)
        if world_size() > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    parameters = dict(engine.module.named_parameters())
    for name, value in named_state(engine.module):
        if name not in parameters:
            value.copy_(read(f"model/{name}"))
            continue
        zero_fragments.set_value(engine, parameters[name], read(f"model/{name}"))
        if f"adamw/{name}/step" in specs:
            moments = {key: read(f"adamw/{name}/{key}") for key in zero_fragments.MOMENTS}
            zero_fragments.set_moments(
                engine, parameters[name], moments, read(f"adamw/{name}/step")
            )
    own: dict[str, Tensor] = {}
    if ranks == world_size():
        for name in sorted(specs):
            if name.startswith("rank/"):
                _, rank, generator = name.split("/", 2)
                state = read(name).cpu()
                if int(rank) == dist.get_rank():
                    own[generator] = state
    _restore_generators(engine.device, own, seed=seed, step=step)


def named_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, each once."""
    kept = module.state_dict().keys()
    return [
        *module.named_parameters(),
        *((name, value) for name, value in module.named_buffers() if name in kept),
    ]


def _own_pieces(engine: DeepSpeedEngine) -> dict[str, Piece]:
    """What this rank writes: its slices of what ZeRO divides, its share of what every rank has, and
    its random generators. Buffers are written as the first rank has them."""
    rank, stage = dist.get_rank(), engine.zero_optimization_stage()
    own: dict[str, Tensor] = {
        f"rank/{rank:05d}/{name}": value for name, value in _generators(engine.device).items()
    }
    of_all: dict[str, Tensor] = {}
    slices: dict[str, Piece] = {}
    parameters = dict(engine.module.named_parameters())
    for name, value in named_state(engine.module):
        if name not in parameters:
            if rank == 0:
                own[f"model/{name}"] = value
            continue
        parameter = parameters[name]
        held = {f"model/{name}": (zero_fragments.own_value(engine, parameter), stage == 3)}
        count = zero_fragments.optimizer_step(engine, parameter)
        if count is not None:
            if rank == 0:
                own[f"adamw/{name}/step"] = count
            for key in zero_fragments.MOMENTS:
                moment = zero_fragments.own_moment(engine, parameter, key)
                held[f"adamw/{name}/{key}"] = moment, stage > 0
        for full_name, ((start, values), divided) in held.items():
            if divided:
                slices[full_name] = _slice(values, start, zero_fragments.full_shape(parameter))
            else:
                of_all[full_name] = values
    own |= {name: of_all[name] for name in _share(of_all, rank)}
    return {name: Piece(values=value, shape=tuple(value.shape)) for name, value in own.items()} | {
        name: piece for name, piece in slices.items() if len(piece.values.reshape(-1))
    }


def _slice(values: Tensor, start: int, shape: tuple[int, ...]) -> Piece:
    whole = len(values) == torch.Size(shape).numel()
    return Piece(values=values.reshape(shape) if whole else values, start=start, shape=shape)


def _share(of_all: Mapping[str, Tensor], rank: int) -> list[str]:
    """Which of the tensors that every rank has this one writes: all write about as many bytes."""
    bytes_of_rank = [0] * world_size()
    share = []
    for name, value in sorted(of_all.items(), key=lambda item: (-item[1].nbytes, item[0])):
        writer = min(range(len(bytes_of_rank)), key=bytes_of_rank.__getitem__)
        bytes_of_rank[writer] += value.nbytes
        if writer == rank:
            share.append(name)
    return share


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"rng_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def seed_generators(*, seed: int, step: int) -> None:
    """Random generators of this rank from `step` on: every rank draws its own dropout."""
    words = np.random.SeedSequence([_RNG_STREAM, seed, step, dist.get_rank()]).generate_state(
        1, np.uint64
    )
    torch.manual_seed(int(words[0]))


def _restore_generators(
    device: torch.device, own: dict[str, Tensor], *, seed: int, step: int
) -> None:
    """own: this rank's, by the names of `_generators`; none of another number of ranks."""
    if own.keys() != _generators(device).keys():
        seed_generators(seed=seed, step=step)
        return
    torch.set_rng_state(own["rng_cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(own["rng_cuda"], device)
