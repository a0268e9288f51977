"""Pictures as callers have them, and pictures of which some may be damaged.

Shapes: N pictures, H pixels a side, b a batch's pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from namr_dist.config import RemoteConfig
from namr_dist.data.build.normalise import BrokenImageError, viewed
from namr_dist.data.location import open_shards
from namr_dist.data.picture import Picture
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.image_folder import image_names, read_picture
from namr_dist.data.read.stream import Batch, ImageSource, ShardImages
from namr_dist.data.remote.address import is_command, is_url, shown
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.errors import InputError, ReportedError
from namr_dist.gallery.items import Items, Source

HOMEWARE = "homeware"
"""As a shard set: the one that comes with the package."""


class PictureList(ImageSource):
    """Pictures of any kind, in the order given. Labels are −1."""

    def __init__(self, pictures: Sequence[Picture], transform: TestTransform) -> None:
        self._pictures = pictures
        self._transform = transform
        self.side = transform.size

    def __len__(self) -> int:
        return len(self._pictures)

    def files(self, positions: Iterable[int]) -> list[str]:
        """What the pictures are called."""
        return sorted({name_of(self._pictures[position], position) for position in positions})

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | ReportedError:
        positions = [position for position, _ in items]
        try:
            images = np.stack([self._image(position) for position in positions])
        except ReportedError as error:
            return error
        return Batch(
            images_bHW3=torch.from_numpy(images),
            labels_b=torch.full((len(positions),), -1),
            index_b=torch.tensor(positions),
        )

    def _image(self, position: int) -> np.ndarray:
        picture = self._pictures[position]
        try:
            return read_picture(picture, size=self.side, share=self._transform.crop_share)
        except InputError as error:
            if isinstance(picture, (str, os.PathLike)):
                raise
            raise InputError(f"{name_of(picture, position)}: {error}") from None


def name_of(picture: Picture, position: int) -> str:
    """A path as it is; else what it is and which."""
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    kind = {bytes: "bytes", np.ndarray: "array"}.get(type(picture), "image")
    return f"{kind} {position}"


class Sparing(ImageSource):
    """Pictures of another source. A damaged one is black, its position −1 − p, and `replaced` of
    its batch has a line on it, where the other source would end."""

    def __init__(self, images: ImageSource) -> None:
        self._images = images
        self.side = images.side

    def __len__(self) -> int:
        return len(self._images)

    def files(self, positions: Iterable[int]) -> list[str]:
        """As the other source has them."""
        return self._images.files(positions)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | ReportedError:
        batch = self._images.__getitems__(items)
        if not isinstance(batch, InputError):
            return batch
        parts, faults = [], []
        for item in items:
            one = self._images.__getitems__([item])
            if isinstance(one, InputError):
                faults.append(str(one))
                one = Batch(
                    images_bHW3=torch.zeros((1, self.side, self.side, 3), dtype=torch.uint8),
                    labels_b=torch.full((1,), -1),
                    index_b=torch.tensor([-1 - item[0]]),
                )
            elif isinstance(one, ReportedError):
                return one
            parts.append(one)
        images, labels, index = (
            torch.cat(column) for column in zip(*(part.tensors for part in parts), strict=True)
        )
        return Batch(images_bHW3=images, labels_b=labels, index_b=index, replaced=tuple(faults))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collection:
    """Pictures to be indexed, with what is known of them."""

    images: ImageSource
    items: Items
    fingerprint: str
    """changes when other pictures are there under the same names"""
    class_N: np.ndarray | None = None
    """int64, the labels of a shard set"""
    role_N: np.ndarray | None = None
    """int8, of a shard set: positions in manifest.ROLES"""


def collect(places: Sequence[Path], transform: TestTransform) -> Collection:
    """All image files below folders, and image files, or lists of them: text files
    (.txt) with a path a line.

    An id is a path below its folder; of a file, the path as given. A picture's label is the folder
    below the named one that it lies in, if any. Raises InputError for what is not there, and if two
    pictures have one id.
    """
    items = Items.none()
    for are_files, group in itertools.groupby(places, _is_one_file):
        if are_files:
            items = _with(items, _files(tuple(map(str, group))))
        else:
            for place in group:
                found = _of_folder(place) if place.is_dir() else _files(_listed(place))
                items = _with(items, found)
    paths = [Path(items.path(position)) for position in range(len(items))]
    digest = hashlib.sha256()
    for path, one in zip(paths, items.ids, strict=True):
        try:
            status = path.stat()
        except (OSError, ValueError) as error:  # a path with a NUL is the latter
            why = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"{path} cannot be read ({why}); give image files, folders, or lists of files"
            ) from None
        digest.update(
            f"{one}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return Collection(
        images=PictureList(paths, transform), items=items, fingerprint=digest.hexdigest()
    )


def _with(items: Items, more: Items) -> Items:
    """Both, each picture once, however often it was named."""
    seen = {items.path(position) for position in range(len(items))}
    kept = []
    for position in range(len(more)):
        if (path := more.path(position)) not in seen:
            seen.add(path)
            kept.append(position)
    return items.joined(more.at(np.array(kept, dtype=np.int64)))


def _is_one_file(place: Path) -> bool:
    return place.suffix.lower() != ".txt" and not place.is_dir()


def _of_folder(folder: Path) -> Items:
    names = image_names(folder)
    holders = [str(Path(name).parent) for name in names]
    labels = tuple(None if holder == "." else holder for holder in holders)
    return _in(Path(os.path.abspath(folder)), names, labels)


def _files(paths: tuple[str, ...]) -> Items:
    return _in(Path.cwd(), paths, (None,) * len(paths))


def _in(root: Path, ids: tuple[str, ...], labels: tuple[str | None, ...]) -> Items:
    return Items(
        ids=ids,
        labels=labels,
        source_N=np.zeros(len(ids), dtype=np.int64),
        sources=(Source(kind="folder", place=str(root)),),
    )


def _listed(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read as a list of paths ({error}); give one a line"
        ) from None
    if names := tuple(line.strip() for line in lines if line.strip()):
        return names
    raise InputError(f"{file} lists no picture; give a path a line")


def of_shards(
    location: str, split: str, transform: TestTransform, remote: RemoteConfig | None = None
) -> Collection:
    """A split of a shard set: in a folder, behind a URL, or HOMEWARE.

    An id is an image's key, a label its class's name and, where several classes have that name, its
    number.
    """
    manifest = _opened(location, remote)
    verify_shards(manifest, [split])
    index = manifest.index(split)
    names = [manifest.class_by_label[int(label)].name for label in index.label_N]
    classes_of: dict[str, set[int]] = {}
    for name, label in zip(names, index.label_N.tolist(), strict=True):
        classes_of.setdefault(name, set()).add(label)
    return Collection(
        images=ShardImages(manifest, index, transform),
        items=Items(
            ids=index.keys,
            labels=tuple(
                name if len(classes_of[name]) == 1 else f"{name} #{label}"
                for name, label in zip(names, index.label_N.tolist(), strict=True)
            ),
            source_N=np.zeros(len(index), dtype=np.int64),
            sources=(Source(kind="shards", place=_recorded(location), split=split),),
        ),
        fingerprint=manifest.split_hash(split),
        class_N=index.label_N,
        role_N=index.role_N if index.role_N.any() else None,
    )


def of_pictures(pictures: Sequence[Picture], transform: TestTransform) -> Collection:
    """Pictures that a program has. Files keep their paths, others are called by their place."""
    are_files = all(isinstance(picture, (str, os.PathLike)) for picture in pictures)
    items = Items(
        ids=tuple(name_of(picture, number) for number, picture in enumerate(pictures)),
        labels=(None,) * len(pictures),
        source_N=np.zeros(len(pictures), dtype=np.int64),
        sources=(Source(kind="folder", place=os.getcwd()) if are_files else Source(kind="memory"),),
    )
    items.check_ids()
    return Collection(images=PictureList(pictures, transform), items=items, fingerprint="")


def _recorded(location: str) -> str:
    """Where shards are, to be written down: a path in full, a URL without credentials."""
    if is_url(location):
        return shown(location)
    return HOMEWARE if _is_homeware(location) else str(Path(location).absolute())


def _is_homeware(location: str) -> bool:
    return location == HOMEWARE and not Path(location).exists()


def _opened(location: str, remote: RemoteConfig | None = None) -> Manifest:
    return open_shards(None if _is_homeware(location) else location, remote)


def picture_of(items: Items, position: int) -> Image.Image:
    """The picture of an item, RGB, upright. Raises InputError, naming it, if it cannot be had."""
    source, one = items.sources[items.source_N[position]], items.ids[position]
    if source.kind == "folder":
        path = Path(items.path(position))
        try:
            return viewed(path.read_bytes())
        except (OSError, BrokenImageError) as error:
            raise InputError(
                f"{path} cannot be shown ({error}); it has been moved or changed"
            ) from None
    if source.kind == "shards":
        images, place_of = _shard_images(source.place, source.split)
        if one not in place_of:
            raise InputError(f"{one} is no more in {source.place}, split {source.split}")
        return viewed(images.jpeg(place_of[one]))
    raise InputError(f"{one} has no picture: it was indexed from {source.kind}")


def shown_picture(picture: Picture) -> Image.Image:
    """A picture as it is viewed, RGB. Raises InputError for what is none."""
    try:
        if isinstance(picture, (str, os.PathLike)):
            return viewed(Path(picture).read_bytes())
        if isinstance(picture, (bytes, Image.Image, np.ndarray)):
            return viewed(picture)
        picture.seek(0)
        return viewed(picture.read())
    except (OSError, BrokenImageError) as error:
        raise InputError(f"{name_of(picture, 0)} cannot be shown ({error})") from None


@lru_cache(maxsize=8)
def _shard_images(place: str, split: str) -> tuple[ShardImages, dict[str, int]]:
    if is_command(place):  # a file is no reason to run one
        raise InputError(
            f"the pictures came from a command ({shown(place)}), which is not run again"
        )
    manifest = _opened(place)
    index = manifest.index(split)
    images = ShardImages(manifest, index, TestTransform(size=1, crop_share=1.0))
    return images, {key: position for position, key in enumerate(index.keys)}
