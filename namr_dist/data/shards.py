"""Shards: written as plain WebDataset tars, checked against their manifest, read by byte range."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import webdataset

from namr_dist.data.manifest import ImageClass, Manifest, Shard
from namr_dist.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image on its way into a shard."""

    key: str
    jpeg: bytes
    label: int


def write_shard(folder: Path, file: str, split: str, samples: Iterable[Sample],
                classes: dict[int, ImageClass]) -> Shard:
    """Write one tar of KEY.jpg, KEY.json pairs and return its entry in the manifest.

    Deterministic: the same samples give the same bytes. Atomic: the tar appears whole or not at all.
    """
    written = list(samples)
    temporary = folder / f".{file}.tmp"
    try:
        with open(temporary, "wb") as stream:
            with webdataset.TarWriter(stream, user="namr", group="namr", mtime=0) as writer:
                for sample in written:
                    entry = classes[sample.label]
                    meta = {"label": sample.label, "name": entry.name, "category": entry.category}
                    writer.write({"__key__": sample.key, "jpg": sample.jpeg,
                                  "json": json.dumps(meta, ensure_ascii=False).encode()})
            stream.flush()
            os.fsync(stream.fileno())
        with tarfile.open(temporary) as tar:
            ranges = {member.name: member.offset_data for member in tar if member.name.endswith(".jpg")}
        digest = _sha256(temporary)
        size = temporary.stat().st_size
        os.replace(temporary, folder / file)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(
        file=file, split=split, bytes=size, sha256=digest,
        keys=tuple(sample.key for sample in written),
        labels=tuple(sample.label for sample in written),
        offsets=tuple(ranges[f"{sample.key}.jpg"] for sample in written),
        lengths=tuple(len(sample.jpeg) for sample in written),
    )


def verify_shards(manifest: Manifest, splits: Iterable[str], *, decode: bool = False) -> int:
    """Check every shard of the named splits against the manifest; return the number of images.

    Each tar must be there, with the stated size and SHA-256, and each JPEG must begin and end as one. With
    `decode`, each is decoded as well. Raises InputError naming the shard (and
    key) at the first difference.
    """
    images = 0
    for shard in manifest.shards_of(*splits):
        path = manifest.path(shard)
        if not path.is_file():
            raise InputError(f"shard {path} is missing; copy it there or rebuild the shard set")
        size = path.stat().st_size
        if size != shard.bytes:
            raise InputError(f"shard {path} has {size} bytes, its manifest says {shard.bytes}; copy it again")
        digest = _sha256(path)
        if digest != shard.sha256:
            raise InputError(
                f"shard {path} has sha256 {digest[:12]}…, its manifest says {shard.sha256[:12]}…; copy it again"
            )
        with open(path, "rb") as stream:
            for key, offset, length in zip(shard.keys, shard.offsets, shard.lengths, strict=True):
                stream.seek(offset)
                check_jpeg(stream.read(length), f"{key}.jpg in {path}", decode=decode)
        images += len(shard.keys)
    return images


def check_jpeg(jpeg: bytes, where: str, *, decode: bool) -> None:
    """Raise InputError, naming `where`, if the bytes are not one whole JPEG."""
    if jpeg[:2] != b"\xff\xd8":
        raise InputError(f"{where} is not a JPEG; rebuild the shard set without it")
    # Writers may pad behind the end-of-image marker, so it is looked for in the last bytes, not as the last two.
    if b"\xff\xd9" not in jpeg[-32:]:
        raise InputError(f"{where} is a truncated JPEG; rebuild the shard set from a whole image")
    if decode:
        decode_rgb(jpeg, where)


def decode_rgb(jpeg: bytes, where: str, *, least_size: int = 0) -> np.ndarray:
    """Decode a JPEG to a uint8 array (H, W, 3).

    With `least_size`, the decoder may shrink by powers of two while both sides stay at least that long, which
    saves most of the work for large originals. Raises InputError, naming `where`, on damaged data.
    """
    try:
        return simplejpeg.decode_jpeg(jpeg, "RGB", min_height=least_size, min_width=least_size)
    except ValueError as error:
        raise InputError(f"{where} cannot be decoded ({error}); rebuild the shard set without it") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
