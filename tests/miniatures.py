"""Every original download in small: the same files, columns and .mat structures, with few and tiny
images.

Each function fills a folder, which it makes, and returns what a reader is given. The counts beside
it are of what it writes, in the words of `Listing.counts()`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import simplejpeg
from conftest import picture
from PIL import Image
from scipy.io import savemat

SOP_COUNTS = {
    "train images": 21,
    "train classes": 6,
    "test images": 21,
    "test classes": 6,
    "images": 42,
    "classes": 12,
    "categories": 3,
}
INSHOP_COUNTS = {
    "train images": 20,
    "train classes": 5,
    "test images": 29,
    "test classes": 5,
    "query images": 14,
    "query classes": 5,
    "gallery images": 15,
    "gallery classes": 5,
    "images": 49,
    "classes": 10,
    "categories": 3,
}
CUB_COUNTS = {
    "train images": 18,
    "train classes": 5,
    "test images": 18,
    "test classes": 5,
    "images": 36,
    "classes": 10,
    "categories": 0,
}
CARS_COUNTS = {
    "train images": 197,
    "train classes": 98,
    "test images": 196,
    "test classes": 98,
    "images": 393,
    "classes": 196,
    "categories": 0,
}
VEHICLEID_COUNTS = {
    "train images": 18,
    "train classes": 6,
    "test images": 18,
    "test classes": 6,
    "test_800 images": 6,
    "test_800 classes": 2,
    "test_1600 images": 9,
    "test_1600 classes": 3,
    "test_2400 images": 15,
    "test_2400 classes": 5,
    "images": 36,
    "classes": 12,
    "categories": 0,
}
USER_FOLDER_COUNTS = {
    "train images": 12,
    "train classes": 3,
    "test images": 12,
    "test classes": 3,
    "images": 24,
    "classes": 6,
    "categories": 0,
}
USER_TABLE_COUNTS = {
    "train images": 9,
    "train classes": 3,
    "val images": 6,
    "val classes": 2,
    "test images": 9,
    "test classes": 3,
    "query images": 3,
    "query classes": 3,
    "gallery images": 3,
    "gallery classes": 3,
    "images": 24,
    "classes": 8,
    "categories": 2,
}


def sop(folder: Path, classes: int = 6) -> Path:
    """Stanford_Online_Products: so many classes of 2 to 5 images in each split; one image is
    greyscale."""
    folders = {1: "bicycle_final", 4: "coffee_maker_final", 12: "toaster_final"}
    lines = ["image_id class_id super_class_id path"]
    for split, first in (("train", 1), ("test", 11319)):
        start = len(lines)
        for label in range(first, first + classes):
            super_class = list(folders)[(label - first) * len(folders) // classes]
            for view in range(2 + label % 4):
                path = f"{folders[super_class]}/{111085122871 + label}_{view}.JPG"
                lines.append(f"{len(lines)} {label} {super_class} {path}")
                _jpeg(folder / path, label, view, grey=label == view == 1)
        _text(folder / f"Ebay_{split}.txt", [lines[0], *lines[start:]])
    _text(folder / "Ebay_info.txt", lines)
    return folder


def inshop(folder: Path, highres: bool = False) -> Path:
    """In-shop Clothes Retrieval Benchmark: 10 items in two colours; with `highres`, both image
    trees.

    As in the original, an item may lie in two categories, with the same file name in both.
    """
    categories = ("WOMEN/Dresses", "MEN/Denim", "WOMEN/Blouses_Shirts")
    views = ("1_front", "2_side", "3_back", "7_additional")
    rows = []
    for item in range(2, 12):
        for position, view in enumerate(views):
            status = "train" if item % 2 else ("query", "gallery")[position % 2]
            rows.append((categories[item % 3], item, f"{1 + position // 2:02d}_{view}", status))
        if item % 2 == 0:
            rows.append(
                (categories[item % 3], item, "02_4_full", "query" if item < 10 else "gallery")
            )
    rows += [
        (categories[1], 2, name, "gallery") for name in ("01_1_front", "02_4_full", "03_1_front")
    ]
    rows.append((categories[1], 2, "03_2_side", "gallery"))
    lines = [str(len(rows)), "image_name item_id evaluation_status"]
    for number, (category, item, name, status) in enumerate(rows):
        path = f"{category}/id_{item:08d}/{name}.jpg"
        lines.append(
            f"{'img/' + path:<{60 + number % 3}} {f'id_{item:08d}':<{12 + number % 2}} {status:<8}"
        )
        _jpeg(folder / "Img" / "img" / path, item, number)
        if highres:
            _jpeg(folder / "Img" / "img_highres" / path, item, number, size=64)
    _text(folder / "Eval" / "list_eval_partition.txt", lines)
    return folder


def cub(folder: Path) -> Path:
    """CUB_200_2011: 10 of the 200 classes, on both sides of the border between 100 and 101."""
    names = (
        "Black_footed_Albatross",
        "Laysan_Albatross",
        "Sooty_Albatross",
        "Brown_Pelican",
        "White_Pelican",
        "Western_Wood_Pewee",
        "Sayornis",
        "American_Pipit",
        "Winter_Wren",
        "Common_Yellowthroat",
    )
    labels = (1, 2, 3, 99, 100, 101, 102, 103, 199, 200)
    images, image_labels, split = [], [], []
    for label, name in zip(labels, names, strict=True):
        for view in range(3 + label % 2):
            number = len(images) + 1
            path = f"{label:03d}.{name}/{name.title()}_{view + 1:04d}_{796097 + number}.jpg"
            images.append(f"{number} {path}")
            image_labels.append(f"{number} {label}")
            split.append(f"{number} {view % 2}")
            _jpeg(folder / "images" / path, label, view)
    _text(folder / "images.txt", images)
    _text(folder / "image_class_labels.txt", image_labels)
    _text(folder / "train_test_split.txt", split)
    _text(
        folder / "classes.txt",
        [f"{label} {label:03d}.{name}" for label, name in zip(labels, names, strict=True)],
    )
    return folder


def car_names() -> list[str]:
    """196 class names in the order of their ids: sorted by make, but not within one, as the
    original's are."""
    return [
        f"Make{make:02d} Model{6 - model} Sedan 2012" for make in range(28) for model in range(7)
    ]


