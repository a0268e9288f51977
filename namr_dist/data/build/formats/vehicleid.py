"""VehicleID (PKU): surveillance images of vehicles, three test lists of 800, 1,600 and 2,400 of
them.

Source: Liu et al., Deep Relative Distance Learning: Tell the Difference Between Similar Vehicles,
CVPR 2016. Read are the lists in train_test_split/; the images are image/{id:07d}.jpg.
"""

from __future__ import annotations

from pathlib import Path

from namr_dist.data.build.formats.lists import find_list, read_labels
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.shardset.manifest import ImageClass
from namr_dist.errors import InputError

_TEST_SIZES = (800, 1_600, 2_400)
# Sources differ on the number of images, so only vehicles are expected.
_EXPECTED = {"train classes": 13_164, **{f"test_{size} classes": size for size in _TEST_SIZES}}


def read(source: Path) -> Listing:
    """Labels are the vehicle ids; `test` is the union of the test lists, which are the subsets
    test_800 and so on.

    `source` is VehicleID_V1.0 or the folder that holds it. Raises InputError for lists that are
    missing, damaged or contradictory, and for images that are not there.
    """
    root = find_list(source, "train_test_split/train_list.txt").parent.parent
    vehicle_of: dict[int, int] = {}
    split_of: dict[int, str] = {}
    images: dict[int, SourceImage] = {}
    subsets: dict[str, tuple[str, ...]] = {}
    for split, name in (
        ("train", "train_list"),
        *(("test", f"test_list_{size}") for size in _TEST_SIZES),
    ):
        listed = read_labels(root / "train_test_split" / f"{name}.txt", "image_id vehicle_id")
        for image, vehicle in listed.items():
            if vehicle_of.setdefault(image, vehicle) != vehicle:
                raise InputError(
                    f"{name}.txt in {root} says that image {image} shows vehicle {vehicle}, another list "
                    f"that it shows {vehicle_of[image]}; unpack the download again"
                )
            if split_of.setdefault(vehicle, split) != split:
                raise InputError(
                    f"vehicle {vehicle} is both in train_list.txt and in {name}.txt in {root}; splits may "
                    "share no vehicle: unpack the download again"
                )
            key = f"{image:07d}"
            images.setdefault(
                image,
                SourceImage(
                    path=root / "image" / f"{key}.jpg", key=key, label=vehicle, split=split
                ),
            )
        if split == "test":
            subsets[name.replace("_list", "")] = tuple(images[image].key for image in listed)
    classes = tuple(
        ImageClass(label=vehicle, name=str(vehicle), category="", split=split_of[vehicle])
        for vehicle in sorted(split_of)
    )
    listing = Listing(
        name="vehicleid",
        description="PKU VehicleID, original images; test is the union of its lists",
        root=root,
        classes=classes,
        images=tuple(images.values()),
        subsets=subsets,
        expected=_EXPECTED,
    )
    listing.check()
    return listing
