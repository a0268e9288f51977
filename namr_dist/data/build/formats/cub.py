"""CUB-200-2011: 11,788 images of 200 bird species.

Source: Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011. Read are images.txt,
image_class_labels.txt and classes.txt. The classes 1–100 train and 101–200 test, as in Song et al.,
CVPR 2016; train_test_split.txt is that of classification and not read.
"""

from __future__ import annotations

from pathlib import Path

from namr_dist.data.build.formats.lists import (
    find_list,
    image_key,
    read_labels,
    read_lines,
    relative_path,
)
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.shardset.manifest import ImageClass
from namr_dist.errors import InputError

_LAST_TRAIN_CLASS = 100
_IMAGES_OF_2010 = 6_033
_EXPECTED = {
    "images": 11_788,
    "classes": 200,
    "train images": 5_864,
    "train classes": 100,
    "test images": 5_924,
    "test classes": 100,
}


def read(source: Path) -> Listing:
    """Labels are the class ids, names those of the class folders.

    `source` is CUB_200_2011 or the folder that holds it. Raises InputError for the edition of 2010,
    for lists that are missing, damaged or contradictory, and for images that are not there.
    """
    root = find_list(source, "images.txt", "lists/files.txt").parent
    if not (root / "image_class_labels.txt").is_file():
        raise InputError(
            f"{root} has no image_class_labels.txt, as in the edition of 2010, which is another data set; "
            "download CUB_200_2011"
        )
    label_of = read_labels(root / "image_class_labels.txt", "image_id class_id")
    lines = read_lines(root / "images.txt")
    if len(lines) == _IMAGES_OF_2010:
        raise InputError(
            f"{root / 'images.txt'} lists {_IMAGES_OF_2010:,} images, as the edition of 2010, which is "
            "another data set; download CUB_200_2011"
        )
    classes: dict[int, ImageClass] = {}
    images = []
    for line in lines:
        image_id, file = line.columns("image_id path")
        label = label_of.pop(line.integer("image_id", image_id), None)
        if label is None:
            raise InputError(
                f"{line.where}: image {image_id} is listed twice or has no class in "
                "image_class_labels.txt; unpack the download again"
            )
        relative = relative_path(file, line.where)
        number, _, name = relative.parts[0].partition(".")
        if line.integer("the number of the class folder", number) != label:
            raise InputError(
                f"{line.where}: image {image_id} lies in {relative.parts[0]!r}, but "
                f"image_class_labels.txt gives it class {label}; unpack the download again"
            )
        split = "train" if label <= _LAST_TRAIN_CLASS else "test"
        classes.setdefault(label, ImageClass(label=label, name=name, category="", split=split))
        images.append(
            SourceImage(
                path=root / "images" / relative, key=image_key(relative), label=label, split=split
            )
        )
    if label_of:
        raise InputError(
            f"{root / 'image_class_labels.txt'} gives a class to image {min(label_of)}, which images.txt "
            "does not list; unpack the download again"
        )
    for line in read_lines(root / "classes.txt"):
        class_id, name = line.columns("class_id name")
        if line.integer("class_id", class_id) not in classes:
            raise InputError(
                f"{line.where}: class {name!r} has no images; unpack the download again"
            )
    listing = Listing(
        name="cub",
        description="CUB-200-2011, original images, classes 1–100 train",
        root=root / "images",
        classes=tuple(classes[label] for label in sorted(classes)),
        images=tuple(images),
        expected=_EXPECTED,
    )
    listing.check()
    return listing
