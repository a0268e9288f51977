"""Shards: written as plain WebDataset tars, checked against their manifest, read by byte range."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import simplejpeg
import webdataset

from namr_dist.data.shardset.manifest import ImageClass, Manifest, Shard, SplitIndex
from namr_dist.errors import InputError

Result = TypeVar("Result")


END_OF_IMAGE = b"\xff\xd9"
JPEG_TAIL = 32
"""Last bytes of a JPEG in which its end-of-image marker is looked for: writers may pad behind
it."""
MOST_PIXELS = 1 << 26
"""An image with more by its header, 8192 × 8192 say, is not decoded: a few bytes could ask for all
memory. One with as many takes some 600 MiB: ten bytes a pixel while a PNG is made a JPEG, nine
while a progressive JPEG is decoded, of which libjpeg keeps all coefficients."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image on its way into a shard."""

    key: str
    jpeg: bytes
    label: int
    source: str = ""
    """Path of the file it was made from, inside its download."""
    role: str = ""
    """One of manifest.ROLES."""
    group: str = ""
    """What divides the images of its class."""


class _Digested:
    """A binary file for writing from the first to the last byte, with the SHA-256 and number of its
    bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._stream.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_shard(
    folder: Path, file: str, split: str, samples: Iterable[Sample], classes: dict[int, ImageClass]
) -> Shard:
    """Write one tar of KEY.jpg, KEY.json pairs and return its entry in the manifest.

    Samples are taken one at a time and not kept. Deterministic: the same samples give the same
    bytes. Atomic: the tar appears whole or not at all.
    """
    temporary = folder / f".{file}.{secrets.token_hex(6)}.tmp"
    written: list[Sample] = []
    offsets: list[int] = []
    lengths: list[int] = []
    crc32: list[int] = []
    try:
        with open(temporary, "wb") as stream:
            digested = _Digested(stream)
            with webdataset.TarWriter(
                digested, user="namr", group="namr", mtime=0, encoder=False
            ) as writer:
                for sample in samples:
                    writer.write({"__key__": sample.key, "jpg": sample.jpeg})
                    # Members are padded to whole blocks, and the JPEG is the last one so far.
                    padded = -(-len(sample.jpeg) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    offsets.append(writer.tarstream.offset - padded)
                    lengths.append(len(sample.jpeg))
                    crc32.append(zlib.crc32(sample.jpeg))
                    writer.write(
                        {"__key__": sample.key, "json": _meta(sample, classes[sample.label])}
                    )
                    written.append(dataclasses.replace(sample, jpeg=b""))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / file)
    except OSError as error:
        # The file the caller knows, not the temporary one, or none at all.
        error.filename = str(folder / file)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(
        file=file,
        split=split,
        bytes=digested.size,
        sha256=digested.sha256,
        keys=tuple(sample.key for sample in written),
        labels=tuple(sample.label for sample in written),
        offsets=tuple(offsets),
        lengths=tuple(lengths),
        crc32=tuple(crc32),
        roles=tuple(sample.role for sample in written)
        if any(sample.role for sample in written)
        else (),
        groups=tuple(sample.group for sample in written)
        if any(sample.group for sample in written)
        else (),
    )


def _meta(sample: Sample, entry: ImageClass) -> bytes:
    """What KEY.json holds: the class, and what else is known of the image."""
    known = {
        name: value for name in ("source", "role", "group") if (value := getattr(sample, name))
    }
    return json.dumps(
        {"label": sample.label, "name": entry.name, "category": entry.category, **known},
        ensure_ascii=False,
    ).encode()


def verify_shards(
    manifest: Manifest, splits: Sequence[str], *, decode: bool = False, hashes_alone: bool = False
) -> int:
    """Check every shard of the named splits against the manifest; return the number of images.

    Each tar must be there, with the stated size and SHA-256, and, but for `hashes_alone`, each JPEG
    must begin and end as one. With `decode`, each is decoded as well. Raises InputError naming the
    shard (and key) at the first difference.
    """
    images = 0
    for shard in manifest.shards_of(*splits) if splits else ():
        first = next(
            shard_problems(manifest.path(shard), shard, decode=decode, hashes_alone=hashes_alone),
            None,
        )
        if first:
            raise InputError(first)
        images += len(shard.keys)
    return images


def shard_problems(
    path: Path, shard: Shard, *, decode: bool, hashes_alone: bool = False
) -> Iterator[str]:
    """A line for each difference between the tar at `path` and its entry, as `verify_shards` looks
    for them."""
    if not path.is_file():
        yield f"shard {path} is missing; copy it there or rebuild the shard set"
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"shard {path} has {size} bytes, its manifest says {shard.bytes}; copy it again"
        return
    with open(path, "rb") as stream:
        digest = sha256_of(stream)
    if digest != shard.sha256:
        yield f"shard {path} has sha256 {digest[:12]}…, its manifest says {shard.sha256[:12]}…; copy it again"
    if hashes_alone:
        return
    with open(path, "rb") as stream:
        stated = shard.crc32 or (None,) * len(shard.keys)
        for key, offset, length, crc32 in zip(
            shard.keys, shard.offsets, shard.lengths, stated, strict=True
        ):
            stream.seek(offset)
            jpeg = stream.read(length)
            # Of a tar that is another, the line above says enough.
            if digest == shard.sha256 and crc32 not in (None, zlib.crc32(jpeg)):
                yield (
                    f"{key}.jpg in {path} has CRC-32 {zlib.crc32(jpeg):08x}, its manifest says {crc32:08x}; "
                    "rebuild the shard set"
                )
            try:
                check_jpeg(jpeg, f"{key}.jpg in {path}", decode=decode)
            except InputError as error:
                yield str(error)


def map_jpegs(
    manifest: Manifest, index: SplitIndex, work: Callable[[bytes, str], Result]
) -> Iterator[Result]:
    """`work(jpeg, where)` of every image of an index in its order, tar by tar, on all cores.

    `where` names image and shard for an error. Threads: hashing, JPEG decoding and Pillow let
    others run meanwhile. Raises InputError for a shard that is missing or cannot be read.
    """

    def of_shard(positions_M: np.ndarray) -> list[Result]:
        path = manifest.path(manifest.shards[index.shard_N[positions_M[0]]])
        results = []
        try:
            with open(path, "rb") as stream:
                for position in positions_M:
                    stream.seek(int(index.offset_N[position]))
                    jpeg = stream.read(int(index.length_N[position]))
                    results.append(work(jpeg, f"{index.keys[position]}.jpg in {path}"))
        except OSError as error:
            raise InputError(
                f"shard {path} cannot be read ({error.strerror}); copy it there or rebuild the shard "
                "set"
            ) from None
        return results

    by_shard = np.split(np.arange(len(index)), np.flatnonzero(np.diff(index.shard_N)) + 1)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for results in pool.map(of_shard, by_shard):
            yield from results


def check_jpeg(jpeg: bytes, where: str, *, decode: bool) -> None:
    """Raise InputError, naming `where`, if the bytes are not one whole JPEG."""
    if jpeg[:2] != b"\xff\xd8":
        raise InputError(f"{where} is not a JPEG; rebuild the shard set without it")
    if END_OF_IMAGE not in jpeg[-JPEG_TAIL:]:
        raise InputError(f"{where} is a truncated JPEG; rebuild the shard set from a whole image")
    if decode:
        decode_rgb(jpeg, where)


class DamagedImageError(InputError):
    """One image that cannot be decoded, in a shard that can be read."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault, remedy)
        self.fault = fault
        self._remedy = remedy

    def __str__(self) -> str:
        return f"{self.fault}; {self._remedy}"