def cars_flat(folder: Path) -> Path:
    """car_ims/ and cars_annos.mat: 196 classes of two images, the first of three; classes come in
    no order."""
    rows = _cars()
    for number, (label, view) in enumerate(rows, 1):
        _jpeg(folder / "car_ims" / f"{number:06d}.jpg", label, view, size=40)
    _annotations(
        folder / "cars_annos.mat",
        {
            "relative_im_path": [f"car_ims/{number:06d}.jpg" for number in range(1, len(rows) + 1)],
            **_boxes(len(rows)),
            "class": [label for label, _ in rows],
            "test": [view % 2 for _, view in rows],
        },
        names=True,
    )
    return folder


def cars_devkit(folder: Path) -> Path:
    """devkit/, cars_train/ and cars_test/, with both annotations of the test images: without labels
    and with them."""
    for split, part in (("train", 0), ("test", 1)):
        rows = [(label, view) for label, view in _cars() if view % 2 == part]
        for number, (label, view) in enumerate(rows, 1):
            _jpeg(folder / f"cars_{split}" / f"{number:05d}.jpg", label, view, size=40)
        labels = {"class": [label for label, _ in rows]}
        files = {"fname": [f"{number:05d}.jpg" for number in range(1, len(rows) + 1)]}
        name = f"cars_{split}_annos"
        _annotations(
            folder / "devkit" / f"{name}.mat",
            {**_boxes(len(rows)), **(labels if split == "train" else {}), **files},
        )
        if split == "test":
            _annotations(
                folder / "devkit" / f"{name}_withlabels.mat",
                {**_boxes(len(rows)), **labels, **files},
            )
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": _cell(car_names())})
    return folder


def cars_folders(folder: Path) -> Path:
    """train/CLASS/ and test/CLASS/, named by class; file numbers start anew in both."""
    names = car_names()
    for split, part in (("train", 0), ("test", 1)):
        for number, (label, view) in enumerate([row for row in _cars() if row[1] % 2 == part], 1):
            _jpeg(folder / split / names[label - 1] / f"{number:05d}.jpg", label, view, size=40)
    return folder


