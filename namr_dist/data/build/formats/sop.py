"""Stanford Online Products (SOP): 120,053 images of 22,634 products in 12 super-classes.

Source: Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016. Read
are Ebay_train.txt and Ebay_test.txt, beside the folders of images.
"""

from __future__ import annotations

from pathlib import Path

from namr_dist.data.build.formats.lists import (
    after_header,
    find_list,
    image_key,
    read_lines,
    relative_path,
)
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.shardset.manifest import ImageClass
from namr_dist.errors import InputError

_HEADER = "image_id class_id super_class_id path"
_EXPECTED = {
    "images": 120_053,
    "classes": 22_634,
    "categories": 12,
    "train images": 59_551,
    "train classes": 11_318,
    "test images": 60_502,
    "test classes": 11_316,
}


def read(source: Path) -> Listing:
    """Labels are the class ids, categories the super-classes by the names of their folders
    ("bicycle").

    `source` is Stanford_Online_Products or the folder that holds it. Raises InputError for lists
    that are missing, damaged or contradictory, and for images that are not there.
    """
    root = find_list(source, "Ebay_train.txt").parent
    classes: dict[int, ImageClass] = {}
    images = []
    for split in ("train", "test"):
        path = root / f"Ebay_{split}.txt"
        for line in after_header(path, read_lines(path), _HEADER):
            image_id, class_id, super_class_id, file = line.columns(_HEADER)
            line.integer("image_id", image_id)
            line.integer("super_class_id", super_class_id)
            label = line.integer("class_id", class_id)
            relative = relative_path(file, line.where)
            category = relative.parts[0].removesuffix("_final")
            known = classes.setdefault(
                label, ImageClass(label=label, name=str(label), category=category, split=split)
            )
            if known.category != category:
                raise InputError(
                    f"{line.where}: class {label} lies in {category!r}, and in {known.category!r} before; "
                    "unpack the download again"
                )
            images.append(
                SourceImage(path=root / relative, key=image_key(relative), label=label, split=split)
            )
    listing = Listing(
        name="sop",
        description="Stanford Online Products, original images",
        root=root,
        classes=tuple(classes[label] for label in sorted(classes)),
        images=tuple(images),
        expected=_EXPECTED,
    )
    listing.check()
    return listing