def jpeg_size(jpeg: bytes, where: str) -> tuple[int, int]:
    """Height and width in pixels, from the header. Raises DamagedImageError, naming `where`, if it
    is damaged, or if the image has more than MOST_PIXELS."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise DamagedImageError(
            f"{where} cannot be decoded ({error})", "rebuild the shard set without it"
        ) from None
    if height * width > MOST_PIXELS:
        raise DamagedImageError(
            f"{where} has {width} × {height} pixels, more than {MOST_PIXELS:,}",
            "rebuild the shard set with --size, or with a smaller image",
        )
    return height, width


def decode_rgb(jpeg: bytes, where: str, *, shrink: int = 1) -> np.ndarray:
    """Decode a JPEG to a uint8 array (H, W, 3).

    `shrink` is 1, 2, 4 or 8: the decoder makes sides of ⌈H / shrink⌉ and ⌈W / shrink⌉ pixels from
    the low frequencies of each block. Raises DamagedImageError as `jpeg_size` does.
    """
    height, width = jpeg_size(jpeg, where)
    try:
        return simplejpeg.decode_jpeg(
            jpeg, "RGB", min_height=-(-height // shrink), min_width=-(-width // shrink)
        )
    except ValueError as error:
        raise DamagedImageError(
            f"{where} cannot be decoded ({error})", "rebuild the shard set without it"
        ) from None


def sha256_of(stream: BinaryIO) -> str:
    """Of a file from where it stands to its end, as hex digits."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
