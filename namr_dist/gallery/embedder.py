"""A trained network, ready to embed pictures: of a run, one of its checkpoints, or an export."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch

from namr_dist.config import Config
from namr_dist.data.picture import Picture
from namr_dist.data.read.augment import TestTransform
from namr_dist.errors import InputError
from namr_dist.gallery.embedding import DEFAULT_BATCH, embed_all
from namr_dist.gallery.geometry import Geometry
from namr_dist.gallery.pictures import PictureList
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.results.export import is_export
from namr_dist.results.export import read as read_export
from namr_dist.results.record import trained_config
from namr_dist.retrieval.arrays import Float32
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.chosen import network_at
from namr_dist.train.embed import test_transform

if TYPE_CHECKING:
    from typing_extensions import Self


class Embedder:
    """A network in eval mode, with what its pictures are prepared by."""

    def __init__(
        self,
        network: EmbeddingNetwork,
        config: Config,
        *,
        place: Path,
        device: torch.device | str | None = None,
    ) -> None:
        """place: the folder or file that it was loaded from. device: None takes a GPU if torch
        sees one."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.config = config
        self.place = place.absolute()

    @classmethod
    def load(
        cls, where: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> Self:
        """As `namr_dist.load`."""
        network, config, place = network_of(where)
        return cls(network, config, place=place, device=device)

    @property
    def name(self) -> str:
        """Of the run or the export; of an earlier checkpoint, RUN/step-…."""
        if (run := _run_of_checkpoint(self.place)) is not None:
            return f"{run.name}/{self.place.name}"
        return self.place.name

    @property
    def width(self) -> int:
        """D, of the sample embedding."""
        return int(self.config.model.width)

    @property
    def structure_width(self) -> int:
        """S, of the structure embedding: k + 1 for one of centres, else D."""
        centres = self.network.centres
        return self.width if centres is None else centres.nearest + 1

    @property
    def transform(self) -> TestTransform:
        """How a picture is prepared."""
        return test_transform(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        """How its embeddings are compared."""
        centres, settings = self.network.centres, self.config.model
        return Geometry(
            distance=self.config.distance,
            width=self.width,
            delta=settings.delta,
            gamma=None if centres is None else float(centres.gamma),
            rho_max=None if centres is None else float(centres.rho_max),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the parameters and of how pictures are prepared and compared:
        the same for a run and its export."""
        transform = self.transform
        about = [transform.size, transform.crop_share, self.config.distance]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @overload
    def embed(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        normalize: bool = ...,
        structure: Literal[False] = ...,
    ) -> Float32: ...
    @overload
    def embed(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        batch_size: int = ...,
        progress: bool = ...,
        normalize: bool = ...,
        structure: Literal[True],
    ) -> tuple[Float32, Float32]: ...
    def embed(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        batch_size: int = DEFAULT_BATCH,
        progress: bool = False,
        normalize: bool = False,
        structure: bool = False,
    ) -> Float32 | tuple[Float32, Float32]:
        """Sample embeddings z (N, D), float32, in the order of the pictures.

        pictures: paths, bytes of files, PIL images, or uint8 arrays (H, W), (H, W, 3), (H, W, 4);
        or one of these, for N = 1. normalize: rows of z scaled to length 1. structure: return
        (z, s), with the structure embeddings s (N, S) float32 of z as it was before it was scaled.
        The values are those of `namr embed`, to the last bit where the batch size is the same.
        Raises InputError, naming it, for a picture that cannot be read.
        """
        made = embed_all(
            self,
            PictureList(as_list(pictures), self.transform),
            batch_size=batch_size,
            progress=progress,
        )
        z_ND = made.z_ND
        if normalize:
            lengths_N1 = np.linalg.norm(z_ND.astype(np.float64), axis=1, keepdims=True)
            z_ND = (z_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0)).astype(np.float32)
        return (z_ND, made.s_NS) if structure else z_ND

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.name}: {self.config.model.backbone}, {self.width} wide, "
            f"{self.transform.size} px, {self.config.distance}, on {self.device}>"
        )


def network_of(where: str | os.PathLike[str]) -> tuple[EmbeddingNetwork, Config, Path]:
    """Network, configuration, and the place of both: a run, a checkpoint, an export.

    `namr_dist.load` says what `where` may be, and what is raised.
    """
    place = Path(where)
    if is_export(place):
        network, config = read_export(place)
        return network, config, place
    of_checkpoint = _run_of_checkpoint(place.absolute())
    run, checkpoint = (place, None) if of_checkpoint is None else (of_checkpoint, place.stem)
    if not RunFolder(run).config.is_file():
        raise InputError(
            f"{where} is neither a run nor a checkpoint nor an export; give the folder of a run, such as "
            "runs/demo, or one that `namr export` wrote"
        )
    config = trained_config(run)
    # Weights are drawn, then replaced: the caller's generator stays as it is.
    with torch.random.fork_rng(devices=[]):
        network, trained = network_at(run, config, checkpoint, device=torch.device("cpu"))
    # Of a run that goes on, what was loaded is this checkpoint, not whatever is the last one later.
    step = str(trained["checkpoint"]).removeprefix("step-")
    return network, config, RunFolder(run).checkpoint(int(step)) if step.isdecimal() else run


def _run_of_checkpoint(place: Path) -> Path | None:
    """The run that a path's checkpoint is of, by the path alone."""
    if len(place.parts) > 2 and RunFolder(place.parents[1]).checkpoint_folder == place.parent:
        return place.parents[1]
    return None


def as_list(pictures: Picture | Sequence[Picture]) -> Sequence[Picture]:
    """One picture as a list of one."""
    if isinstance(pictures, Sequence) and not isinstance(pictures, (str, bytes, bytearray)):
        return pictures
    return [pictures]
