"""An index's folder: `index.json` names the other files and has their hashes.

    index.json          what the index is of (Header), verified_json.py
    index.faiss         vectors of the mode, as plain faiss reads them
    items.parquet       id, label and source of each item
    embeddings.npy      float32 (N, D + E [+ 1]): z, what is kept of s, density if calibrated

A change writes files of new names next to the old ones and replaces index.json last: at any time
the folder holds one whole index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from errno import EACCES, EAGAIN
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from namr_dist import __version__, verified_json
from namr_dist.atomic import flush, new_folder, write_atomic
from namr_dist.config_json import from_object
from namr_dist.data.shardset.shards import sha256_of
from namr_dist.errors import InputError
from namr_dist.gallery.engine import Engine, SearchSettings, Shape
from namr_dist.gallery.geometry import Geometry
from namr_dist.gallery.items import Items, Source
from namr_dist.json_file import an_object
from namr_dist.retrieval.arrays import Float32

HEADER = "index.json"
_FORMAT = "namr-index/1"
_FAISS, _ITEMS, _EMBEDDINGS = "index.faiss", "items.parquet", "embeddings.npy"
_OURS = re.compile(
    r"(?:index-\d+\.faiss|items-\d+\.parquet|embeddings-\d+\.npy)|index\.faiss|items\.parquet|embeddings\.npy"
)
_LOCK = ".index.lock"
_AGAIN = "copy the index again, or build it again"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What an index is of, and how it is searched."""

    model: str
    """name of the run or export that embedded the items"""
    model_digest: str
    """gallery.embedder.Embedder.digest"""
    model_place: str
    """where that was"""
    mode: str
    geometry: Geometry
    shape: Shape
    limit: float
    """retrieval.forms.Form.limit"""
    centre: tuple[float, ...]
    """retrieval.forms.Form.centre_D"""
    settings: SearchSettings = field(default_factory=SearchSettings)

    def check_model(self, digest: str, place: str, index: str) -> None:
        """Raise InputError unless a model of this digest embedded the items. place, index: what
        they are called."""
        if digest != self.model_digest:
            raise InputError(
                f"{index} was built with model {self.model} ({self.model_digest[:12]}…), {place} is "
                f"another ({digest[:12]}…); give the one it was built with, or build it again"
            )


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Of the folder, all."""

    header: Header
    engine: Engine
    items: Items
    embeddings: Float32
    """(N, D + E [+ 1]); a memory map where it was read"""
    read_from: tuple[Path, str] | None = None
    """folder that this was read from, and the SHA-256 of its index.json then"""


def is_index(path: Path) -> bool:
    """Whether an index is there."""
    return path.joinpath(HEADER).is_file()


def write(path: Path, contents: Contents) -> None:
    """Into a new folder, or in place of the index in it, which the caller has locked. Raises
    InputError if something else is there, or the folder above is not."""
    if not path.absolute().parent.is_dir():
        raise InputError(
            f"{path} lies in a folder that does not exist; make {path.absolute().parent} first"
        )
    if not path.exists():
        with new_folder(path) as folder:
            _write_files(folder, contents, "")
        return
    if not is_index(path):
        raise InputError(f"{path} exists and is no index; give a folder that does not exist")
    was, now = contents.read_from, origin(path)
    if was is not None and was != now and was[0] == now[0]:
        raise InputError(
            f"{path} has been changed since it was opened; open it again and repeat the change"
        )
    generation = 1 + max(
        (int(number) for name in os.listdir(path) for number in re.findall(r"-(\d+)\.", name)),
        default=1,
    )
    try:
        _write_files(path, contents, f"-{generation}")
    finally:  # of a disk that is full too, what was begun is to go
        _remove_others(path)


def origin(path: Path) -> tuple[Path, str]:
    """Of an index as it is now: `Contents.read_from`."""
    return path.resolve(), _digest(path)


def _digest(path: Path) -> str:
    return hashlib.sha256((path / HEADER).read_bytes()).hexdigest()


class _Writes:
    """A file that can only be written to: NumPy hands others to the C library, and what goes wrong
    there has no error number."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def _write_files(folder: Path, contents: Contents, suffix: str) -> None:
    import pyarrow.parquet

    names = [_named(name, suffix) for name in (_FAISS, _ITEMS, _EMBEDDINGS)]
    faiss_file, items_file, embeddings_file = (folder / name for name in names)
    contents.engine.write(faiss_file)
    with open(items_file, "wb") as file:
        pyarrow.parquet.write_table(contents.items.table(), file)
    with open(embeddings_file, "wb") as file:
        np.save(_Writes(file), contents.embeddings, allow_pickle=False)
    files = {}
    for name in names:
        flush(folder / name)
        with open(folder / name, "rb") as file:
            files[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256_of(file)}
    write_atomic(folder / HEADER, verified_json.dumps(_as_json(contents, files), indent=2))


def _named(name: str, suffix: str) -> str:
    stem, ending = name.rsplit(".", 1)
    return f"{stem}{suffix}.{ending}"


