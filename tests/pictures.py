"""Pictures as the bytes of image files, true and false ones."""

from __future__ import annotations

import io
import struct

import simplejpeg
from conftest import picture
from PIL import Image


def saved(image: Image.Image, kind: str, **options) -> bytes:  # type: ignore[no-untyped-def]
    """The file that Pillow writes, in a format by Pillow's name for it and with its options."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg_claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header claims so many pixels."""
    data = bytearray(simplejpeg.encode_jpeg(picture(0, 0)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)
