"""Embeddings in a file, by its ending: what `namr embed` writes, and an index may be built from.

    .safetensors   z, s and, of a shard set, labels and roles; names and the model in its metadata
    .parquet       a row for each picture: id, label, z, s; the model in its metadata
    .npy           z alone; names and the model in FILE.npy.json

Shapes: N pictures, D width of z, S of s.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from namr_dist import verified_json
from namr_dist.atomic import check_target, write_atomic
from namr_dist.errors import DamagedFileError, InputError
from namr_dist.gallery.embedder import Embedder
from namr_dist.gallery.embedding import Embeddings
from namr_dist.gallery.items import Items, Source
from namr_dist.gallery.pictures import Collection
from namr_dist.json_file import parse_json
from namr_dist.train.checkpoints.verified_file import read_tensors, write_tensors

ENDINGS = (".safetensors", ".parquet", ".npy")
_MOST_METADATA = 90_000_000
"""Characters; readers refuse a header of 100 MB."""
_AGAIN = "write it again with `namr embed`"


def check_file(path: Path) -> None:
    """Raise InputError if no file of embeddings can be written at `path`."""
    check_target("--out", path)
    if path.suffix not in ENDINGS:
        raise InputError(f"--out {path} ends with none of {', '.join(ENDINGS)}; give one of these")


def write(path: Path, made: Embeddings, collection: Collection, model: Embedder) -> None:
    """Embeddings of a collection, by the file's ending; each file is whole or not there. Raises
    InputError for names that the file cannot hold."""
    items = collection.items.at(made.kept_N)
    about = {"run": model.name, "model_digest": model.digest}
    if path.suffix == ".safetensors":
        tensors = {"z": torch.from_numpy(made.z_ND), "s": torch.from_numpy(made.s_NS)}
        for name, values_N in (("labels", collection.class_N), ("roles", collection.role_N)):
            if values_N is not None:
                tensors[name] = torch.from_numpy(values_N[made.kept_N])
        metadata = {"names": json.dumps(items.ids), "classes": json.dumps(items.labels), **about}
        if (size := sum(map(len, metadata.values()))) > _MOST_METADATA:
            raise InputError(
                f"--out {path} would have {size / 1e6:.0f} MB of names, more than readers of safetensors take; "
                "give a file that ends with .parquet: nothing is embedded again"
            )
        write_tensors(path, tensors, metadata)
    elif path.suffix == ".parquet":
        write_atomic(path, _parquet(made, items, about))
    else:
        buffer = io.BytesIO()
        np.save(buffer, made.z_ND, allow_pickle=False)
        write_atomic(path, buffer.getvalue())
        told = {**about, "names": items.ids, "labels": items.labels}
        write_atomic(path.with_name(f"{path.name}.json"), verified_json.dumps(told))


def _parquet(made: Embeddings, items: Items, about: dict[str, str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    def rows(values_NV: np.ndarray) -> Any:
        flat = pyarrow.array(np.ascontiguousarray(values_NV).reshape(-1), pyarrow.float32())
        return pyarrow.FixedSizeListArray.from_arrays(flat, values_NV.shape[1])

    table = pyarrow.table(
        {
            "id": pyarrow.array(items.ids, pyarrow.string()),
            "label": pyarrow.array(items.labels, pyarrow.string()),
            "z": rows(made.z_ND),
            "s": rows(made.s_NS),
        }
    ).replace_schema_metadata(about)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def read(path: Path, model: Embedder) -> tuple[Embeddings, Items]:
    """What `write` wrote with the same model, into .safetensors or .parquet.

    Raises InputError, naming the file, for another model's embeddings, and for a file that is
    missing, damaged or something else.
    """
    if path.suffix == ".safetensors":
        z_ND, s_NS, ids, labels, digest = _read_tensors(path)
    elif path.suffix == ".parquet":
        z_ND, s_NS, ids, labels, digest = _read_parquet(path)
    else:
        raise InputError(f"{path} is not .safetensors or .parquet, which have z and s; {_AGAIN}")
    if digest != model.digest:
        raise InputError(
            f"{path} was embedded by another model ({digest[:12]}…) than {model.place} "
            f"({model.digest[:12]}…); {_AGAIN}"
        )
    widths = (model.width, model.structure_width)
    if z_ND.shape[1:] + s_NS.shape[1:] != widths:
        raise InputError(f"{path} has z and s of shapes {z_ND.shape} and {s_NS.shape}; {_AGAIN}")
    if not len(z_ND) == len(s_NS) == len(ids) == len(labels):
        raise InputError(f"{path} has not one name for each embedding; {_AGAIN}")
    items = Items(
        ids=tuple(map(str, ids)),
        labels=tuple(None if label is None else str(label) for label in labels),
        source_N=np.zeros(len(ids), dtype=np.int64),
        sources=(Source(kind="vectors", place=str(path.absolute())),),
    )
    items.check_ids()
    made = Embeddings(z_ND=z_ND, s_NS=s_NS, kept_N=np.arange(len(ids), dtype=np.int64))
    return made, items


def _read_tensors(path: Path) -> tuple[Any, Any, list[Any], list[Any], str]:
    try:
        tensors, metadata = read_tensors(path)
        z_ND, s_NS = (tensors[name].numpy() for name in ("z", "s"))
    except (DamagedFileError, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read as embeddings ({error}); {_AGAIN}") from None
    names = parse_json(metadata.get("names", "null"), f"{path}: names", _AGAIN)
    labels = parse_json(metadata.get("classes", "null"), f"{path}: classes", _AGAIN)
    if not isinstance(names, list) or not isinstance(labels, list):
        raise InputError(f"{path} has no names of its pictures; {_AGAIN}")
    return z_ND, s_NS, names, labels, metadata.get("model_digest", "")


def _read_parquet(path: Path) -> tuple[Any, Any, list[Any], list[Any], str]:
    import pyarrow
    import pyarrow.parquet

    def matrix(column: Any) -> np.ndarray:
        array = column.combine_chunks()
        return np.asarray(array.flatten()).reshape(len(array), -1).astype(np.float32)

    try:
        table = pyarrow.parquet.read_table(path)
        told = table.schema.metadata or {}
        return (
            matrix(table["z"]),
            matrix(table["s"]),
            table["id"].to_pylist(),
            table["label"].to_pylist(),
            told.get(b"model_digest", b"").decode(errors="replace"),
        )
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read as embeddings ({error}); {_AGAIN}") from None
