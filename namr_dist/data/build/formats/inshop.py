"""In-Shop Clothes Retrieval (DeepFashion): 52,712 images of 7,982 garments; queries search the
gallery.

Source: Liu et al., DeepFashion: Powering Robust Clothes Recognition and Retrieval with Rich
Annotations, CVPR 2016. Read is list_eval_partition.txt, and either image tree: img (256 px) or
img_highres. Results differ between the two.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from namr_dist.data.build.formats.lists import (
    Line,
    after_header,
    find_list,
    image_key,
    read_lines,
    relative_path,
)
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.shardset.manifest import ImageClass
from namr_dist.errors import InputError

_LIST = "list_eval_partition.txt"
_HEADER = "image_name item_id evaluation_status"
_ROLE_OF = {"train": "", "query": "query", "gallery": "gallery"}
_EXPECTED = {
    "images": 52_712,
    "classes": 7_982,
    "train images": 25_882,
    "train classes": 3_997,
    "test classes": 3_985,
    "query images": 14_218,
    "query classes": 3_985,
    "gallery images": 12_612,
    "gallery classes": 3_985,
}


def read(source: Path, *, highres: bool = False) -> Listing:
    """Labels are the item numbers, groups the colours; `test` holds the queries and the gallery,
    told apart by role.

    Some items lie in two categories; theirs is the one with more images. The image tree is img,
    unless only img_highres is there or `highres` asks for it; the description names it, the keys do
    not. `source` is the folder of the list, of Eval/ and Img/, or one above. Raises InputError for
    a list that is missing, damaged or contradictory, and for images that are not there.
    """
    path = find_list(source, _LIST, f"Eval/{_LIST}")
    root = path.parent.parent if path.parent.name == "Eval" else path.parent
    tree = _image_tree(root, highres)
    splits: dict[int, str] = {}
    categories: dict[int, Counter[str]] = {}
    images = []
    for line in _image_lines(path):
        image_name, item_id, status = line.columns(_HEADER, path_first=True)
        relative = relative_path(image_name, line.where)
        label = line.integer("item_id", item_id.removeprefix("id_"))
        if status not in _ROLE_OF:
            raise InputError(
                f"{line.where}: evaluation_status is {status!r}, not train, query or gallery; "
                "unpack the download again"
            )
        if relative.parts[0] != "img" or len(relative.parts) != 5 or relative.parts[3] != item_id:
            raise InputError(
                f"{line.where}: {image_name!r} is not img/…/…/{item_id}/….jpg; unpack the download again"
            )
        split = "train" if status == "train" else "test"
        splits.setdefault(label, split)
        categories.setdefault(label, Counter())["/".join(relative.parts[1:3])] += 1
        inside = relative.relative_to("img")
        images.append(
            SourceImage(
                path=tree / inside,
                key=image_key(inside),
                label=label,
                split=split,
                role=_ROLE_OF[status],
                group=relative.name.split("_")[0],
            )
        )
    classes = tuple(
        ImageClass(
            label=label,
            name=f"id_{label:08d}",
            category=_most_common(categories[label]),
            split=splits[label],
        )
        for label in sorted(splits)
    )
    listing = Listing(
        name="inshop",
        description=f"DeepFashion In-Shop Clothes Retrieval, image tree {tree.name}",
        root=tree.parent,
        classes=classes,
        images=tuple(images),
        expected=_EXPECTED,
    )
    listing.check()
    return listing


def _image_tree(root: Path, highres: bool) -> Path:
    trees = [folder / name for name in ("img", "img_highres") for folder in (root / "Img", root)]
    there = [tree for tree in trees if tree.is_dir() and not (highres and tree.name == "img")]
    if not there:
        wanted = [str(tree) for tree in trees if not (highres and tree.name == "img")]
        raise InputError(
            f"no image tree in {root}: none of {', '.join(wanted)} is a folder; unpack "
            f"{'img_highres.zip' if highres else 'img.zip or img_highres.zip'} there"
        )
    return there[0]


def _image_lines(path: Path) -> list[Line]:
    first, *rest = read_lines(path)
    count = first.integer("the number of images", first.text)
    lines = after_header(path, rest, _HEADER)
    if count != len(lines):
        raise InputError(
            f"{path} lists {len(lines):,} images, but its line 1 says {count:,}; unpack the download "
            "again"
        )
    return lines


def _most_common(categories: Counter[str]) -> str:
    return min(categories, key=lambda name: (-categories[name], name))
