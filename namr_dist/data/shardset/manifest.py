"""The manifest of a shard set: which image lies where, in which class, in which split.

A shard set is a folder of plain WebDataset tars beside one `manifest.json`. The manifest holds a
byte range for every image, so that an epoch can be planned without opening a tar and any image read
with one seek. Format: docs/data.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from namr_dist.atomic import write_atomic
from namr_dist.errors import InputError
from namr_dist.json_file import parse_json

FORMAT = "namr-shards/1"
FILE_NAME = "manifest.json"
MOST_BYTES = 1 << 30
"""Of the file: twenty million images. Read, a manifest takes five to ten times as much."""

ROLES = ("", "query", "gallery")
"""What an image does at test time: both, only query, only be searched. `SplitIndex.role_N` counts
in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageClass:
    """One class: a product, a bird, a car."""

    label: int
    """Number of the class, unique in the set and the same in every split."""
    name: str
    category: str
    """Super-class; an empty string where the set has none."""
    split: str
    """The one split that holds the class: splits share no class."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar. The four lists run in the order of the tar."""

    file: str
    """File name inside the folder of the manifest, of at most 200 bytes."""
    split: str
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    offsets: tuple[int, ...]
    """First byte of each JPEG in the tar."""
    lengths: tuple[int, ...]
    """Bytes of each JPEG."""
    crc32: tuple[int, ...] = ()
    """CRC-32 of each JPEG, as zlib's; empty in a set that an older version built."""
    roles: tuple[str, ...] = ()
    """One of ROLES for each image; empty: all are both."""
    groups: tuple[str, ...] = ()
    """What divides the images of a class, such as a garment's colours; empty: nothing does."""

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Shard:
        """JSON has lists where this has tuples. Raises TypeError for missing or unknown fields."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """The images of one or more splits as arrays of length N, in the order of the tars."""

    shard_N: np.ndarray
    """int32, index into Manifest.shards."""
    offset_N: np.ndarray
    """int64, bytes."""
    length_N: np.ndarray
    """int64, bytes."""
    crc32_N: np.ndarray
    """int64, that of the JPEG; -1: the manifest does not say."""
    label_N: np.ndarray
    """int64, the manifest's class labels."""
    category_N: np.ndarray
    """int64, position of the class's category among the manifest's `categories`."""
    role_N: np.ndarray
    """int8, position in ROLES."""
    group_N: np.ndarray
    """int64; images of a class with the same number are of the same group."""
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def only(self, chosen_M: np.ndarray) -> SplitIndex:
        """The images at these positions."""
        return SplitIndex(
            shard_N=self.shard_N[chosen_M],
            offset_N=self.offset_N[chosen_M],
            length_N=self.length_N[chosen_M],
            crc32_N=self.crc32_N[chosen_M],
            label_N=self.label_N[chosen_M],
            category_N=self.category_N[chosen_M],
            role_N=self.role_N[chosen_M],
            group_N=self.group_N[chosen_M],
            keys=tuple(self.keys[position] for position in chosen_M),
        )


_CLASS_FIELDS = {field.name for field in fields(ImageClass)}


def _compact(entry: dict[str, Any]) -> dict[str, Any] | ImageClass:
    """What is kept of an object of the file, as soon as it is read: a manifest may have millions of
    entries, and at no time are there all of them twice."""
    if entry.keys() == _CLASS_FIELDS:
        return ImageClass(**entry)
    for key, value in entry.items():
        if isinstance(value, list):
            entry[key] = tuple(value)
    return entry


def _image_class(entry: Any) -> ImageClass:
    """Raises TypeError for missing or unknown fields."""
    return entry if isinstance(entry, ImageClass) else ImageClass(**entry)


