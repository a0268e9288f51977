"""The network of any checkpoint of a run: the trained one, or that of a training state, whatever
number of ranks and ZeRO stage wrote it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from namr_dist.config import Config
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.run.folder import CONFIG, RunFolder
from namr_dist.text import printable, say
from namr_dist.train.checkpoints.network import CENTRES, initial_network, load_network
from namr_dist.train.checkpoints.parts import SavedTensors
from namr_dist.train.checkpoints.state import SavedState, named_state, open_state

FINAL = "final"
_STEP = re.compile(r"(?:step-)?([0-9]{1,15})")
_NETWORK = "model/network."
"""What its tensors' names begin with in a training state, where the losses have their own."""
_GO_ON = "run the training's command with --resume"


def network_at(
    run: Path, config: Config, checkpoint: str | None, *, device: torch.device
) -> tuple[EmbeddingNetwork, dict[str, Any]]:
    """The network of one of a run's checkpoints, in eval mode and fp32, and how it was trained.

    checkpoint: "final", or the step of a training state ("step-100", "step-00000100" or "100").
    None: the final one; of a run that has not finished, the newest step that is whole, after a line
    on stderr that says so.

    Of the record, every checkpoint has "checkpoint" ("final" or "step-100"), "steps" (done),
    "ranks" and "zero_stage"; the final one has all that training wrote with it, a training state
    "images_and_order" (as resume.hash_images makes it) and "packages" (name → version). A training
    state's cluster centres are those fitted last before it; `network.centres.fitted` is false if
    none were.
    Every byte is verified. Raises InputError if the run has no such checkpoint, naming those it
    has, or if it is damaged or does not fit.
    """
    folder = RunFolder(run)
    step = None if checkpoint in (None, FINAL) else _step(folder, str(checkpoint))
    if checkpoint == FINAL and not folder.final.exists():
        raise InputError(
            f"{folder.final} is missing: the run has not finished; {_GO_ON}, or choose another "
            f"checkpoint: {_listed(folder)}"
        )
    if step is None and folder.final.exists():
        network, trained = load_network(folder.final, config, device=device)
        return network, {**trained, "checkpoint": FINAL}
    saved = _newest(folder) if step is None else _opened(folder.checkpoint(step), step)
    return _network_of(saved, config, device), {
        "checkpoint": f"step-{saved.step}",
        "steps": saved.step,
        "ranks": saved.ranks,
        "zero_stage": saved.zero_stage,
        "images_and_order": saved.data_hash,
        "packages": saved.versions,
    }


def _step(run: RunFolder, name: str) -> int:
    """The step that a checkpoint's name says, of one that is there."""
    stated = _STEP.fullmatch(name)
    step = int(stated[1]) if stated else None
    if step is None or step not in dict(run.checkpoints()):
        raise InputError(
            f"{run.path} has no checkpoint {printable(name)}; choose one of those it has: {_listed(run)}"
        )
    return step


def _listed(run: RunFolder) -> str:
    steps = [f"step-{step}" for step, _ in run.checkpoints()]
    return ", ".join([*steps, *([FINAL] if run.final.exists() else [])]) or "none"


def _newest(run: RunFolder) -> SavedState:
    """The newest training state that is whole, of a run that has not finished."""
    damaged = []
    for step, path in reversed(run.checkpoints()):
        try:
            saved = _opened(path, step)
        except InputError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            say(f"WARNING: {line}", file=sys.stderr)
        say(
            f"WARNING: {run.path} has not finished: its checkpoint step-{step} is taken",
            file=sys.stderr,
        )
        return saved
    if damaged:
        raise InputError("; ".join(damaged))
    raise InputError(f"{run.path} has not finished, and has no checkpoint yet; {_GO_ON}")


def _opened(path: Path, step: int) -> SavedState:
    try:
        saved = open_state(path)
    except DamagedFileError as error:
        raise InputError(
            f"{path} is damaged ({error}); copy it again, or choose another checkpoint"
        ) from None
    if saved.step != step:
        raise InputError(f"{path} holds step {saved.step}; give it that step's name, or remove it")
    return saved


@torch.no_grad()
def _network_of(saved: SavedState, config: Config, device: torch.device) -> EmbeddingNetwork:
    tensors = SavedTensors(saved.path, saved.files)
    there = {
        name.removeprefix(_NETWORK): spec.shape
        for name, spec in tensors.specs.items()
        if name.startswith(_NETWORK)
    }
    centres = there.get(CENTRES, (0,))[0]
    network = initial_network(config, device=device, pretrained=False, centres=centres).eval()
    wanted = named_state(network)
    shapes = {name: tuple(value.shape) for name, value in wanted}
    for name in sorted(there.keys() | shapes.keys()):
        if there.get(name) != shapes.get(name):
            raise InputError(
                f"{saved.path} does not fit the run's {CONFIG}: {name} is "
                f"{there.get(name, 'missing')} there and {shapes.get(name, 'missing')} by the settings; it "
                "belongs to another run"
            )
    for name, value in wanted:
        value.copy_(tensors.get(_NETWORK + name))
    return network
