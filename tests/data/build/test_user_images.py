"""A user's own images, as folders of classes and as a table."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import miniatures
import pytest

from namr_dist.data.build.formats import folder
from namr_dist.errors import InputError


def put(root: Path, *names: str) -> Path:
    """Files of these names; what is in them, no reader sees."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"image")
    return root


def test_first_half_of_the_classes_trains(tmp_path: Path) -> None:
    listing = folder.read(put(tmp_path, *(f"{name}/1.jpg" for name in "ecbda")))
    assert [(entry.label, entry.name, entry.split) for entry in listing.classes] == [
        (0, "a", "train"),
        (1, "b", "train"),
        (2, "c", "train"),
        (3, "d", "test"),
        (4, "e", "test"),
    ]
    assert "of 5 sorted classes the first 3 train" in listing.description


def test_folders_of_splits_and_roles(tmp_path: Path) -> None:
    listing = folder.read(
        put(tmp_path, "train/a/1.jpg", "val/b/1.JPG", "query/c/1.png", "gallery/c/1.png")
    )
    assert [
        (image.key, image.split, image.role)
        for image in sorted(listing.images, key=lambda it: it.key)
    ] == [
        ("gallery__c__1", "test", "gallery"),
        ("query__c__1", "test", "query"),
        ("train__a__1", "train", ""),
        ("val__b__1", "val", ""),
    ]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    listing = folder.read(put(tmp_path, "train/1.jpg", "bus/1.jpg"))
    assert [(entry.name, entry.split) for entry in listing.classes] == [
        ("bus", "train"),
        ("train", "test"),
    ]


def test_keys_are_unique_whatever_the_order(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "a/1.png", "a/1-2.jpg", "b.c/x.y.jpg", "b.c/x_y.jpg", "b_c/x_y.bmp")
    assert {
        str(image.path.relative_to(tmp_path)): image.key for image in folder.read(tmp_path).images
    } == {
        "a/1-2.jpg": "a__1-2",
        "a/1.jpg": "a__1",
        "a/1.png": "a__1-3",
        "b.c/x.y.jpg": "b_c__x_y",
        "b.c/x_y.jpg": "b_c__x_y-2",
        "b_c/x_y.bmp": "b_c__x_y-3",
    }


def test_hidden_and_other_files_are_no_images(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", "a/._1.jpg", "a/notes.txt", "b/1.webp", ".cache/1.jpg", "list.txt")
    assert folder.read(tmp_path).counts()["images"] == 2


def test_images_of_other_kinds_are_counted_by_ending(tmp_path: Path) -> None:
    listing = folder.read(
        put(
            tmp_path,
            "a/1.jpg",
            "a/2.JFIF",
            "a/3.heic",
            "a/4.HEIC",
            "b/1.jpg",
            "b/2.gif",
            "b/._3.gif",
            "b/notes.txt",
        )
    )
    assert len(listing.images) == 3
    assert [note.split(" files")[0] for note in listing.notes] == ["1 .gif", "2 .heic"]
    assert folder.read(put(tmp_path / "plain", "a/1.jpg", "b/1.jpg")).notes == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.jpg", "test/b/1.jpg", "c/d/1.jpg"], "d is a folder in the class folder 'c'"),
        (
            ["train/a/1.jpg", "test/a/2.jpg"],
            "train/a: class 'a' is of split 'train' here and of 'test' elsewhere",
        ),
        (["a/1.jpg", "b/notes.txt"], "class 'b' has no images"),
        (["a/1.jpg", "2.jpg"], "2.jpg lies in no class folder"),
        (["a/more/1.jpg", "b/1.jpg"], "more is a folder in the class folder 'a'"),
        (["notes.txt"], "has no class folders"),
    ],
)
def test_impossible_folders_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        folder.read(put(tmp_path, *names))


def test_names_in_another_encoding_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a/1.jpg", os.fsdecode(b"b/caf\xe9.jpg"))
    with pytest.raises(InputError, match=r"'caf\\udce9.jpg' in .* is no UTF-8; rename it"):
        folder.read(tmp_path)


def test_neither_folder_nor_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder nor a .csv file"):
        folder.read(tmp_path / "x.json")
    with pytest.raises(InputError, match="there is no file .*/x.csv; give"):
        folder.read(tmp_path / "x.csv")


def table(root: Path, text: str) -> Path:
    put(root, *(f"{name}.jpg" for name in "abcd"))
    (root / "list.csv").write_text(text, encoding="utf-8")
    return root / "list.csv"


