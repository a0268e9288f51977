"""The vectors of an index in Milvus: a server, Zilliz Cloud, or Milvus Lite's file.

Milvus compares by plain l2, so it returns the mode's order: what retrieval/forms.py stores is what
it is given, and what `Gallery.queries` makes is what it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from namr_dist.data.remote.address import is_http, is_url, shown
from namr_dist.errors import InputError, ReportedError, TransientError
from namr_dist.gallery.gallery import Gallery
from namr_dist.progress import counted

TOKEN = "MILVUS_TOKEN"
"""Environment variable with `user:password` or an API key. Never an option: others on the machine
can read command lines."""
FIELDS = ("label", "path", "source")
"""Stored with each `vector`, next to its `id`, the primary key."""
_LONGEST_TEXT = 65_535
"""Bytes that Milvus takes in a field."""
_BATCH_BYTES = 8 * 2**20
"""Of vectors; a message may have 64 MiB."""
_LONGEST_NAME = 200
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONNECT_S = 10.0


def collection_name(index: str) -> str:
    """What an index's collection is called: its name, of letters, digits and `_`."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", index.removesuffix(".index")).strip("_")[:_LONGEST_NAME]
    return name if _NAME.fullmatch(name) else f"index_{name}".rstrip("_")


def push(
    gallery: Gallery,
    uri: str,
    *,
    collection: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> str:
    """Write all items into a collection, and return its name, once Milvus counts as many.

    uri: http:// or https:// of a server, or a file that ends with .db, of Milvus Lite. Items are
    written under another name, which is changed in the end: a collection of this name is whole. One
    that is replaced stands until then and is dropped last; if Milvus refuses the change of names,
    it gets its own back.
    Raises InputError for another uri, an existing collection without `overwrite`, and without
    pymilvus; TransientError where Milvus does not answer or refuses.
    """
    name = collection_name(gallery.name) if collection is None else collection
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise InputError(
            f"--collection {name!r} is no name that Milvus takes; use letters, digits and _, a letter "
            f"first, at most {_LONGEST_NAME}"
        )
    if not len(gallery):
        raise InputError(f"{gallery.name} has no items to push; add some first")
    with _connected(uri) as client:
        there = client.has_collection(name)
        if there and not overwrite:
            raise InputError(
                f"collection {name} exists already in {shown(uri)}; replace it with --overwrite, or give "
                "another name with --collection"
            )
        written = f"{name}_{secrets.token_hex(4)}"
        try:
            _create(client, gallery, written)
            _insert(client, gallery, written, progress=progress)
            if (counted := _count(client, written)) != len(gallery):
                raise TransientError(
                    f"Milvus counts {counted:,} items where {len(gallery):,} were pushed; push again"
                )
        except BaseException:
            with contextlib.suppress(Exception):
                client.drop_collection(written)
            raise
        _name(client, written, name, replaces=there)
    return name


@contextlib.contextmanager
def _connected(uri: str) -> Iterator[Any]:
    is_file = uri.endswith(".db") and not is_url(uri)
    if not is_file and not is_http(uri):
        raise InputError(
            f"{shown(uri)} is no place of Milvus; give http://HOST:19530, https://…, or a file that ends "
            "with .db"
        )
    if is_file and not Path(uri).absolute().parent.is_dir():
        raise InputError(f"{uri} lies in a folder that does not exist; make it first")
    try:
        from pymilvus import MilvusClient, MilvusException

        if is_file:
            import milvus_lite  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed; pip install "
            + ("milvus-lite" if error.name == "milvus_lite" else "'namr-dist[milvus]'")
        ) from None
    try:
        client = MilvusClient(uri=uri, token=os.environ.get(TOKEN, ""), timeout=_CONNECT_S)
        try:
            yield client
        finally:
            client.close()
    except ReportedError:
        raise
    except MilvusException as error:
        raise TransientError(
            f"Milvus at {shown(uri)} does not serve ({_without_secrets(error)}); see that it runs, and that "
            f"{TOKEN} holds what it asks for"
        ) from None


def _create(client: Any, gallery: Gallery, name: str) -> None:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    text = {"datatype": DataType.VARCHAR, "max_length": _LONGEST_TEXT}
    schema.add_field("id", is_primary=True, **text)
    for field in FIELDS:
        schema.add_field(field, nullable=field == "label", **text)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=gallery.form.width)
    index = client.prepare_index_params()
    # Exact where the index is; else what Milvus itself finds best.
    kind = "FLAT" if gallery.type == "flat" else "AUTOINDEX"
    index.add_index("vector", index_type=kind, metric_type="L2")
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")


def _insert(client: Any, gallery: Gallery, name: str, *, progress: bool) -> None:
    items = gallery.items
    sources = [source.text for source in items.sources]
    rows = max(1, _BATCH_BYTES // (4 * gallery.form.width))
    with counted("pushing", len(gallery), "items", shown=progress) as bar:
        for start in range(0, len(gallery), rows):
            positions = np.arange(start, min(start + rows, len(gallery)))
            client.insert(
                name,
                [
                    {
                        "id": items.ids[position],
                        "label": items.labels[position],
                        "path": items.path(position),
                        "source": sources[items.source_N[position]],
                        "vector": vector_V,
                    }
                    for position, vector_V in zip(
                        positions.tolist(), gallery.vectors(positions), strict=True
                    )
                ],
            )
            bar.advance(len(positions))


def _name(client: Any, written: str, name: str, *, replaces: bool) -> None:
    """Name a whole collection; the one that it replaces is dropped once the new one is loaded."""
    aside = f"{written}_old"
    try:
        if replaces:
            client.rename_collection(name, aside)
        client.rename_collection(written, name)
    except BaseException:
        if replaces:
            _restore(client, written, name, aside)
        with contextlib.suppress(Exception):
            client.drop_collection(written)
        raise
    client.load_collection(name)  # Milvus Lite releases what it renames
    if replaces:
        client.drop_collection(aside)


def _restore(client: Any, written: str, name: str, aside: str) -> None:
    try:
        if not client.has_collection(name):
            client.rename_collection(aside, name)
            client.load_collection(name)
    except Exception as error:
        raise TransientError(
            f"Milvus refuses to rename collections ({_without_secrets(error)}); nothing was dropped: the old "
            f"one is {name} or {aside}, the new one {written}; see that Milvus runs, rename the one to keep "
            f"to {name}, and drop the other"
        ) from None


def _count(client: Any, name: str) -> int:
    counted = client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(counted[0]["count(*)"])


def _without_secrets(error: Exception) -> str:
    message = str(getattr(error, "message", error))
    text = shown((message.splitlines() or [type(error).__name__])[0])
    token = os.environ.get(TOKEN)
    return text.replace(token, "…") if token else text
