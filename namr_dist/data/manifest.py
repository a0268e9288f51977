"""The manifest of a shard set: which image lies where, in which class, in which split.

A shard set is a folder of plain WebDataset tars beside one `manifest.json`. The manifest holds a byte range
for every image, so that an epoch can be planned without opening a tar and any image read with one seek.
Format: docs/data.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from namr_dist.atomic import write_atomic
from namr_dist.errors import InputError

FORMAT = "namr-shards/1"
FILE_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
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
    """File name inside the folder of the manifest."""
    split: str
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    offsets: tuple[int, ...]
    """First byte of each JPEG in the tar."""
    lengths: tuple[int, ...]
    """Bytes of each JPEG."""

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Shard:
        """JSON has lists where this has tuples. Raises TypeError for missing or unknown fields."""
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                                  for key, value in entry.items()}
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
    label_N: np.ndarray
    """int64, the manifest's class labels."""
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole shard set. `folder` is where it was read from and is not written."""

    name: str
    description: str
    classes: tuple[ImageClass, ...]
    shards: tuple[Shard, ...]
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read FOLDER/manifest.json.

        Raises InputError if it is missing, is no manifest, or contradicts itself.
        """
        path = Path(folder) / FILE_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"no shard set at {path.parent}: {FILE_NAME} is missing; "
                "give the folder that holds it"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a manifest: {error}; rebuild the shard set") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{path} has format {found!r}, expected {FORMAT!r}; rebuild the shard set")
        try:
            manifest = cls(
                name=data["name"],
                description=data["description"],
                classes=tuple(ImageClass(**entry) for entry in data["classes"]),
                shards=tuple(Shard.from_json(entry) for entry in data["shards"]),
                folder=path.parent,
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is not a complete manifest ({error}); rebuild the shard set") from None
        manifest._check(path)
        return manifest

    def save(self) -> None:
        """Write the manifest into its folder, atomically."""
        body = {"format": FORMAT, "name": self.name, "description": self.description,
                "classes": [asdict(entry) for entry in self.classes],
                "shards": [asdict(shard) for shard in self.shards]}
        write_atomic(self.folder / FILE_NAME, json.dumps(body, separators=(",", ":"), ensure_ascii=False) + "\n")

    def _check(self, path: Path) -> None:
        if not self.classes or not any(shard.keys for shard in self.shards):
            raise InputError(f"{path} lists no images; rebuild the shard set")
        split_of = {entry.label: entry.split for entry in self.classes}
        if len(split_of) != len(self.classes):
            raise InputError(f"{path}: a class label occurs twice; rebuild the shard set")
        seen: set[str] = set()
        for shard in self.shards:
            if Path(shard.file).name != shard.file:
                raise InputError(f"{path}: shard name {shard.file!r} is not a plain file name")
            lists = (shard.labels, shard.offsets, shard.lengths)
            if any(len(entries) != len(shard.keys) for entries in lists):
                raise InputError(f"{path}: the lists of {shard.file} differ in length; rebuild the shard set")
            for offset, length in zip(shard.offsets, shard.lengths, strict=True):
                if not (isinstance(offset, int) and isinstance(length, int) and offset >= 0
                        and 0 < length <= shard.bytes - offset):
                    raise InputError(f"{path}: {shard.file} has an image at byte {offset!r} of {length!r} bytes, "
                                     f"outside its {shard.bytes}; rebuild the shard set")
            for label in set(shard.labels):
                if split_of.get(label) != shard.split:
                    raise InputError(
                        f"{path}: {shard.file} is of split {shard.split!r} but holds class {label}, "
                        f"which is of {split_of.get(label)!r}; rebuild the shard set"
                    )
            if not seen.isdisjoint(shard.keys):
                twice = sorted(seen.intersection(shard.keys))[0]
                raise InputError(f"{path}: key {twice!r} occurs in two shards; rebuild the shard set")
            seen.update(shard.keys)

    @cached_property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    @cached_property
    def class_by_label(self) -> dict[int, ImageClass]:
        return {entry.label: entry for entry in self.classes}

    def index(self, *splits: str) -> SplitIndex:
        """All images of the named splits, in the order of the tars.

        Raises InputError for a split the set does not have.
        """
        for split in splits:
            if split not in self.splits:
                raise InputError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        chosen = [(number, shard) for number, shard in enumerate(self.shards) if shard.split in splits]

        def joined(field: str, dtype: type) -> np.ndarray:
            return np.concatenate([np.asarray(getattr(shard, field), dtype) for _, shard in chosen])

        return SplitIndex(
            shard_N=np.concatenate([np.full(len(shard.keys), number, np.int32) for number, shard in chosen]),
            offset_N=joined("offsets", np.int64),
            length_N=joined("lengths", np.int64),
            label_N=joined("labels", np.int64),
            keys=tuple(key for _, shard in chosen for key in shard.keys),
        )

    def split_hash(self, *splits: str) -> str:
        """First 16 hex digits of a SHA-256 over the sorted (key, label) pairs: names a split in a protocol."""
        index = self.index(*splits)
        lines = sorted(f"{key}\t{label}\n" for key, label in zip(index.keys, index.label_N, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def statistics(manifest: Manifest) -> dict:
    """Counts by split: images, classes, images a class (mean, least, most), shards, bytes of images."""
    rows = {}
    for split in manifest.splits:
        index = manifest.index(split)
        per_class = np.unique(index.label_N, return_counts=True)[1]
        rows[split] = {
            "images": len(index), "classes": len(per_class), "images_per_class": float(per_class.mean()),
            "least": int(per_class.min()), "most": int(per_class.max()),
            "shards": sum(shard.split == split for shard in manifest.shards),
            "mib": float(index.length_N.sum() / 2**20),
        }
    return {"name": manifest.name, "description": manifest.description, "splits": rows}
