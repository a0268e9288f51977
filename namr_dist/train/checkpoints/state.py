"""A training state as one file that knows nothing of ranks or ZeRO stages.

`checkpoints/step-00000120.safetensors`, format namr-training/1, holds by name: `model/…`, every
parameter and every buffer in full; `adamw/…/exp_avg`, `…/exp_avg_sq` and `…/step`, what AdamW knows
of each parameter; `rank/00000/…`, each rank's random generators. Data position and learning rate
are functions of the step. The file verifies itself (verified_file.py), and no object is ever
unpickled from it.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn

from namr_dist import __version__
from namr_dist.config import Config
from namr_dist.data.remote.address import without_credentials
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.json_file import json_object, parse_json
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.ranks import world_size
from namr_dist.train.checkpoints import zero_fragments
from namr_dist.train.checkpoints.verified_file import (
    DTYPES,
    TensorSpec,
    VerifiedFileWriter,
    verify_file,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_COUNT = re.compile(r"[0-9]{1,15}")
_FORMAT = "namr-training/1"
_DEPENDED_ON = ("deepspeed", "numpy", "simplejpeg")
_RNG_STREAM = 3  # beside the plan's and the augmentation's (data/read/plan.py)


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A checkpoint whose bytes have been verified, and what it says of itself."""

    path: Path
    step: int
    """Steps done."""
    ranks: int
    """World size that wrote it."""
    data_hash: str
    """Of the images that were trained on."""
    config: Config
    versions: dict[str, str]
    """What wrote it, as `versions` gives them; empty in a file of an older version."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One tensor of the file. `fetch` is called by all ranks together; only the first needs the
    result."""

    name: str
    spec: TensorSpec
    fetch: Callable[[], Tensor]


def versions() -> dict[str, str]:
    """Of the packages on which the bits of a step depend: what computes it, and what makes its
    batches."""
    of_others = {name: importlib.metadata.version(name) for name in _DEPENDED_ON}
    return {"namr-dist": __version__, "torch": torch.__version__, **of_others}


def state_bytes(module: nn.Module) -> int:
    """Size of a checkpoint, but for its header and random generators."""
    held = sum(value.numel() * value.element_size() for _, value in _named_state(module))
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


def save_state(
    engine: DeepSpeedEngine,
    path: Path,
    *,
    step: int,
    config: Config,
    data_hash: str,
    host: HostGroup,
) -> str | None:
    """Write the state after `step` steps; None, or why it could not be written. All ranks call it,
    and learn that.

    The file appears whole and verified or not at all. Memory: one whole parameter on the device and
    on the first rank's CPU.
    """
    entries = _entries(engine, host, _generators(engine.device))
    # Buffers may hold what they like, such as the least value so far, which begins as infinity.
    trained = {f"model/{name}" for name, _ in engine.module.named_parameters()}
    writer: VerifiedFileWriter | None = None
    trouble: str | None = None
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "versions": json.dumps(versions()),
        "step": str(step),
        "ranks": str(world_size()),
        "zero_stage": str(engine.zero_optimization_stage()),
        "data": data_hash,
        "config": without_credentials(config).to_json(),
    }
    try:
        if dist.get_rank() == 0:
            try:
                path.parent.mkdir(exist_ok=True)
                writer = VerifiedFileWriter(
                    path, metadata, {entry.name: entry.spec for entry in entries}
                )
            except OSError as error:
                trouble = error.strerror
        for entry in entries:
            value = entry.fetch()
            # A disk that is full must not keep the other ranks waiting: the first goes on and
            # writes nothing.
            if writer and not trouble:
                if entry.name in trained and not value.isfinite().all():
                    trouble = f"{entry.name.removeprefix('model/')} is not finite"
                    continue
                try:
                    writer.add(value)
                except OSError as error:
                    trouble = error.strerror
        if writer and not trouble:
            try:
                writer.commit()
            except OSError as error:
                trouble = error.strerror
    finally:
        if writer:
            writer.discard()
    return host.from_first(f"{trouble}: {path}" if trouble else None)


def open_state(path: Path) -> SavedState:
    """Read and verify every byte of a checkpoint.

    Raises DamagedFileError, or InputError for a file that is whole but of another format.
    """
    try:
        verify_file(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedFileError(str(error)) from None
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"{path} has format {metadata.get('format')!r}, expected {_FORMAT!r}; it was written by "
            f"version {metadata.get('version')} of namr-dist: go on with that one, or start again with "
            "--overwrite"
        )
    remedy = "it is not as namr train writes them: remove it, or copy it again"
    for name in ("step", "ranks", "data", "config"):
        if name not in metadata:
            raise InputError(f"{path} lacks {name} in its metadata; {remedy}")
    for name in ("step", "ranks"):
        if not _COUNT.fullmatch(metadata[name]):
            raise InputError(f"{path}: {name} is {metadata[name]!r}, not a count; {remedy}")
    return SavedState(
        path=path,
        step=int(metadata["step"]),
        ranks=int(metadata["ranks"]),
        data_hash=metadata["data"],
        config=Config.from_object(
            parse_json(metadata["config"], f"{path}: config", remedy), f"{path}: config"
        ),
        versions=json_object(metadata.get("versions", "{}"), f"{path}: versions", remedy),
    )


