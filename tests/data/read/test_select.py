"""Which images are trained on, against counts that follow from how the set was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from namr_dist.config import DataConfig
from namr_dist.data.read.select import training_images
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError


def chosen(manifest: Manifest, *, seed: int = 0, **fields) -> tuple[list[int], list[int]]:  # type: ignore[no-untyped-def]
    """Labels and how many images each has left."""
    index = training_images(manifest, DataConfig(**fields), seed=seed)
    labels, counts = np.unique(index.label_N, return_counts=True)
    return labels.tolist(), counts.tolist()


def test_all_by_default(shard_set: Manifest) -> None:
    assert chosen(shard_set) == (list(range(12)), [6] * 12)
    assert chosen(shard_set, train_splits=("train", "val")) == (list(range(16)), [6] * 16)


def test_super_classes(shard_set: Manifest) -> None:
    assert chosen(shard_set, categories=("kind 1",))[0] == [1, 4, 7, 10]
    assert chosen(shard_set, categories=("kind 0", "kind 2"))[0] == [0, 2, 3, 5, 6, 8, 9, 11]
    with pytest.raises(
        InputError, match="data.categories names 'kind 9'; .* has kind 0, kind 1, kind 2"
    ):
        chosen(shard_set, categories=("kind 9",))


def test_class_list_by_name_or_label(shard_set: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("thing 3\n\n7\n thing 11 \n")
    assert chosen(shard_set, class_list=path)[0] == [3, 7, 11]
    assert chosen(shard_set, class_list=path, categories=("kind 1",))[0] == [7]
    path.write_text("thing 3\nthing 99\n")
    with pytest.raises(InputError, match=r"classes.txt, line 2: .* has no class 'thing 99'"):
        chosen(shard_set, class_list=path)
    with pytest.raises(InputError, match="data.class_list .*none.txt cannot be read"):
        chosen(shard_set, class_list=tmp_path / "none.txt")


def test_a_class_list_never_guesses(shard_set: Manifest, tmp_path: Path) -> None:
    """Names that are numbers: the class called 2 has another label."""
    names = {0: "1", 1: "2", 2: "3", 3: "same", 4: "same"}
    named = replace(
        shard_set,
        classes=tuple(
            replace(entry, name=names.get(entry.label, entry.name)) for entry in shard_set.classes
        ),
    )
    path = tmp_path / "classes.txt"
    path.write_text("0\n11\n")
    assert chosen(named, class_list=path)[0] == [0, 11]
    for word, labels in (("2", "1 and 2"), ("same", "3 and 4")):
        path.write_text(word)
        with pytest.raises(InputError, match=f"'{word}' is a name or a label of classes {labels}"):
            chosen(named, class_list=path)


def test_most_images_are_a_fixed_choice(shard_set: Manifest) -> None:
    assert chosen(shard_set, most_images=4) == (list(range(12)), [4] * 12)
    assert chosen(shard_set, most_images=40) == (list(range(12)), [6] * 12)
    keys = [
        training_images(shard_set, DataConfig(most_images=4), seed=seed).keys for seed in (0, 0, 1)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_small_classes_are_left_out(shard_set: Manifest) -> None:
    """Class 5 has three images, the others six."""
    keys = tuple(
        key for key in shard_set.index("train").keys if key not in ("005_3", "005_4", "005_5")
    )
    uneven = replace(shard_set, subsets={"uneven": keys})
    assert chosen(uneven, train_splits=("uneven",), least_images=3) == (
        list(range(12)),
        [6] * 5 + [3] + [6] * 6,
    )
    for least_images in (4, 6):
        assert chosen(uneven, train_splits=("uneven",), least_images=least_images) == (
            [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11],
            [6] * 11,
        )
    with pytest.raises(
        InputError, match=r"no image of uneven .* is left .*data.least_images \(7\)"
    ):
        chosen(uneven, train_splits=("uneven",), least_images=7)


def test_a_subset_is_named_like_a_split(own_shard_set: Manifest) -> None:
    test = own_shard_set.index("test")
    keys = tuple(key for key in test.keys if key[:3] in ("016", "018"))
    with_subset = replace(own_shard_set, subsets={"test_2": keys})
    with_subset.save()
    loaded = Manifest.load(own_shard_set.folder)
    assert loaded.index("test_2").keys == keys and len(keys) == 12
    assert loaded.index("test_2", "val").keys == (*loaded.index("val").keys, *keys)
    assert loaded.split_hash("test_2") not in (loaded.split_hash("test"), loaded.split_hash("val"))
    with pytest.raises(InputError, match="no split 'test_3'; it has train, val, test, test_2"):
        loaded.index("test_3")
