"""A trained run → a folder of plain files that serve its network without DeepSpeed, each checked
against it.

    config.json        how to prepare an image, what comes out, the run's configuration
    model.safetensors  the network's state, fp32; `load` makes the network of it
    model.pt2          a torch.export program, for PyTorch alone
    model.onnx         the same program for ONNX Runtime
    README.md          a model card, with the metadata that model hubs read
    SHA256SUMS         the hashes of all these, for `sha256sum --check`

config.json and model.safetensors carry their own hashes as well, which `load` verifies.

Shapes: b images, H pixels a side, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from namr_dist import __version__, named_code, verified_json
from namr_dist.atomic import new_folder
from namr_dist.config import Config
from namr_dist.data.location import open_shards
from namr_dist.data.read.stream import ShardImages, stream
from namr_dist.data.shardset.shards import sha256_of
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.results.model_card import check_licence, model_card
from namr_dist.results.programs import (
    Forward,
    check_onnx_packages,
    read_onnx,
    read_torch,
    trace,
    write_onnx,
    write_torch,
)
from namr_dist.results.record import run_config
from namr_dist.results.redact import shareable
from namr_dist.run.folder import RunFolder
from namr_dist.structure.centres import Centres
from namr_dist.train.checkpoints.network import load_network, network_for
from namr_dist.train.checkpoints.verified_file import read_tensors, write_tensors
from namr_dist.train.embed import test_transform

CONFIG = "config.json"
"""Of an exported folder: `describe` makes it. Not the file of that name in a run's folder."""
SUMS = "SHA256SUMS"
FILES = {"safetensors": "model.safetensors", "torch": "model.pt2", "onnx": "model.onnx"}
TOLERANCE = 1e-4
"""Largest relative difference between a written file and the network; other convolutions give about
1e-6."""
_FORMAT = "namr-export/1"
_CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export_run` wrote."""

    folder: Path
    size_bytes: dict[str, int]
    """By file name, of all files."""
    differences: dict[str, float]
    """By file name of the models: the largest relative difference from the network, over images, z
    and s."""
    compared_images: int


def load(folder: str | Path) -> EmbeddingNetwork:
    """The network of an exported folder, as `read` has it."""
    return read(folder)[0]


def is_export(folder: Path) -> bool:
    """Whether `namr export` seems to have written a folder; `read` checks it."""
    return folder.joinpath(CONFIG).is_file() and folder.joinpath(SUMS).is_file()


def read(folder: str | Path) -> tuple[EmbeddingNetwork, Config]:
    """The network of an exported folder, on the CPU, in eval mode and fp32, and the configuration
    that it was trained with: no DeepSpeed, no process group.

    Raises InputError if config.json or model.safetensors is missing, damaged or does not fit the
    other, and if the backbone is code from outside the package that has not been allowed
    (named_code.allow).
    """
    where = Path(folder) / CONFIG
    try:
        text = where.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{where} is missing: {folder} was not written by `namr export`") from None
    about = verified_json.loads(
        text,
        str(where),
        "copy it again or export the run again; if it was changed on purpose, remove its field sha256",
    )
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        told = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise InputError(f"{where} has format {told!r}, expected {_FORMAT!r}; export the run again")
    config = Config.from_object(about.get("config"), f"{where}: config")
    # A loss is no part of the network: its code is not imported, and need not be there.
    of_network = {
        use: name for use, name in config.code_names().items() if use.startswith("model.")
    }
    named_code.check_allowed(of_network, str(where))
    path = Path(folder) / FILES["safetensors"]
    try:
        state, _ = read_tensors(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; export the run with --formats safetensors") from None
    except DamagedFileError as error:
        raise InputError(f"{path} is damaged ({error}); copy it or export the run again") from None
    # Weights are drawn, then replaced: the caller's generator stays as it is.
    with torch.random.fork_rng(devices=[]):
        try:
            network = network_for(state, config, device=torch.device("cpu"))
        except RuntimeError as error:
            raise InputError(
                f"{path} does not fit {where} ({str(error).splitlines()[-1].strip()}); "
                "export the run again"
            ) from None
    return network, config


def export_run(
    run: Path,
    out: Path,
    formats: Sequence[str] = tuple(FILES),
    *,
    shards: str | None = None,
    licence: str | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write the network of RUN into the new folder `out`: the named formats, config.json and
    README.md and SHA256SUMS.

    Each model is read back and compared with the network on four images of the test split, in
    batches of 1 and 3, on the CPU. The folder appears whole or not at all. Raises InputError if
    `out` exists, `licence` is no identifier of one, packages are missing, the run or its test split
    cannot be read, a model cannot be traced, or differs by more than `tolerance`.
    """
    _check_folder(out)
    if licence is not None:
        check_licence(licence)
    if "onnx" in formats:
        check_onnx_packages()
    config = run_config(run, shards)
    cpu = torch.device("cpu")
    network, trained = load_network(RunFolder(run).final, config, device=cpu)
    metrics = _read_metrics(RunFolder(run).metrics)
    batches = _test_images(config)
    with torch.no_grad():
        expected = [network(images_bHH3) for images_bHH3 in batches]
    if not all(value.isfinite().all() for pair in expected for value in pair):
        raise InputError(
            f"the network of {run} does not give finite values for images of its test split; "
            "train it again"
        )
    about = describe(network.centres, config, trained)
    differences: dict[str, float] = {}
    with new_folder(out) as folder:
        (folder / CONFIG).write_text(verified_json.dumps(about, indent=2), encoding="utf-8")
        readers = _write_models(network, config, formats, folder)
        for file, read in readers.items():
            differences[file] = difference(read(), batches, expected)
            if not differences[file] <= tolerance:
                raise InputError(
                    f"{file} differs from the network by {differences[file]:.1e} of its values, more "
                    f"than {tolerance:g}, so nothing was written; leave this format out of --formats"
                )
        sizes = {file: (folder / file).stat().st_size for file in readers}
        card = model_card(
            name=run.resolve().name,
            about=about,
            sizes=sizes,
            differences=differences,
            tolerance=tolerance,
            metrics=metrics,
            licence=licence,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / SUMS).write_text(_sums(folder), encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(
        folder=out, size_bytes=sizes, differences=differences, compared_images=sum(_CHECKED_BATCHES)
    )


def describe(centres: Centres | None, config: Config, trained: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json. Of paths and URLs only the last part stays, without credentials:
    the rest is the training machine's."""
    return {
        "format": _FORMAT,
        "version": __version__,
        "input": {
            "name": "images",
            "dtype": "uint8",
            "size": config.test_size,
            "channels": "RGB",
            "layout": "batch, height, width, channel",
        },
        "preprocessing": {
            "crop": "middle square",
            "crop_share_of_shorter_side": config.data.test_crop,
            "resize_to": config.test_size,
            "interpolation": "bicubic",
            "normalisation": "inside the model",
        },
        "output": {
            "dtype": "float32",
            "width": config.model.width,
            "z": "sample embedding, not normalised",
            **_structure_output(centres, config),
        },
        "distance": config.distance,
        "trained": trained,
        "config": shareable(json.loads(config.to_json())),
    }


def _structure_output(centres: Centres | None, config: Config) -> dict[str, Any]:
    if centres is None:
        return {"s": "structure embedding, within 1 ± delta", "delta": config.model.delta}
    return {
        "s": f"structure embedding: squared distances to the {centres.nearest} nearest of "
        f"{len(centres.centres_MD)} centres, and ρ, their mean",
        "centres": len(centres.centres_MD),
        "nearest": centres.nearest,
        "gamma": float(centres.gamma),
        "rho_max": float(centres.rho_max),
    }


def difference(
    forward: Forward, batches: Sequence[Tensor], expected: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """‖forward − expected‖ / ‖expected‖ of an image's z or s, the largest of all images; NaN counts
    as infinite."""
    largest = 0.0
    with torch.no_grad():
        for images_bHH3, right in zip(batches, expected, strict=True):
            for actual_bD, right_bD in zip(forward(images_bHH3), right, strict=True):
                if actual_bD.shape != right_bD.shape:
                    return float("inf")
                off_b = (actual_bD - right_bD).norm(dim=1) / right_bD.norm(dim=1).clamp_min(1e-12)
                largest = max(largest, float(off_b.nan_to_num(nan=float("inf")).max()))
    return largest


def _sums(folder: Path) -> str:
    """The hash and name of each file there, as sha256sum writes and checks them."""
    lines = []
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            lines.append(f"{sha256_of(file)}  {path.name}\n")
    return "".join(lines)


def _check_folder(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise InputError(f"--out {out} exists already; give a folder that does not")
    if not out.absolute().parent.is_dir():
        raise InputError(
            f"--out {out} lies in a folder that does not exist; make {out.absolute().parent} first"
        )


def _read_metrics(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    metrics = verified_json.loads_object(
        path.read_bytes(), str(path), "evaluate the run again, or remove it"
    )
    if not isinstance(metrics.get("test"), dict):
        raise InputError(f"{path} has no test figures; evaluate the run again, or remove it")
    return metrics


def _test_images(config: Config) -> list[Tensor]:
    """A batch of each checked size, of images spread over the test split."""
    manifest = open_shards(config.data.path, config.data.remote)
    index = manifest.index(config.data.test_split)
    indices = iter(np.linspace(0, len(index) - 1, sum(_CHECKED_BATCHES)).astype(int).tolist())
    chosen = [[(next(indices), 0) for _ in range(size)] for size in _CHECKED_BATCHES]
    images = ShardImages(manifest, index, test_transform(config))
    return [batch.images_bHW3 for batch in stream(images, chosen, workers=0)]


def _write_models(
    network: EmbeddingNetwork, config: Config, formats: Sequence[str], folder: Path
) -> dict[str, Callable[[], Forward]]:
    """Write the models; return, by file name, what reads each back."""
    readers: dict[str, Callable[[], Forward]] = {}
    if "safetensors" in formats:
        write_tensors(folder / FILES["safetensors"], network.state_dict(), {"format": "pt"})
        readers[FILES["safetensors"]] = lambda: load(folder)
    if "torch" in formats or "onnx" in formats:
        program = trace(network, size=config.test_size)
        if "torch" in formats:
            write_torch(program, folder / FILES["torch"])
            readers[FILES["torch"]] = lambda: read_torch(folder / FILES["torch"])
        if "onnx" in formats:
            write_onnx(program, folder / FILES["onnx"])
            readers[FILES["onnx"]] = lambda: read_onnx(folder / FILES["onnx"])
    return readers
