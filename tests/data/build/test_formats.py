"""The readers of original downloads, on miniatures of them: what they find, what they accept and
what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import miniatures
import pytest

from namr_dist.data.build.formats import cars, cub, folder, inshop, sop, vehicleid
from namr_dist.data.build.listing import Listing
from namr_dist.errors import InputError

READERS = [
    (miniatures.sop, sop.read, miniatures.SOP_COUNTS),
    (miniatures.inshop, inshop.read, miniatures.INSHOP_COUNTS),
    (miniatures.cub, cub.read, miniatures.CUB_COUNTS),
    (miniatures.cars_flat, cars.read, miniatures.CARS_COUNTS),
    (miniatures.cars_devkit, cars.read, miniatures.CARS_COUNTS),
    (miniatures.cars_folders, cars.read, miniatures.CARS_COUNTS),
    (miniatures.vehicleid, vehicleid.read, miniatures.VEHICLEID_COUNTS),
    (miniatures.user_folder, folder.read, miniatures.USER_FOLDER_COUNTS),
    (miniatures.user_table, folder.read, miniatures.USER_TABLE_COUNTS),
]
NAMES = [make.__name__ for make, _, _ in READERS]
LISTS = [(make, read) for make, read, _ in READERS[:3]] + [(miniatures.vehicleid, vehicleid.read)]

Make = Callable[[Path], Path]
Read = Callable[[Path], Listing]


def edit(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence, which must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> dict[Make, Path]:
    """All miniatures, each in a folder in one of its own. Not to be changed."""
    return {
        make: make(tmp_path_factory.mktemp(make.__name__) / "unpacked") for make, _, _ in READERS
    }


@pytest.mark.parametrize(("make", "read", "counts"), READERS, ids=NAMES)
def test_every_image_is_listed_once(
    make: Make, read: Read, counts: dict[str, int], downloads: dict[Make, Path]
) -> None:
    source = downloads[make]
    listing = read(source)
    assert listing.counts() == counts
    on_disk = [
        path
        for path in (source if source.is_dir() else source.parent).rglob("*")
        if path.suffix.lower() in (".jpg", ".png", ".webp", ".bmp")
    ]
    assert sorted(image.path for image in listing.images) == sorted(on_disk)
    assert [entry.label for entry in listing.classes] == sorted(
        {image.label for image in listing.images}
    )


@pytest.mark.parametrize(("make", "read", "counts"), READERS[:7], ids=NAMES[:7])
def test_the_folder_above_will_do(
    make: Make, read: Read, counts: dict[str, int], downloads: dict[Make, Path]
) -> None:
    assert read(downloads[make].parent) == read(downloads[make])
    assert read(downloads[make]).root.is_dir()


@pytest.mark.parametrize(
    ("make", "read"), [*LISTS, (miniatures.cars_flat, cars.read)], ids=lambda it: it.__module__
)
def test_two_downloads_in_a_folder_are_ambiguous(
    make: Make, read: Read, downloads: dict[Make, Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(downloads[make])
    with pytest.raises(InputError, match=r"both \S*one and \S*two hold .*; give one of them"):
        read(tmp_path)


@pytest.mark.parametrize(("make", "read"), LISTS, ids=lambda it: it.__module__)
def test_line_ends_blank_lines_and_marks_change_nothing(
    make: Make, read: Read, tmp_path: Path
) -> None:
    source = make(tmp_path)
    before = read(source)
    for path in source.rglob("*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", "  ", ""]).encode())
    assert read(source) == before


def test_differences_give_both_numbers(tmp_path: Path) -> None:
    lines = sop.read(miniatures.sop(tmp_path)).differences()
    assert "train images: 21 found, 59,551 expected" in lines
    assert "test classes: 6 found, 11,316 expected" in lines
    assert "categories: 3 found, 12 expected" in lines
    assert (
        "test_800 classes: 2 found, 800 expected"
        in vehicleid.read(miniatures.vehicleid(tmp_path)).differences()
    )


@pytest.mark.parametrize(("make", "read", "counts"), READERS[:4], ids=NAMES[:4])
def test_published_counts_add_up(
    make: Make, read: Read, counts: dict[str, int], downloads: dict[Make, Path]
) -> None:
    expected = read(downloads[make]).expected
    tested = expected.get("test images") or expected["query images"] + expected["gallery images"]
    assert expected["train images"] + tested == expected["images"]
    assert expected["train classes"] + expected["test classes"] == expected["classes"]
    assert expected.keys() <= counts.keys()


def test_sop_has_the_super_classes_of_its_folders(tmp_path: Path) -> None:
    listing = sop.read(miniatures.sop(tmp_path))
    assert {entry.label: entry.category for entry in listing.classes if entry.split == "train"} == {
        1: "bicycle",
        2: "bicycle",
        3: "coffee_maker",
        4: "coffee_maker",
        5: "toaster",
        6: "toaster",
    }
    assert listing.images[0].key == "bicycle_final__111085122872_0"


def test_inshop_tells_query_gallery_and_colour(tmp_path: Path) -> None:
    listing = inshop.read(miniatures.inshop(tmp_path))
    of_item = {
        image.key: (image.split, image.role, image.group)
        for image in listing.images
        if image.label in (3, 4)
    }
    prefix = {3: "WOMEN__Dresses__id_00000003__", 4: "MEN__Denim__id_00000004__"}
    assert of_item == {
        prefix[3] + "01_1_front": ("train", "", "01"),
        prefix[3] + "01_2_side": ("train", "", "01"),
        prefix[3] + "02_3_back": ("train", "", "02"),
        prefix[3] + "02_7_additional": ("train", "", "02"),
        prefix[4] + "01_1_front": ("test", "query", "01"),
        prefix[4] + "01_2_side": ("test", "gallery", "01"),
        prefix[4] + "02_3_back": ("test", "query", "02"),
        prefix[4] + "02_7_additional": ("test", "gallery", "02"),
        prefix[4] + "02_4_full": ("test", "query", "02"),
    }


def test_inshop_item_in_two_categories_is_of_the_larger(tmp_path: Path) -> None:
    listing = inshop.read(miniatures.inshop(tmp_path))
    keys = [image.key for image in listing.images if image.label == 2]
    assert sum(key.startswith("WOMEN__Blouses_Shirts") for key in keys) == 5
    assert sum(key.startswith("MEN__Denim") for key in keys) == 4
    assert {entry.category for entry in listing.classes if entry.label == 2} == {
        "WOMEN/Blouses_Shirts"
    }


def test_inshop_image_tree_is_named_and_chosen(tmp_path: Path) -> None:
    root = miniatures.inshop(tmp_path, highres=True)
    small, large = inshop.read(root), inshop.read(root, highres=True)
    assert small.description.endswith("image tree img") and large.description.endswith(
        "image tree img_highres"
    )
    assert {image.path.relative_to(root).parts[:2] for image in small.images} == {("Img", "img")}
    assert {image.path.relative_to(root).parts[:2] for image in large.images} == {
        ("Img", "img_highres")
    }
    assert [image.key for image in small.images] == [image.key for image in large.images]
    shutil.rmtree(root / "Img" / "img")
    assert inshop.read(root) == large
    shutil.rmtree(root / "Img" / "img_highres")
    with pytest.raises(
        InputError, match="none of .*Img/img, .*/img, .*img_highres.* is a folder; unpack"
    ):
        inshop.read(root)


def test_inshop_list_and_images_may_lie_in_the_root(tmp_path: Path) -> None:
    root = miniatures.inshop(tmp_path)
    before = inshop.read(root).counts()
    (root / "Eval" / "list_eval_partition.txt").rename(root / "list_eval_partition.txt")
    (root / "Img" / "img").rename(root / "img")
    assert inshop.read(root).counts() == before
    with pytest.raises(InputError, match="img_highres is a folder; unpack img_highres.zip there"):
        inshop.read(root, highres=True)


def test_cub_has_names_and_ignores_the_classification_split(tmp_path: Path) -> None:
    root = miniatures.cub(tmp_path)
    (root / "train_test_split.txt").unlink()
    classes = {entry.label: (entry.name, entry.split) for entry in cub.read(root).classes}
    assert classes[100] == ("White_Pelican", "train") and classes[101] == (
        "Western_Wood_Pewee",
        "test",
    )


def test_cub_of_2010_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "files.txt").write_text("001.Black_footed_Albatross/1.jpg\n")
    with pytest.raises(InputError, match="edition of 2010.*; download CUB_200_2011"):
        cub.read(tmp_path)
    root = miniatures.cub(tmp_path / "new")
    (root / "images.txt").write_text(
        "".join(f"{number} 001.X/{number}.jpg\n" for number in range(1, 6_034))
    )
    with pytest.raises(InputError, match="lists 6,033 images, as the edition of 2010"):
        cub.read(root)


def test_vehicleid_test_lists_are_subsets(tmp_path: Path) -> None:
    listing = vehicleid.read(miniatures.vehicleid(tmp_path))
    label_of = {image.key: image.label for image in listing.images}
    assert {
        name: sorted({label_of[key] for key in keys}) for name, keys in listing.subsets.items()
    } == {
        "test_800": [101, 102],
        "test_1600": [101, 103, 104],
        "test_2400": [102, 103, 104, 105, 106],
    }
    assert {image.split for image in listing.images if image.label > 100} == {"test"}


REFUSED = [
    (
        miniatures.sop,
        sop.read,
        "Ebay_train.txt",
        "super_class_id path",
        "path",
        "line 1 is '.*', not the header",
    ),
    (
        miniatures.sop,
        sop.read,
        "Ebay_train.txt",
        "2 1 1 bicycle_final/111085122872_1.JPG",
        "2 1 1",
        "Ebay_train.txt, line 3 has 3 columns",
    ),
    (
        miniatures.sop,
        sop.read,
        "Ebay_test.txt",
        "22 11319 1",
        "22 1a 1",
        "line 2: class_id is '1a', not a whole",
    ),
    (
        miniatures.sop,
        sop.read,
        "Ebay_test.txt",
        "22 11319 1",
        "22 3 1",
        "line 2: class 3 lies in 'bicycle', and in",
    ),
    (
        miniatures.sop,
        sop.read,
        "Ebay_test.txt",
        "22 11319 1",
        "22 1 1",
        "its class 1 is of 'train'; splits may share",
    ),
    (
        miniatures.sop,
        sop.read,
        "Ebay_test.txt",
        "22 11319 1 bicycle_final",
        "22 11319 1 /bicycle_final",
        "line 2: '/bicycle_final/.*' is no path inside",
    ),
    (
        miniatures.sop,
        sop.read,
        "Ebay_train.txt",
        "2 1 1 bicycle_final/111085122872_1.JPG",
        "2 1 1 bicycle_final/111085122872_0.JPG",
        "share a name, the first 'bicycle_final__111085122872_0'",
    ),
    (
        miniatures.sop,
        sop.read,
        "Ebay_train.txt",
        "111085122872_0.JPG",
        "a b.JPG",
        "images are missing: .*a b.JPG",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        "49",
        "50",
        "lists 49 images, but its line 1 says 50",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        "49\n",
        "",
        "the number of images is 'image_name item_id",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        "item_id",
        "attribute",
        "line 2 is .* the header",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        "query",
        "probe",
        "line 3: evaluation_status is",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        "query",
        "",
        "line 3 has 2 columns",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        "query",
        "train",
        "splits may share no class",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        " id_00000002",
        " id_00000004",
        "line 3: .* is not img/…/…/id_00000004/….jpg",
    ),
    (
        miniatures.inshop,
        inshop.read,
        "Eval/list_eval_partition.txt",
        " id_00000002",
        " item2",
        "item_id is 'item2'",
    ),
    (
        miniatures.cub,
        cub.read,
        "images.txt",
        "2 001.",
        "1 001.",
        "line 2: image 1 is listed twice or has no class",
    ),
    (
        miniatures.cub,
        cub.read,
        "images.txt",
        "1 001.",
        "1 002.",
        "image 1 lies in '002.*gives it class 1",
    ),
    (
        miniatures.cub,
        cub.read,
        "images.txt",
        "1 001.",
        "1 birds",
        "the number of the class folder is",
    ),
    (
        miniatures.cub,
        cub.read,
        "image_class_labels.txt",
        "2 1\n",
        "1 1\n",
        "line 2 lists image 1 a second time",
    ),
    (
        miniatures.cub,
        cub.read,
        "image_class_labels.txt",
        "36 200",
        "36 200\n37 200",
        "gives a class to image 37, which images.txt does not list",
    ),
    (
        miniatures.cub,
        cub.read,
        "image_class_labels.txt",
        "36 200",
        "",
        "line 36: image 36 .* has no class",
    ),
    (
        miniatures.cub,
        cub.read,
        "classes.txt",
        "1 001.",
        "5 005.Crested_Auklet\n1 001.",
        "class '005.Crested_Auklet' has no images",
    ),
    (
        miniatures.vehicleid,
        vehicleid.read,
        "train_test_split/train_list.txt",
        "0003001",
        "0003000",
        "line 2 lists image 0003000 a second time",
    ),
    (
        miniatures.vehicleid,
        vehicleid.read,
        "train_test_split/test_list_1600.txt",
        "0303000 101",
        "0003000 1",
        "vehicle 1 is both in train_list.txt and in test_list_1600.txt",
    ),
    (
        miniatures.vehicleid,
        vehicleid.read,
        "train_test_split/test_list_1600.txt",
        "0303000 101",
        "0303000 103",
        "image 303000 shows vehicle 103, another list that it shows 101",
    ),
    (
        miniatures.vehicleid,
        vehicleid.read,
        "train_test_split/test_list_800.txt",
        "0303000 101",
        "0303000 101 7",
        "vehicle_id is '101 7'",
    ),
]


@pytest.mark.parametrize(
    ("make", "read", "file", "old", "new", "message"), REFUSED, ids=[row[-1] for row in REFUSED]
)
def test_contradictory_lists_are_refused(
    make: Make, read: Read, file: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    edit(source / file, old, new)
    with pytest.raises(InputError, match=message):
        read(source)


@pytest.mark.parametrize(("make", "read"), LISTS, ids=lambda it: it.__module__)
def test_lists_that_are_gone_empty_or_no_text_are_named(
    make: Make, read: Read, tmp_path: Path
) -> None:
    source = make(tmp_path / "download")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=r"no .*\.txt.* in \S*empty or in a folder in it; give the folder"
    ):
        read(tmp_path / "empty")
    path = max(
        source.rglob("*.txt"),
        key=lambda path: (
            path.name in ("Ebay_test.txt", "test_list_2400.txt", "classes.txt"),
            path.name,
        ),
    )
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=f"{path.name} cannot be read as a list"):
        read(source)
    path.write_text("\n")
    with pytest.raises(InputError, match=f"{path.name} is empty"):
        read(source)
    with pytest.raises(InputError, match="is no folder; unpack"):
        read(path)


def test_missing_images_are_counted_and_ten_named(tmp_path: Path) -> None:
    listing = sop.read(miniatures.sop(tmp_path))
    gone = [image.path for image in listing.images[5:17]]
    for path in gone:
        path.unlink()
    with pytest.raises(
        InputError, match="12 of 42 listed images are missing: .* and 2 more"
    ) as caught:
        sop.read(tmp_path)
    assert [str(path) in str(caught.value) for path in gone] == [True] * 10 + [False] * 2
