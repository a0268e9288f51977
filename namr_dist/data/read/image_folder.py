"""A user's own pictures, one by one or the files of a folder, to be embedded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from namr_dist.data.build.formats.lists import ENDINGS
from namr_dist.data.build.normalise import BrokenImageError, viewed
from namr_dist.data.picture import Picture, middle
from namr_dist.errors import InputError, TransientError, is_transient


def image_names(folder: Path) -> tuple[str, ...]:
    """Paths of all image files below a folder, relative to it, sorted. Raises InputError if there
    is none."""
    names = tuple(
        sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix.lower() in ENDINGS and path.is_file()
        )
    )
    if not names:
        raise InputError(f"{folder} holds no image ({', '.join(ENDINGS)})")
    return names


def read_picture(picture: Picture, *, size: int, share: float) -> np.ndarray:
    """What `data.picture.prepare` makes of a picture, uint8 (size, size, 3), for pictures that may
    be anything: of more than MOST_PIXELS, a baseline JPEG is decoded at a fraction of its size.

    Raises InputError, which names a path, for what is no whole picture of a kind that it takes, or
    too large, and TransientError if storage does not answer.
    """
    where, remedy = "the picture", "give another"
    try:
        if isinstance(picture, str | os.PathLike):
            where, remedy = os.fspath(picture), "repair or remove it"
            picture = Path(picture).read_bytes()
        elif not isinstance(picture, bytes | Image.Image | np.ndarray):
            if not hasattr(picture, "read"):
                raise InputError(
                    f"{type(picture).__name__} is no picture; give a path, the bytes of an image file, an open "
                    "file, a PIL image or a NumPy array"
                )
            picture = picture.read()
        image = viewed(picture, least=size)
    except BrokenImageError as error:
        raise InputError(f"{where} cannot be decoded ({error}); {remedy}") from None
    except OSError as error:
        kind = TransientError if is_transient(error) else InputError
        raise kind(f"{where} cannot be read ({error.strerror}); {remedy}") from None
    return middle(image, size=size, share=share)
