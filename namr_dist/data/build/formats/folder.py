"""A user's own images: folders named by class, or a table.

Folders: ROOT/CLASS/IMAGE, where the first half of the sorted classes trains and the second half
tests; or, where ROOT holds only folders of these names,
ROOT/{train,val,test,query,gallery}/CLASS/IMAGE. Images of `query` and `gallery` are of the test
split, with that role.

Table: a CSV file with the columns path, label, split and, if wanted, is_query with is_gallery,
category, group. Paths are relative to its folder; is_query and is_gallery are true or false (1 or
0), and may be empty for training images.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from namr_dist.data.build.formats.lists import ENDINGS, OTHER_ENDINGS, unique_keys
from namr_dist.data.build.formats.table import Entry, read_table
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.shardset.manifest import ROLES, ImageClass
from namr_dist.errors import InputError

_SPLIT_OF = {"train": "train", "val": "val", "test": "test", "query": "test", "gallery": "test"}


def read(source: Path) -> Listing:
    """Labels number the sorted class names from 0; a table's labels that are all whole numbers are
    kept.

    `source` is a folder or a file that ends in .csv. `notes` count the images of other kinds in
    class folders. Raises InputError for a class in two splits or without images, for images outside
    of class folders, and for a table with anything but what is stated above.
    """
    notes: tuple[str, ...] = ()
    if source.is_dir():
        root = source
        entries, description = _read_folders(source)
        numbers = _in_order(entries)
        notes = _other_images(root, entries)
    elif source.suffix.lower() == ".csv":
        root, description = source.parent, f"table {source.name}"
        entries = read_table(source)
        kept = all(
            entry.label.isascii() and entry.label.isdigit() and len(entry.label) <= 18
            for entry in entries
        )
        numbers = (
            {entry.label: int(entry.label) for entry in entries} if kept else _in_order(entries)
        )
    else:
        raise InputError(f"{source} is neither a folder nor a .csv file; give one of both")
    listing = Listing(
        name=root.resolve().name,
        description=description,
        root=root,
        notes=notes,
        classes=_classes(entries, numbers),
        images=_images(root, entries, numbers),
    )
    listing.check()
    return listing


def class_images(root: Path) -> dict[str, list[Path]]:
    """The image files of each class, of which `root` holds a folder; both sorted by name. Hidden
    files are left out.

    Raises InputError for an image beside the class folders, a folder in one, a class without
    images, and if there is no class.
    """
    images: dict[str, list[Path]] = {}
    for folder in _entries(root):
        if not folder.is_dir():
            if folder.suffix.lower() in ENDINGS:
                raise InputError(f"{folder} lies in no class folder; move it into one")
            continue
        inside = _entries(folder)
        if deeper := [entry for entry in inside if entry.is_dir()]:
            raise InputError(
                f"{deeper[0]} is a folder in the class folder {folder.name!r}; put the images of a class "
                "into its folder itself, and only folders named by splits beside one another"
            )
        images[folder.name] = [entry for entry in inside if entry.suffix.lower() in ENDINGS]
        if not images[folder.name]:
            raise InputError(
                f"class {folder.name!r} has no images: no file in {folder} ends in {', '.join(ENDINGS)}; "
                "add some or remove the folder"
            )
    if not images:
        raise InputError(
            f"{root} has no class folders; give a folder with one of images for each class"
        )
    return images


def _entries(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        # Python stands in lone surrogates for bytes that are no UTF-8; no tar, manifest or terminal
        # takes those.
        if any("\ud800" <= letter <= "\udfff" for letter in entry.name):
            raise InputError(f"the name {ascii(entry.name)} in {folder} is no UTF-8; rename it")
    return entries


def _read_folders(root: Path) -> tuple[list[Entry], str]:
    tops = [entry.name for entry in _entries(root) if entry.is_dir()]
    if tops and set(tops) <= set(_SPLIT_OF):
        entries = [
            _entry(root, path, name, split=_SPLIT_OF[top], role=top if top in ROLES else "")
            for top in tops
            for name, paths in class_images(root / top).items()
            for path in paths
        ]
        return entries, f"class folders in {', '.join(tops)}"
    classes = class_images(root)
    half = (len(classes) + 1) // 2
    entries = [
        _entry(root, path, name, split="train" if position < half else "test")
        for position, (name, paths) in enumerate(classes.items())
        for path in paths
    ]
    return (
        entries,
        f"class folders: of {len(classes)} sorted classes the first {half} train, the others test",
    )


def _other_images(root: Path, entries: list[Entry]) -> tuple[str, ...]:
    """A line for each ending of images that lie beside the listed ones and are not read."""
    counts = Counter(
        path.suffix.lower()
        for folder in {root / entry.path.parent for entry in entries}
        for path in _entries(folder)
        if path.suffix.lower() in OTHER_ENDINGS
    )
    return tuple(
        f"{number:,} {ending} files in {root} are not read; convert them to JPEG or PNG to have them in"
        for ending, number in sorted(counts.items())
    )


def _entry(root: Path, path: Path, label: str, *, split: str, role: str = "") -> Entry:
    return Entry(
        path=PurePosixPath(path.relative_to(root)),
        label=label,
        split=split,
        where=str(path.parent),
        role=role,
    )


def _in_order(entries: list[Entry]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted({entry.label for entry in entries}))}


def _classes(entries: list[Entry], numbers: dict[str, int]) -> tuple[ImageClass, ...]:
    classes: dict[int, ImageClass] = {}
    for entry in entries:
        label = numbers[entry.label]
        known = classes.setdefault(
            label,
            ImageClass(label=label, name=entry.label, category=entry.category, split=entry.split),
        )
        if known.name != entry.label:
            raise InputError(
                f"{entry.where}: labels {entry.label!r} and {known.name!r} are the same number; write a "
                "class's number in one way"
            )
        if known.split != entry.split:
            raise InputError(
                f"{entry.where}: class {entry.label!r} is of split {entry.split!r} here and of "
                f"{known.split!r} elsewhere; splits may share no class: keep it in one"
            )
        if known.category != entry.category:
            raise InputError(
                f"{entry.where}: class {entry.label!r} is of category {entry.category!r} here and of "
                f"{known.category!r} elsewhere; give each class one"
            )
    return tuple(classes[label] for label in sorted(classes))


def _images(root: Path, entries: list[Entry], numbers: dict[str, int]) -> tuple[SourceImage, ...]:
    keys = unique_keys(entry.path for entry in entries)
    return tuple(
        SourceImage(
            path=root / entry.path,
            key=keys[entry.path],
            label=numbers[entry.label],
            split=entry.split,
            role=entry.role,
            group=entry.group,
        )
        for entry in entries
    )