def check_fits(saved: SavedState, module: nn.Module) -> None:
    """Raise InputError unless the checkpoint holds just the parameters and buffers of `module`."""
    with safetensors.safe_open(saved.path, "pt") as file:
        there = {
            name.removeprefix("model/"): spec.shape
            for name, spec in TensorSpec.all_in(file).items()
            if name.startswith("model/")
        }
    wanted = {name: tuple(value.shape) for name, value in _named_state(module)}
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise InputError(
                f"{saved.path} does not fit the model: {name} is {_shape(there, name)} there and "
                f"{_shape(wanted, name)} here; it belongs to another run or version"
            )


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "missing"


@torch.no_grad()
def load_state(
    engine: DeepSpeedEngine, saved: SavedState | None, *, host: HostGroup, seed: int
) -> None:
    """Fill a fresh engine. All ranks call it.

    saved: on the first rank a checkpoint that fits; it alone reads the file. With as many ranks as
    wrote it, each gets its random generators back, so every later bit is that of an unbroken run;
    else they are seeded anew by (seed, step, rank).
    """
    file = None
    if saved is not None:
        file = safetensors.safe_open(saved.path, "pt")
        about = TensorSpec.all_in(file), saved.step, saved.ranks
    specs, step, ranks = host.from_first(about if file else None)

    def read(name: str) -> Tensor:
        if file:
            tensor = file.get_tensor(name).to(engine.device)
        else:
            tensor = torch.empty(specs[name].shape, dtype=specs[name].dtype, device=engine.device)
        if world_size() > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    parameters = dict(engine.module.named_parameters())
    for name, value in _named_state(engine.module):
        if name not in parameters:
            value.copy_(read(f"model/{name}"))
            continue
        zero_fragments.set_value(engine, parameters[name], read(f"model/{name}"))
        if f"adamw/{name}/step" in specs:
            moments = {key: read(f"adamw/{name}/{key}") for key in zero_fragments.MOMENTS}
            zero_fragments.set_moments(
                engine, parameters[name], moments, read(f"adamw/{name}/step")
            )
    by_rank: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name in sorted(specs):
        if name.startswith("rank/"):
            _, rank, own = name.split("/", 2)
            by_rank[int(rank)][own] = read(name).cpu()
    _restore_generators(engine.device, by_rank, seed=seed, step=step)


def _named_state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, each once."""
    kept = module.state_dict().keys()
    return [
        *module.named_parameters(),
        *((name, value) for name, value in module.named_buffers() if name in kept),
    ]


def _entries(engine: DeepSpeedEngine, host: HostGroup, own: dict[str, Tensor]) -> list[_Entry]:
    """Everything the file will hold, in its order, which is the same on all ranks."""
    entries = []
    parameters = dict(engine.module.named_parameters())
    for name, value in _named_state(engine.module):
        if name not in parameters:
            entries.append(_entry(f"model/{name}", value, value.cpu))
            continue
        parameter = parameters[name]
        spec = TensorSpec(dtype=parameter.dtype, shape=zero_fragments.full_shape(parameter))
        entries.append(
            _Entry(
                name=f"model/{name}",
                spec=spec,
                fetch=_bind(zero_fragments.get_value, engine, parameter),
            )
        )
        count = zero_fragments.optimizer_step(engine, parameter)
        if count is None:
            continue
        entries.append(_entry(f"adamw/{name}/step", count, count.clone))
        for key in zero_fragments.MOMENTS:
            entries.append(
                _Entry(
                    name=f"adamw/{name}/{key}",
                    spec=TensorSpec(dtype=torch.float32, shape=spec.shape),
                    fetch=_bind(zero_fragments.get_moment, engine, parameter, key),
                )
            )
    for rank, specs in enumerate(
        host.of_all({name: TensorSpec.of(value) for name, value in own.items()})
    ):
        for name, spec in specs.items():
            mine = own.get(name) if rank == dist.get_rank() else None
            entries.append(
                _Entry(
                    name=f"rank/{rank:05d}/{name}",
                    spec=spec,
                    fetch=_bind(_from_rank, host, rank, spec, mine),
                )
            )
    return sorted(entries, key=lambda entry: -entry.spec.dtype.itemsize)


def _entry(name: str, value: Tensor, fetch: Callable[[], Tensor]) -> _Entry:
    return _Entry(name=name, spec=TensorSpec.of(value), fetch=fetch)


def _bind(function: Callable[..., Tensor], *arguments: object) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def _from_rank(host: HostGroup, rank: int, spec: TensorSpec, mine: Tensor | None) -> Tensor:
    """A rank's own tensor, on all ranks."""
    value = torch.empty(spec.shape, dtype=spec.dtype) if mine is None else mine.cpu().contiguous()
    host.broadcast(value, source=rank)
    return value


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
    device: torch.device, by_rank: list[dict[str, Tensor]], *, seed: int, step: int
) -> None:
    rank = dist.get_rank()
    same = len(by_rank) == world_size() and ("rng_cuda" in by_rank[rank]) == (device.type == "cuda")
    if not same:
        seed_generators(seed=seed, step=step)
        return
    torch.set_rng_state(by_rank[rank]["rng_cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(by_rank[rank]["rng_cuda"], device)