def vehicleid(folder: Path) -> Path:
    """VehicleID_V1.0: 12 vehicles of three images; the test lists overlap without holding one
    another."""
    lists = {
        "train_list": range(1, 7),
        "test_list_800": (101, 102),
        "test_list_1600": (101, 103, 104),
        "test_list_2400": (102, 103, 104, 105, 106),
    }
    for name, vehicles in lists.items():
        lines = []
        for vehicle in vehicles:
            for view in range(3):
                image = 3000 * vehicle + view
                lines.append(f"{image:07d} {vehicle}")
                _jpeg(folder / "image" / f"{image:07d}.jpg", vehicle, view)
        _text(folder / "train_test_split" / f"{name}.txt", lines)
    return folder


def user_folder(folder: Path) -> Path:
    """CLASS/IMAGE: 6 classes of a JPEG, a PNG, a WebP and a BMP, and files that are no images."""
    for label, name in enumerate(
        ("armchair", "bench", "chair", "desk lamp", "étagère", "floor.lamp")
    ):
        for view, ending in enumerate((".jpg", ".PNG", ".webp", ".bmp")):
            path = folder / name / f"view {view}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_pixels(label, view)).save(path)
        _text(folder / name / "notes.txt", ["no image"])
    _text(folder / "README.md", ["no image"])
    return folder


def user_table(folder: Path) -> Path:
    """products.csv with all columns, and its images: 3 + 2 + 3 classes of three, in two
    categories."""
    rows = []
    for label in range(8):
        split = ("train", "val", "test")[label // 3 if label < 3 else 1 if label < 5 else 2]
        for view in range(3):
            path = f"pictures/{'left' if label % 2 else 'right'}/{label}-{view}.jpg"
            flags = (
                [view != 2, view != 1]
                if split == "test"
                else ["", ""]
                if split == "train"
                else [1, 1]
            )
            rows.append(
                [
                    path,
                    f"product {label}",
                    split,
                    *(str(flag).lower() for flag in flags),
                    ("seats", "tables")[label % 2],
                    f"colour {view % 2}",
                ]
            )
            _jpeg(folder / path, label, view)
    with open(folder / "products.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "is_query", "is_gallery", "category", "group"])
        writer.writerows(rows)
    return folder / "products.csv"


def _pixels(label: int, view: int, size: int = 48) -> np.ndarray:
    """uint8 (H, W, 3), not square."""
    return picture(label, view, size=size)[: size - 8]


def _jpeg(path: Path, label: int, view: int, *, size: int = 48, grey: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = _pixels(label, view, size)
    path.write_bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels[..., :1]), colorspace="GRAY", colorsubsampling="Gray"
        )
        if grey
        else simplejpeg.encode_jpeg(pixels, quality=90)
    )


def _text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cars() -> list[tuple[int, int]]:
    """(class id, view) of every image, in no order of classes."""
    rows = [(label, view) for label in range(1, 197) for view in range(3 if label == 1 else 2)]
    return [rows[position] for position in np.random.default_rng(196).permutation(len(rows))]


def _boxes(count: int) -> dict[str, list[int]]:
    return {
        f"bbox_{side}": [1 + position] * count
        for position, side in enumerate(("x1", "y1", "x2", "y2"))
    }


def _annotations(path: Path, fields: dict[str, list], *, names: bool = False) -> None:
    """A 1×N struct array of 1×1 numbers and strings, as MATLAB wrote the originals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.empty((1, len(next(iter(fields.values())))), [(name, object) for name in fields])
    for name, values in fields.items():
        for position, value in enumerate(values):
            array[name][0, position] = (
                value if isinstance(value, str) else np.array([[value]], np.uint8)
            )
    savemat(
        path,
        {"annotations": array, **({"class_names": _cell(car_names())} if names else {})},
        do_compression=True,
    )


def _cell(names: list[str]) -> np.ndarray:
    return np.array([names], object)
