"""A checkpoint as a folder: a part from each rank, and an index that names them.

    checkpoints/step-00000120/index.json               what it is, and its parts with their hashes
    checkpoints/step-00000120/rank-00000.safetensors   what the first rank wrote
    …

All ranks write at the same time, each its own part. Of a tensor that ranks share, a part has a flat
piece; its metadata `cut` says where that begins and which shape the whole has. The folder is filled
under a temporary name and gets its own once the index is in it, so what is visible is whole. Parts
and index verify themselves (verified_file.py, verified_json.py), and no object is ever unpickled
from them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from namr_dist import verified_json
from namr_dist.atomic import flush, remove_folder, write_atomic
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.json_file import json_object
from namr_dist.train.checkpoints.verified_file import TensorSpec, verify_file, write_tensors

INDEX = "index.json"
REMEDY = "it is not as namr train writes them: remove it, or copy it again"
_MOST = 1 << 53
_PART = re.compile(r"rank-[0-9]{5}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements of a tensor that one rank writes."""

    values: Tensor
    """() … (): the whole tensor, or flat, the elements from `start` on"""
    start: int = 0
    shape: tuple[int, ...]
    """Of the whole tensor."""

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor, in its shape."""
        return tuple(self.values.shape) == self.shape


def write_part(path: Path, rank: int, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Write one rank's part of the checkpoint that is to be `path`; returns its entry in the index.

    pieces: on the CPU. Raises OSError.
    """
    folder = _unfinished(path)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank-{rank:05d}.safetensors"
    cut = {
        name: {"start": piece.start, "shape": piece.shape}
        for name, piece in pieces.items()
        if not piece.whole
    }
    sha256 = write_tensors(
        file, {name: piece.values for name, piece in pieces.items()}, {"cut": json.dumps(cut)}
    )
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256}


def finish(path: Path, about: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> None:
    """Write the index, once all parts are written, and make the checkpoint visible.

    Raises OSError; then call `discard`.
    """
    folder = _unfinished(path)
    for part in parts:
        file = folder / part["file"]
        if not file.is_file() or file.stat().st_size != part["bytes"]:
            raise OSError(
                None,
                f"{part['file']} is not there: the run's folder must be on storage that all nodes "
                "share",
                str(path),
            )
    write_atomic(folder / INDEX, verified_json.dumps({**about, "parts": parts}, indent=1))
    if path.exists():  # it was damaged, and the run went on from one before
        remove_folder(path)
    folder.rename(path)
    flush(path.parent)


def discard(path: Path) -> None:
    """Remove what was written of a checkpoint that is not to be. What cannot be removed goes at the
    next start."""
    # No new name first: a disk that refuses to write refuses that too.
    shutil.rmtree(_unfinished(path), ignore_errors=True)


def open_index(path: Path) -> dict[str, Any]:
    """What the index says, once every byte of it and of its parts has been verified.

    Raises DamagedFileError, or InputError for one that is whole and not as `finish` writes it.
    """
    about = _read_index(path)
    parts = about.get("parts")
    if not isinstance(parts, list) or not parts:
        raise InputError(f"{path / INDEX} names no parts; {REMEDY}")
    for part in parts:
        file = part.get("file") if isinstance(part, dict) else None
        if not isinstance(file, str) or not _PART.fullmatch(file):
            raise InputError(f"{path / INDEX} names a part {file!r}; {REMEDY}")
        try:
            sha256 = verify_file(path / file)
        except OSError as error:
            raise DamagedFileError(f"{file}: {error.strerror}") from None
        except DamagedFileError as error:
            raise DamagedFileError(f"{file}: {error}") from None
        if sha256 != part.get("sha256"):
            raise DamagedFileError(f"{file} is not the part that its index names")
    return about


def _read_index(path: Path) -> dict[str, Any]:
    try:
        data = (path / INDEX).read_bytes()
    except OSError as error:
        raise DamagedFileError(f"{INDEX}: {error.strerror}") from None
    try:
        verified_json.verify(data)
        return json_object(data, INDEX, "copy it again")
    except DamagedFileError as error:
        raise DamagedFileError(f"{INDEX}: {error}") from None
    except InputError as error:
        raise DamagedFileError(str(error)) from None


class SavedTensors:
    """The tensors of a checkpoint by name, in whichever parts they are."""

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        """files: the names of the parts. Raises InputError where pieces do not make whole
        tensors, or a file is no safetensors file."""
        self._pieces: dict[str, list[tuple[int, int, safetensors.safe_open]]] = {}
        self.specs: dict[str, TensorSpec] = {}
        for file in files:
            self._add(path / file)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            starts = [start for start, _, _ in pieces]
            ends = itertools.accumulate(count for _, count, _ in pieces)
            # Not torch's product, which may overflow.
            if [*starts, math.prod(self.specs[name].shape)] != [0, *ends]:
                raise InputError(f"{path}: the pieces of {name} do not make it up; {REMEDY}")

    def get(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        pieces, spec = self._pieces[name], self.specs[name]
        if len(pieces) == 1:
            only: Tensor = pieces[0][2].get_tensor(name)
            return only.reshape(spec.shape)
        flat = [file.get_tensor(name).reshape(-1) for _, _, file in pieces]
        return torch.cat(flat).reshape(spec.shape)

    def _add(self, file: Path) -> None:
        try:
            opened = safetensors.safe_open(file, "pt")
            specs = TensorSpec.all_in(opened)
            metadata = opened.metadata() or {}
        except (safetensors.SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{file} is no part of a checkpoint ({error}); {REMEDY}") from None
        cut = json_object(metadata.get("cut", "{}"), f"{file}: cut", REMEDY)
        for name, spec in specs.items():
            where = cut.get(name, {"start": 0, "shape": list(spec.shape)})
            start, shape = _numbers(where) or (None, ())
            if start is None:
                raise InputError(f"{file}: cut says {where!r} of {name}; {REMEDY}")
            whole = TensorSpec(dtype=spec.dtype, shape=shape)
            if self.specs.setdefault(name, whole) != whole:
                raise InputError(f"{file} has {name} as {whole}, another part otherwise; {REMEDY}")
            count = torch.Size(spec.shape).numel()
            self._pieces.setdefault(name, []).append((start, count, opened))


def _numbers(cut: Any) -> tuple[int, tuple[int, ...]] | None:
    """(start, shape) of what a part's metadata say of a piece; None for what is none."""
    if not isinstance(cut, dict) or not isinstance(cut.get("shape"), list):
        return None
    numbers = [cut.get("start"), *cut["shape"]]
    if not all(type(number) is int and 0 <= number < _MOST for number in numbers):
        return None
    return numbers[0], tuple(numbers[1:])


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
