"""Cars196 (Stanford Cars): 16,185 images of 196 models, in any of the layouts in circulation.

Source: Krause et al., 3D Object Representations for Fine-Grained Categorization, 3dRR 2013. The
classes 1–98 train and 99–196 test, as in Song et al., CVPR 2016, whichever part of the
classification split an image is of. Layouts:

- flat: car_ims/ and cars_annos.mat;
- devkit: cars_train/, cars_test/, devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat,
there or beside;
- class folders: CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from scipy.io import loadmat

from namr_dist.data.build.formats.folder import class_images
from namr_dist.data.build.formats.lists import find_root, image_key, relative_path
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.shardset.manifest import ImageClass
from namr_dist.errors import InputError

_LAST_TRAIN_CLASS = 98
_EXPECTED = {
    "images": 16_185,
    "classes": 196,
    "train images": 8_054,
    "train classes": 98,
    "test images": 8_131,
    "test classes": 98,
}

_Labelled = list[tuple[PurePosixPath, int]]
"""Path of each image inside the root, and its class id, counted from 1."""


def read(source: Path) -> Listing:
    """Labels are the class ids; the description names the layout.

    Class folders are numbered by sorted name. That gives every make the ids it has in the
    annotations, and so the same split, but some models of a make change places. `source` is the
    folder of the layout or the one that holds it. Raises InputError for annotations that are
    missing, damaged or contradictory, and for images that are not there.
    """
    root = find_root(source, "devkit", "cars_annos.mat", "train") or _folder_of_classes(source)
    layout = _layout(root)
    readers = {"flat": _read_flat, "devkit": _read_devkit, "class folder": _read_folders}
    labelled, names = readers[layout](root)
    listing = Listing(
        name="cars",
        description=f"Cars196, original images, {layout} layout, classes 1–98 train",
        root=root,
        classes=_classes(root, labelled, names),
        expected=_EXPECTED,
        images=tuple(
            SourceImage(path=root / path, key=image_key(path), label=label, split=_split(label))
            for path, label in labelled
        ),
    )
    listing.check()
    return listing


def _split(label: int) -> str:
    return "train" if label <= _LAST_TRAIN_CLASS else "test"


def _folder_of_classes(source: Path) -> Path:
    """`source`, or the only folder in it if that holds the class folders."""
    folders = [entry for entry in source.iterdir() if entry.is_dir()]
    if not folders:
        raise InputError(
            f"no devkit, cars_annos.mat, train or class folder in {source} or in a folder in it; give the "
            "folder that the download unpacks into"
        )
    below = [entry for entry in folders[0].iterdir() if entry.is_dir()]
    return folders[0] if len(folders) == 1 and below else source


def _layout(root: Path) -> str:
    flat = (root / "cars_annos.mat").is_file()
    if (root / "devkit").is_dir() and not (flat and (root / "car_ims").is_dir()):
        return "devkit"
    return "flat" if flat else "class folder"


def _read_flat(root: Path) -> tuple[_Labelled, dict[int, str]]:
    path = root / "cars_annos.mat"
    contents = _load(path)
    return _labelled(path, contents, "relative_im_path"), _names(contents)


def _read_devkit(root: Path) -> tuple[_Labelled, dict[int, str]]:
    kit = root / "devkit"
    of_test = [folder / "cars_test_annos_withlabels.mat" for folder in (kit, root)] + [
        kit / "cars_test_annos.mat"
    ]
    labelled: _Labelled = []
    for folder, path in (
        ("cars_train", kit / "cars_train_annos.mat"),
        ("cars_test", next((path for path in of_test if path.is_file()), of_test[0])),
    ):
        labelled += [
            (PurePosixPath(folder) / file, label)
            for file, label in _labelled(path, _load(path), "fname")
        ]
    meta = kit / "cars_meta.mat"
    return labelled, _names(_load(meta)) if meta.is_file() else {}


def _read_folders(root: Path) -> tuple[_Labelled, dict[int, str]]:
    tops = [root / name for name in ("train", "test") if (root / name).is_dir()] or [root]
    files = [
        (name, path) for top in tops for name, paths in class_images(top).items() for path in paths
    ]
    number_of = {name: number for number, name in enumerate(sorted({name for name, _ in files}), 1)}
    labelled = [(PurePosixPath(path.relative_to(root)), number_of[name]) for name, path in files]
    return labelled, {number: name for name, number in number_of.items()}


def _load(path: Path) -> dict[str, Any]:
    """Contents of a .mat file. Raises InputError if it is missing or damaged."""
    try:
        contents: dict[str, Any] = loadmat(path, squeeze_me=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; get it and put it there") from None
    except Exception as error:  # a damaged file makes scipy raise whatever its parser stumbles over
        raise InputError(
            f"{path} cannot be read as a .mat file ({error}); download it again"
        ) from None
    return contents


def _labelled(path: Path, contents: dict[str, Any], column: str) -> _Labelled:
    annotations = np.atleast_1d(contents.get("annotations", ()))
    columns = annotations.dtype.names or ()
    if column not in columns:
        raise InputError(
            f"{path} has no annotations with the field {column!r}; give the original file"
        )
    if "class" not in columns:
        raise InputError(
            f"{path} has no classes; get cars_test_annos_withlabels.mat and put it beside that file"
        )
    labelled = []
    for number, (file, label) in enumerate(
        zip(annotations[column], annotations["class"], strict=True), 1
    ):
        where = f"{path}, annotation {number}"
        if not str(label).isdigit() or int(label) < 1:
            raise InputError(
                f"{where}: the class is {str(label)!r}, not a whole number from 1; give the original file"
            )
        labelled.append((relative_path(str(file), where), int(label)))
    return labelled


def _names(contents: dict[str, Any]) -> dict[int, str]:
    return {
        number: str(name)
        for number, name in enumerate(np.atleast_1d(contents.get("class_names", ())), 1)
    }


def _classes(root: Path, labelled: _Labelled, names: dict[int, str]) -> tuple[ImageClass, ...]:
    """One for each class id, in their order; where there are no names, the ids are."""
    used = {label for _, label in labelled}
    names = names or {label: str(label) for label in used}
    if nameless := sorted(used - names.keys()):
        raise InputError(
            f"the annotations in {root} have class {nameless[0]}, but name only {len(names)} classes; "
            "download them again"
        )
    if empty := sorted(names.keys() - used):
        raise InputError(
            f"class {empty[0]} ({names[empty[0]]!r}) has no images in the annotations in {root}; download "
            "them again"
        )
    return tuple(
        ImageClass(label=label, name=names[label], category="", split=_split(label))
        for label in sorted(used)
    )