def test_roles_categories_and_groups(tmp_path: Path) -> None:
    listing = folder.read(miniatures.user_table(tmp_path))
    assert [(image.split, image.role, image.group) for image in listing.images[12:18]] == [
        ("val", "", "colour 0"),
        ("val", "", "colour 1"),
        ("val", "", "colour 0"),
        ("test", "", "colour 0"),
        ("test", "query", "colour 1"),
        ("test", "gallery", "colour 0"),
    ]
    assert [entry.category for entry in listing.classes] == ["seats", "tables"] * 4


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [("300 7 300 12", [300, 7, 300, 12]), ("300 7 300 x", [0, 1, 0, 2]), ("b a b c", [1, 0, 1, 2])],
)
def test_numbers_are_kept_and_names_numbered(
    labels: str, numbers: list[int], tmp_path: Path
) -> None:
    rows = [f"{name}.jpg,{label},train" for name, label in zip("abcd", labels.split(), strict=True)]
    listing = folder.read(table(tmp_path, "path,label,split\n" + "\n".join(rows)))
    assert [image.label for image in listing.images] == numbers


def test_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = table(tmp_path, "")
    (tmp_path / "in, a folder").mkdir()
    shutil.copy(tmp_path / "a.jpg", tmp_path / "in, a folder" / "my image.JPG")
    path.write_bytes(
        "\ufeffsplit,label,path\r\ntrain, one ,a.jpg\r\n".encode()
        + b'test,two,"in, a folder/my image.JPG"\r\n\r\n\r\n'
    )
    assert [(image.key, image.split) for image in folder.read(path).images] == [
        ("a", "train"),
        ("in, a folder__my image", "test"),
    ]
    assert [entry.name for entry in folder.read(path).classes] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'path'"),
        ("path;label;split\n", "has the column 'path;label;split', which is unknown"),
        ("path,label,split,size\n", "has the column 'size', which is unknown"),
        ("path,label,label,split\n", "the column 'label', which is unknown or there twice"),
        ("path,label\n", "has no column 'split'"),
        ("path,label,split,is_query\n", "has no column 'is_gallery'"),
        ("path,label,split\n", "lists no image"),
        ("path,label,split\na.jpg,x,train\nb.jpg,y\n", "line 3 has 2 columns, the header 3"),
        ("path,label,split\n\n/a.jpg,x,train\n", "line 3: '/a.jpg' is no path inside"),
        ("path,label,split\n../a.jpg,x,train\n", "line 2: '../a.jpg' is no path inside"),
        ("path,label,split\nlist.csv,x,train\n", "line 2: 'list.csv' is no image"),
        (
            "path,label,split\na.jpg,x,train\n./a.jpg,x,train\n",
            "line 3 lists './a.jpg' a second time, after .*line 2",
        ),
        ("path,label,split\na.jpg,,train\n", "line 2 has no label"),
        (
            "path,label,split\na.jpg,x,query\n",
            "line 2: split is 'query'; set it to train, val or test",
        ),
        (
            "path,label,split\na.jpg,x,train\nb.jpg,x,val\n",
            "line 3: class 'x' is of split 'val' here and of 'train' elsewhere",
        ),
        (
            "path,label,split,category\na.jpg,x,train,k\nb.jpg,x,train,l\n",
            "line 3: class 'x' is of category 'l' here and of 'k' elsewhere",
        ),
        (
            "path,label,split,is_query,is_gallery\na.jpg,x,test,false,0\n",
            "line 2: the image is neither query nor",
        ),
        (
            "path,label,split,is_query,is_gallery\na.jpg,x,test,yes,0\n",
            "line 2: is_query is 'yes'; set it to true",
        ),
        (
            "path,label,split,is_query,is_gallery\na.jpg,x,test,,\n",
            "line 2: is_query is ''; set it to true",
        ),
        ('path,label,split\n"a.jpg,x,train\n', "cannot be read as a table"),
        (
            "path,label,split\nz.jpg,x,train\n",
            "1 of 1 listed images are missing: .*; check the paths, or",
        ),
        (
            "path,label,split\na.jpg,01,train\nb.jpg,2,train\nc.jpg,1,train\n",
            "line 4: labels '1' and '01' are the same",
        ),
    ],
)
def test_impossible_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        folder.read(table(tmp_path, text))


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "")
    path.write_bytes("path,label,split\na.jpg,café,train\n".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read as a table"):
        folder.read(path)
