"""Cars196 in its three layouts: the same images, the same classes, the same split."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import miniatures
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from namr_dist.data.build.formats import cars
from namr_dist.data.build.listing import Listing
from namr_dist.errors import InputError


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Not to be changed."""
    root = tmp_path_factory.mktemp("cars")
    return {
        make.__name__: make(root / make.__name__)
        for make in (miniatures.cars_flat, miniatures.cars_devkit, miniatures.cars_folders)
    }


@pytest.fixture
def devkit(layouts: dict[str, Path], tmp_path: Path) -> Path:
    """The devkit layout, for a test that changes its annotations; the images are links."""
    for name in ("cars_train", "cars_test"):
        (tmp_path / name).symlink_to(layouts["cars_devkit"] / name)
    shutil.copytree(layouts["cars_devkit"] / "devkit", tmp_path / "devkit")
    return tmp_path


def labels_by_content(listing: Listing) -> dict[str, int]:
    """Class of each image by the hash of its file: independent of file names."""
    return {
        hashlib.sha256(image.path.read_bytes()).hexdigest(): image.label for image in listing.images
    }


def change(path: Path, keep: Callable[[int], bool], shift: int = 0) -> None:
    """Keep the annotations whose class passes, and shift their class."""
    contents = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
    rows = contents["annotations"]
    kept = rows[:, [keep(int(value.item())) for value in rows["class"][0]]]
    for position in range(kept.shape[1]):
        kept["class"][0, position] = kept["class"][0, position].astype(np.int16) + shift
    savemat(path, {**contents, "annotations": kept})


def test_layouts_agree(layouts: dict[str, Path]) -> None:
    flat, devkit, folders = (cars.read(path) for path in layouts.values())
    assert labels_by_content(flat) == labels_by_content(devkit)
    assert flat.classes == devkit.classes
    names = [{entry.label: entry.name for entry in listing.classes} for listing in (flat, folders)]
    by_name = [
        {content: names[position][label] for content, label in labels_by_content(listing).items()}
        for position, listing in enumerate((flat, folders))
    ]
    assert by_name[0] == by_name[1]
    # Sorted folder names move models within their make, never over the border between the splits.
    assert names[0] != names[1]
    assert {name for label, name in names[0].items() if label <= 98} == {
        entry.name for entry in folders.classes if entry.split == "train"
    }
    assert [listing.description.split(", ")[2] for listing in (flat, devkit, folders)] == [
        "flat layout",
        "devkit layout",
        "class folder layout",
    ]


def test_classes_are_ordered_by_id(layouts: dict[str, Path]) -> None:
    listing = cars.read(layouts["cars_flat"])
    assert [entry.name for entry in listing.classes] == miniatures.car_names()
    assert [entry.split for entry in listing.classes] == ["train"] * 98 + ["test"] * 98
    assert listing.images[0].label != 1


def test_one_level_of_class_folders(layouts: dict[str, Path], tmp_path: Path) -> None:
    listing = cars.read(layouts["cars_folders"] / "train")
    assert listing.counts()["train images"] == 99 and listing.counts()["classes"] == 196
    (tmp_path / "cars").symlink_to(layouts["cars_folders"] / "train")
    assert cars.read(tmp_path).classes == listing.classes


def test_no_layout_at_all(tmp_path: Path) -> None:
    (tmp_path / "car_ims.tgz").write_bytes(b"")
    with pytest.raises(InputError, match="no devkit, cars_annos.mat, train or class folder in"):
        cars.read(tmp_path)


def test_devkit_beside_the_flat_layout(layouts: dict[str, Path], devkit: Path) -> None:
    shutil.copy(layouts["cars_flat"] / "cars_annos.mat", devkit)
    assert "devkit layout" in cars.read(devkit).description
    (devkit / "car_ims").symlink_to(layouts["cars_flat"] / "car_ims")
    assert "flat layout" in cars.read(devkit).description


def test_labels_of_the_test_images(devkit: Path) -> None:
    before = cars.read(devkit)
    with_labels = devkit / "devkit" / "cars_test_annos_withlabels.mat"
    with_labels.rename(devkit / with_labels.name)
    assert cars.read(devkit) == before
    (devkit / with_labels.name).rename(devkit / "aside.mat")
    with pytest.raises(
        InputError, match="cars_test_annos.mat has no classes; get cars_test_annos_withlabels.mat"
    ):
        cars.read(devkit)
    (devkit / "aside.mat").rename(devkit / "devkit" / "cars_test_annos.mat")
    assert cars.read(devkit) == before


def test_names_are_not_needed(devkit: Path) -> None:
    (devkit / "devkit" / "cars_meta.mat").unlink()
    assert [entry.name for entry in cars.read(devkit).classes] == [
        str(label) for label in range(1, 197)
    ]


def test_class_without_images(devkit: Path) -> None:
    for name in ("cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        change(devkit / "devkit" / name, lambda label: label != 7)
    with pytest.raises(InputError, match=r"class 7 \('Make00 Model0 Sedan 2012'\) has no images"):
        cars.read(devkit)


@pytest.mark.parametrize(
    ("shift", "message"), [(-1, "annotation [0-9]+: the class is '0'"), (1, "have class 197")]
)
def test_shifted_classes(devkit: Path, shift: int, message: str) -> None:
    change(devkit / "devkit" / "cars_train_annos.mat", lambda label: True, shift=shift)
    with pytest.raises(InputError, match=message):
        cars.read(devkit)


def test_damaged_annotations(devkit: Path) -> None:
    path = devkit / "devkit" / "cars_train_annos.mat"
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        whole[:200] + b"\0" * 50 + whole[250:],
        b"<html>" * 99,
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match="cars_train_annos.mat (cannot be read|has no annotations)"
        ):
            cars.read(devkit)
    savemat(path, {"other": 1})
    with pytest.raises(InputError, match="no annotations with the field 'fname'"):
        cars.read(devkit)
