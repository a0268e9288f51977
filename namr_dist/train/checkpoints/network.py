"""The trained network as one safetensors file that carries its configuration and its own SHA-256
(verified_file.py)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from namr_dist import __version__
from namr_dist.config import Config
from namr_dist.data.remote.address import without_credentials
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.json_file import json_object
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.run.folder import CONFIG
from namr_dist.structure.centres import Centres
from namr_dist.train.checkpoints.verified_file import read_tensors, write_tensors

_FORMAT = "namr-network/1"
CENTRES = "centres.centres_MD"
"""Name of the cluster centres in the network's state dict."""


def save_network(
    path: Path, state: dict[str, torch.Tensor], config: Config, *, trained: dict[str, Any]
) -> None:
    """Write the network's state dict as a verified file, atomically. `trained` says how it came to
    be: steps, ranks, machine."""
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "trained": json.dumps(trained),
        "config": without_credentials(config).to_json(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, state, metadata)


def load_network(
    path: Path, config: Config, *, device: torch.device
) -> tuple[EmbeddingNetwork, dict[str, Any]]:
    """The network of a checkpoint, in eval mode and fp32, and how it was trained.

    Raises InputError if the file is missing, damaged or does not fit.
    """
    if not path.is_file():
        raise InputError(
            f"{path} is missing: the run has not finished; run the training's command with --resume"
        )
    try:
        state, metadata = read_tensors(path)
    except (DamagedFileError, OSError) as error:
        raise InputError(
            f"{path} is damaged ({error}); copy it again, or run the training's command with --resume, "
            "which makes it again from the newest checkpoint"
        ) from None
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"{path} has format {metadata.get('format')!r}, expected {_FORMAT!r}; it was not written "
            "by this version of namr train"
        )
    try:
        network = network_for(state, config, device=device)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit the run's {CONFIG} ({str(error).splitlines()[-1].strip()}); "
            "it belongs to another run"
        ) from None
    return network, json_object(
        metadata.get("trained", "null"), f"{path}: trained", "copy it again or train again"
    )


def initial_network(
    config: Config,
    *,
    device: torch.device,
    pretrained: bool,
    bf16: bool = False,
    pieces: int = 1,
    centres: int = 0,
) -> EmbeddingNetwork:
    """The network as training starts it; not `pretrained`, only its shape, to be filled from a
    checkpoint. centres: how many cluster centres it has."""
    torch.manual_seed(config.train.seed)
    model = (
        config.model
        if pretrained
        else dataclasses.replace(config.model, pretrained=False, weights=None)
    )
    network = EmbeddingNetwork(
        model,
        image_size=config.data.image_size,
        bf16=bf16,
        pieces=pieces,
        centres=Centres(
            centres=centres,
            width=model.width,
            nearest=config.structure.nearest,
            unit=config.distance == "cosine",
        )
        if centres
        else None,
    )
    return network.to(device)


def network_for(
    state: dict[str, torch.Tensor], config: Config, *, device: torch.device
) -> EmbeddingNetwork:
    """The network whose state dict this is, in eval mode and fp32. Raises RuntimeError, as
    `load_state_dict`, where it does not fit the configuration."""
    centres = len(state[CENTRES]) if CENTRES in state else 0
    network = initial_network(config, device=device, pretrained=False, centres=centres).eval()
    network.load_state_dict(state)
    return network