def _as_json(contents: Contents, files: Mapping[str, Any]) -> dict[str, Any]:
    import faiss

    return {
        "format": _FORMAT,
        "items": len(contents.items),
        **dataclasses.asdict(contents.header),
        "sources": [dataclasses.asdict(source) for source in contents.items.sources],
        "versions": {"namr-dist": __version__, "faiss": faiss.__version__, "numpy": np.__version__},
        "files": files,
    }


def read(path: Path) -> Contents:
    """All of an index, every byte compared with its hash. Raises InputError, naming the file, for
    one that is missing, damaged or not what index.json says."""
    before = None
    while True:
        about = read_about(path)
        now = origin(path)
        try:
            return dataclasses.replace(_read(path, about), read_from=now)
        except InputError:
            # Another process may just have put a new generation of files in place.
            if now in (before, origin(path)):
                raise
            before = now


def _read(path: Path, about: Mapping[str, Any]) -> Contents:
    header, files = _header(about, path / HEADER), about.get("files")
    where = {ending: _checked(path, files, ending) for ending in ("faiss", "parquet", "npy")}
    engine = Engine.read(where["faiss"], header.shape)
    items = Items.of_table(_table(where["parquet"]), _sources(about, path), str(where["parquet"]))
    embeddings = _embeddings(where["npy"])
    if not len(engine) == len(items) == len(embeddings):
        raise InputError(
            f"{path} has {len(engine):,} vectors, {len(items):,} items and {len(embeddings):,} "
            f"embeddings; {_AGAIN}"
        )
    if embeddings.shape[1] - header.geometry.width - header.geometry.kept_width not in (0, 1):
        raise InputError(
            f"{where['npy']} is {embeddings.shape[1]} wide, which does not fit; {_AGAIN}"
        )
    return Contents(header=header, engine=engine, items=items, embeddings=embeddings)


def read_about(path: Path) -> dict[str, Any]:
    """The content of index.json. Raises InputError."""
    where = path / HEADER
    try:
        data = where.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} is no index: {HEADER} cannot be read there ({error.strerror}); give a folder that "
            "`namr index build` wrote"
        ) from None
    about = verified_json.loads_object(data, str(where), _AGAIN)
    if about.get("format") != _FORMAT:
        raise InputError(
            f"{where} has format {about.get('format')!r}, expected {_FORMAT!r}; build it again"
        )
    return about


def read_header(path: Path) -> Header:
    """What an index is of, its other files not looked at. Raises InputError."""
    return _header(read_about(path), path / HEADER)


def _header(about: Mapping[str, Any], where: Path) -> Header:
    fields = {one.name for one in dataclasses.fields(Header)}
    told = {name: value for name, value in about.items() if name in fields}
    header = from_object(Header, told, str(where))
    assert isinstance(header, Header)
    if len(header.centre) != header.geometry.width:
        raise InputError(
            f"{where}: centre has {len(header.centre)} numbers, not {header.geometry.width}; {_AGAIN}"
        )
    return header


def _sources(about: Mapping[str, Any], path: Path) -> tuple[Source, ...]:
    where = f"{path / HEADER}: sources"
    sources: tuple[Source, ...] = from_object(tuple[Source, ...], about.get("sources"), where)
    return sources


def _checked(path: Path, files: Any, ending: str) -> Path:
    """The file of that ending, which is as index.json says."""
    files = an_object(files, f"{path / HEADER}: files", _AGAIN)
    names = [name for name in files if _OURS.fullmatch(name) and name.endswith(f".{ending}")]
    if len(names) != 1:
        raise InputError(f"{path / HEADER} names {len(names)} files .{ending}, not one; {_AGAIN}")
    where, stated = path / names[0], files[names[0]]
    try:
        with open(where, "rb") as file:
            found = {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256_of(file)}
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror}); {_AGAIN}") from None
    if found != stated:
        raise InputError(f"{where} is damaged: its SHA-256 is not the one in {HEADER}; {_AGAIN}")
    return where


def _table(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path, columns=["id", "label", "source"])
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet ({error}); {_AGAIN}") from None


def _embeddings(path: Path) -> Float32:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read by numpy ({error}); {_AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype != np.float32:
        raise InputError(f"{path} holds no float32 matrix; {_AGAIN}")
    return array


def _remove_others(path: Path) -> None:
    """Files of an index that index.json no longer names."""
    named = json.loads((path / HEADER).read_bytes())["files"]
    for name in os.listdir(path):
        if _OURS.fullmatch(name) and name not in named:
            with contextlib.suppress(OSError):
                (path / name).unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it, no other process changes the index. Raises InputError if one does."""
    with open(path / _LOCK, "ab") as file:
        if not lock(file):
            raise InputError(
                f"index {path} is being changed by another process; wait until it has ended"
            )
        yield


def lock(file: BinaryIO) -> bool:
    """Whether the file is this process's from now on, until it is closed; true where the file
    system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (EACCES, EAGAIN)
    return True
