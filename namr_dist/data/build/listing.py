"""What a converter finds in an original download: every image with its class, split and role. No
image is opened.

One module a data set in formats/ makes a `Listing`; data/build/build.py turns it into shards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from namr_dist.data.shardset.manifest import ROLES, ImageClass
from namr_dist.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """One image file of a download."""

    path: Path
    key: str
    """Its name in the shards, unique in the set; without dots and slashes, at which readers of tars
    cut names."""
    label: int
    split: str
    role: str = ""
    """One of ROLES."""
    group: str = ""
    """What divides the images of its class, such as a garment's colours."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A whole data set, as its own lists state it."""

    name: str
    description: str
    """One line: source, edition, which image tree; it goes into the manifest."""
    root: Path
    """The folder that the listed paths are relative to; the shards state the images' paths from
    there."""
    classes: tuple[ImageClass, ...]
    images: tuple[SourceImage, ...]
    subsets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """As in a manifest."""
    expected: dict[str, int] = field(default_factory=dict)
    """Known counts of the full set, such as "train images" or "gallery classes", to compare with
    `counts`."""
    notes: tuple[str, ...] = ()
    """A line for each thing that the user should know of before a build."""

    def counts(self) -> dict[str, int]:
        """Images and classes of every split, role and subset, in the words that `expected` uses."""
        by_name: dict[str, list[SourceImage]] = {}
        subset_of: dict[str, list[str]] = {}
        for name, keys in self.subsets.items():
            for key in keys:
                subset_of.setdefault(key, []).append(name)
        for image in self.images:
            for name in (image.split, image.role, *subset_of.get(image.key, ())):
                if name:
                    by_name.setdefault(name, []).append(image)
        counts: dict[str, int] = {}
        for name, images in by_name.items():
            counts[f"{name} images"] = len(images)
            counts[f"{name} classes"] = len({image.label for image in images})
        counts["images"] = len(self.images)
        counts["classes"] = len(self.classes)
        counts["categories"] = len({entry.category for entry in self.classes if entry.category})
        return counts

    def differences(self) -> list[str]:
        """A line for each count that is not as expected, with both numbers."""
        counts = self.counts()
        return [
            f"{name}: {counts.get(name, 0):,} found, {number:,} expected"
            for name, number in self.expected.items()
            if counts.get(name, 0) != number
        ]

    def check(self) -> None:
        """Raise InputError for contradictions: no image, a class in two splits or in none, a key
        that is there twice or holds a dot or a slash, an unknown role, a file that is not there.

        The first ten missing files are named, and their number.
        """
        if not self.images:
            raise InputError(
                f"{self.name}: no image is listed; give the folder that the download unpacks into"
            )
        split_of = {entry.label: entry.split for entry in self.classes}
        twice = [
            key for key, number in Counter(image.key for image in self.images).items() if number > 1
        ]
        if twice:
            raise InputError(
                f"{self.name}: {len(twice)} images share a name, the first {twice[0]!r}; each file may be "
                "listed once"
            )
        for image in self.images:
            if {".", "/"} & set(image.key) or not image.key:
                raise InputError(
                    f"{self.name}: the key {image.key!r} of {image.path} is empty or holds a dot or a "
                    "slash, at which readers of tars cut names; make it of other letters"
                )
            if image.role not in ROLES:
                raise InputError(
                    f"{self.name}: {image.path} has the role {image.role!r}; give it one of "
                    f"{', '.join(map(repr, ROLES))}"
                )
            if split_of.get(image.label) != image.split:
                raise InputError(
                    f"{self.name}: {image.path} is of split {image.split!r}, but its class {image.label} "
                    f"is of {split_of.get(image.label)!r}; splits may share no class"
                )
        missing = [str(image.path) for image in self.images if not image.path.is_file()]
        if missing:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise InputError(
                f"{self.name}: {len(missing)} of {len(self.images)} listed images are missing: "
                f"{', '.join(missing[:10])}{more}; check the paths, or unpack the download again"
            )