class ShardSource(Protocol):
    """Where the tars of a set that lies elsewhere come from."""

    def path(self, shard: Shard) -> Path:
        """A local file with the whole shard. Raises InputError if it cannot be had."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole shard set. `folder` is where it was read from and is not written."""

    name: str
    description: str
    classes: tuple[ImageClass, ...]
    shards: tuple[Shard, ...]
    folder: Path
    subsets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Named parts of splits by the keys of their images, such as VehicleID's three test lists."""
    source: ShardSource | None = field(default=None, compare=False)
    """Fetches shards that lie elsewhere into `folder`; None: they are there. Not written."""
    read_ns: int = field(default_factory=time.time_ns, compare=False)
    """When this was read, in nanoseconds since 1970: shards that changed later are not those that
    were there then. Not written."""

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read FOLDER/manifest.json.

        Raises InputError if it is missing, is no manifest, or contradicts itself.
        """
        path = Path(folder) / FILE_NAME
        try:
            if path.stat().st_size > MOST_BYTES:
                raise InputError(
                    f"{path} has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}; divide the "
                    "set into several"
                )
            text = path.read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"no shard set at {path.parent}: {FILE_NAME} is missing; "
                "give the folder that holds it"
            ) from None
        except OSError as error:
            raise InputError(
                f"{path} cannot be read as a manifest: {error}; rebuild the shard set"
            ) from None
        data = parse_json(
            text,
            f"{path} cannot be read as a manifest: the file",
            "rebuild the shard set",
            object_hook=_compact,
        )
        del text
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            actual = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise InputError(
                f"{path} has format {actual!r}, expected {FORMAT!r}; rebuild the shard set"
            )
        try:
            manifest = cls(
                name=data["name"],
                description=data["description"],
                classes=tuple(map(_image_class, data["classes"])),
                shards=tuple(Shard.from_json(entry) for entry in data["shards"]),
                folder=path.parent,
                subsets={name: tuple(keys) for name, keys in data.get("subsets", {}).items()},
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a complete manifest ({error}); rebuild the shard set"
            ) from None
        manifest._check_types(path)
        manifest._check(path)
        return manifest

    def save(self) -> None:
        """Write the manifest into its folder, atomically."""
        # What is empty is left out: most sets have neither roles nor groups nor subsets.
        shards = [
            {key: value for key, value in vars(shard).items() if value != ()}
            for shard in self.shards
        ]
        body = {
            "format": FORMAT,
            "name": self.name,
            "description": self.description,
            "classes": [asdict(entry) for entry in self.classes],
            "shards": shards,
            **({"subsets": self.subsets} if self.subsets else {}),
        }
        write_atomic(
            self.folder / FILE_NAME,
            json.dumps(body, separators=(",", ":"), ensure_ascii=False) + "\n",
        )

    def _check_types(self, path: Path) -> None:
        for what, values in self._texts():
            if not _are_texts(values):
                raise InputError(f"{path}: {what} must be text; rebuild the shard set")
        for what, values in self._numbers():
            if not _are_int64(values):
                raise InputError(f"{path}: {what} must be whole numbers; rebuild the shard set")

    def _texts(self) -> Iterator[tuple[str, Any]]:
        yield "name and description", (self.name, self.description)
        for name in ("name", "category", "split"):
            yield f"{name} of classes", tuple(getattr(entry, name) for entry in self.classes)
        for name in ("file", "split", "sha256"):
            yield f"{name} of shards", tuple(getattr(shard, name) for shard in self.shards)
        for shard in self.shards:
            for name in ("keys", "roles", "groups"):
                yield f"{name} of {shard.file}", getattr(shard, name)
        yield "names of subsets", tuple(self.subsets)
        for name, keys in self.subsets.items():
            yield f"keys of subset {name!r}", keys

    def _numbers(self) -> Iterator[tuple[str, Any]]:
        yield "label of classes", tuple(entry.label for entry in self.classes)
        yield "bytes of shards", tuple(shard.bytes for shard in self.shards)
        for shard in self.shards:
            for name in ("labels", "offsets", "lengths", "crc32"):
                yield f"{name} of {shard.file}", getattr(shard, name)

    def _check(self, path: Path) -> None:
        if not self.classes or not any(shard.keys for shard in self.shards):
            raise InputError(f"{path} lists no images; rebuild the shard set")
        split_of = {entry.label: entry.split for entry in self.classes}
        if len(split_of) != len(self.classes):
            raise InputError(f"{path}: a class label occurs twice; rebuild the shard set")
        seen: set[str] = set()
        for shard in self.shards:
            # Of that length, a cache may add its own parts to it.
            if not re.fullmatch(rb"[^/]{1,200}", shard.file.encode(), re.DOTALL) or shard.file in (
                ".",
                "..",
            ):
                raise InputError(
                    f"{path}: shard name {shard.file[:80]!r} is not a plain file name of at most 200 "
                    "bytes; rebuild the shard set"
                )
            if "" in shard.keys:
                raise InputError(
                    f"{path}: {shard.file} has an image with an empty key; rebuild the shard set"
                )
            lists = (
                shard.labels,
                shard.offsets,
                shard.lengths,
                shard.crc32 or shard.keys,
                shard.roles or shard.keys,
                shard.groups or shard.keys,
            )
            if any(len(entries) != len(shard.keys) for entries in lists):
                raise InputError(
                    f"{path}: the lists of {shard.file} differ in length; rebuild the shard set"
                )
            if strange := set(shard.roles).difference(ROLES):
                raise InputError(
                    f"{path}: {shard.file} has an image of role {min(map(str, strange))!r}, not query or "
                    "gallery; rebuild the shard set"
                )
            for offset, length in zip(shard.offsets, shard.lengths, strict=True):
                if not (offset >= 0 and 0 < length <= shard.bytes - offset):
                    raise InputError(
                        f"{path}: {shard.file} has an image at byte {offset} of {length} bytes, "
                        f"outside its {shard.bytes}; rebuild the shard set"
                    )
            for label in set(shard.labels):
                if split_of.get(label) != shard.split:
                    raise InputError(
                        f"{path}: {shard.file} is of split {shard.split!r} but holds class {label}, "
                        f"which is of {split_of.get(label)!r}; rebuild the shard set"
                    )
            if len(set(shard.keys)) != len(shard.keys):
                twice = next(key for key, number in Counter(shard.keys).items() if number > 1)
                raise InputError(
                    f"{path}: key {twice!r} occurs twice in {shard.file}; rebuild the shard set"
                )
            if not seen.isdisjoint(shard.keys):
                twice = sorted(seen.intersection(shard.keys))[0]
                raise InputError(
                    f"{path}: key {twice!r} occurs in two shards; rebuild the shard set"
                )
            seen.update(shard.keys)
        for name, keys in self.subsets.items():
            if name in self.splits:
                raise InputError(
                    f"{path}: {name!r} is both a split and a subset; rebuild the shard set"
                )
            if not keys or not seen.issuperset(keys):
                raise InputError(
                    f"{path}: subset {name!r} is empty or names images that are in no shard; rebuild the "
                    "shard set"
                )

    def path(self, shard: Shard) -> Path:
        """The shard's local file, fetched if the set lies elsewhere. Raises InputError if it cannot
        be had."""
        return self.source.path(shard) if self.source else self.folder / shard.file

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """Super-classes of all splits, sorted."""
        return tuple(sorted({entry.category for entry in self.classes}))

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order of the shards."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    @cached_property
    def class_by_label(self) -> dict[int, ImageClass]:
        """The classes of all splits, each by its label."""
        return {entry.label: entry for entry in self.classes}

    def index(self, *splits: str) -> SplitIndex:
        """All images of the named splits or subsets, in the order of the tars.

        Raises InputError for a name the set does not have.
        """
        known = (*self.splits, *self.subsets)
        for split in splits:
            if split not in known:
                raise InputError(f"{self.folder} has no split {split!r}; it has {', '.join(known)}")
        named = set().union(*(self.subsets[split] for split in splits if split in self.subsets))
        chosen = [
            (number, shard)
            for number, shard in enumerate(self.shards)
            if shard.split in splits or not named.isdisjoint(shard.keys)
        ]
        position_of = {category: position for position, category in enumerate(self.categories)}
        category_of = {entry.label: position_of[entry.category] for entry in self.classes}
        labels = [label for _, shard in chosen for label in shard.labels]
        groups = [group for _, shard in chosen for group in shard.groups or ("",) * len(shard.keys)]

        def joined(field: str, dtype: type) -> np.ndarray:
            return np.concatenate([np.asarray(getattr(shard, field), dtype) for _, shard in chosen])

        whole = SplitIndex(
            shard_N=np.concatenate(
                [np.full(len(shard.keys), number, np.int32) for number, shard in chosen]
            ),
            offset_N=joined("offsets", np.int64),
            length_N=joined("lengths", np.int64),
            crc32_N=np.concatenate(
                [
                    np.asarray(shard.crc32 or (-1,) * len(shard.keys), np.int64)
                    for _, shard in chosen
                ]
            ),
            label_N=np.asarray(labels, np.int64),
            category_N=np.asarray([category_of[label] for label in labels], np.int64),
            role_N=np.concatenate(
                [
                    np.asarray([ROLES.index(role) for role in shard.roles], np.int8)
                    if shard.roles
                    else np.zeros(len(shard.keys), np.int8)
                    for _, shard in chosen
                ]
            ),
            group_N=np.unique(np.asarray(groups, str), return_inverse=True)[1].astype(np.int64),
            keys=tuple(key for _, shard in chosen for key in shard.keys),
        )
        if not named:
            return whole
        wanted_N = np.asarray(
            [
                self.shards[number].split in splits or key in named
                for number, key in zip(whole.shard_N, whole.keys, strict=True)
            ]
        )
        return whole.only(np.flatnonzero(wanted_N))

    def shards_of(self, *splits: str) -> tuple[Shard, ...]:
        """The shards that hold images of the named splits or subsets. Raises InputError as `index`
        does."""
        return tuple(self.shards[number] for number in np.unique(self.index(*splits).shard_N))

    def split_hash(self, *splits: str) -> str:
        """First 16 hex digits of a SHA-256 over the sorted keys, labels and roles: names a split in
        a protocol."""
        return self.hash_of(self.index(*splits))

    def hash_of(self, index: SplitIndex) -> str:
        """The same of any of the set's images."""
        lines = sorted(
            f"{key}\t{label}" + (f"\t{ROLES[role]}" if role else "") + "\n"
            for key, label, role in zip(index.keys, index.label_N, index.role_N, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _are_texts(values: Any) -> bool:
    """Whether it is a tuple of texts that can be names of files: without NUL and halves of
    characters."""
    try:
        return isinstance(values, tuple) and b"\0" not in "".join(values).encode()
    except (TypeError, UnicodeEncodeError):
        return False


def _are_int64(values: Any) -> bool:
    """Whether it is a tuple of whole numbers, neither true nor false, that fit 64 bits."""
    return (
        isinstance(values, tuple)
        and set(map(type, values)) <= {int}
        and (not values or (min(values) >= -(2**63) and max(values) < 2**63))
    )
