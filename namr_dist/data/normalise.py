"""Any image file → a JPEG that a shard may hold: upright, RGB or greyscale, read whole by a strict decoder.

What already is one keeps its bytes. All else is encoded anew, at 4:4:4: chroma that a PNG or a smaller copy has in full
is not thrown away. Colour profiles are not applied, and go with all other metadata when an image is encoded anew.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from namr_dist.data.shards import END_OF_IMAGE, JPEG_TAIL
from namr_dist.errors import InputError

Treatment = Literal["kept", "cut", "turned", "converted", "repaired", "shrunk"]
"""What was done to an image: nothing; bytes behind its end cut off; its EXIF orientation applied; another format or
colour space made an RGB JPEG; warnings of the decoder done away with; its shorter side shrunk. The last that applies.
"""

MOST_PIXELS = 178_956_970
"""Pillow's limit, and the one here: a few bytes of header may claim any size, which a decoder would allocate."""
_MOST_SIDE = 65_500
"""Of a JPEG, as libjpeg has it."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class BrokenImage(InputError):
    """A file that is no whole image. `kind` is what `broken` files are counted by, the message says it all."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are encoded that do not keep their bytes."""

    size: int | None = None
    """Longest that an image's shorter side may be, in pixels; None: any."""
    quality: int = 95


def as_shard_jpeg(data: bytes, encoding: Encoding) -> tuple[bytes, Treatment]:
    """A JPEG of the image that the bytes of a file show, and what was done to it.

    What the file is, its content says; its name does not count. Raises BrokenImage.
    """
    if not data:
        raise BrokenImage("empty", "")
    if not data.startswith(b"\xff\xd8"):
        return _encode(_open_with_pillow(data), "converted", encoding)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        plain = colours not in ("CMYK", "YCCK")
        pixels = simplejpeg.decode_jpeg(data, "RGB") if plain else None
    except ValueError as error:
        if isinstance(error, BrokenImage):
            raise
        # Strict decoders refuse what viewers show without a word.
        return _encode(_open_with_pillow(data), "repaired", encoding)
    if pixels is None:
        return _encode(_open_with_pillow(data), "converted", encoding)
    if _is_turned(data):
        return _encode(_open_with_pillow(data), "turned", encoding)
    if encoding.size is not None and min(height, width) > encoding.size:
        return _encode(Image.fromarray(pixels), "shrunk", encoding)
    if END_OF_IMAGE in data[-JPEG_TAIL:]:
        return data, "kept"
    return data[: data.rindex(END_OF_IMAGE) + len(END_OF_IMAGE)], "cut"


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BrokenImage("too large", f"{width} × {height} pixels")


def _is_turned(jpeg: bytes) -> bool:
    """Whether a viewer would turn or mirror the image. Pillow takes long to open one, and few have EXIF data."""
    if b"Exif\0\0" not in jpeg:
        return False
    try:
        with _quiet(), Image.open(io.BytesIO(jpeg), formats=_FORMATS) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # the pixels are whole, and metadata that cannot be read says nothing of them
        return False


def _open_with_pillow(data: bytes) -> Image.Image:
    """The image as it would be viewed, in any mode."""
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size)
            image.load()
            return ImageOps.exif_transpose(image)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        known = data.startswith((b"\xff\xd8", b"\x89PNG"))
        raise BrokenImage("damaged" if known else "not an image", f"cannot be read as {', '.join(_FORMATS)}") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise BrokenImage("too large", str(error)) from None
    except Exception as error:  # damaged files raise whatever Pillow's parsers run into
        raise BrokenImage("truncated" if "truncated" in str(error).lower() else "damaged", str(error)) from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """On white where it was transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image, treatment: Treatment, encoding: Encoding) -> tuple[bytes, Treatment]:
    image = _as_rgb(image)
    width, height = image.size
    size = encoding.size
    if size is not None and min(width, height) > size:
        scale = size / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS,
                             reducing_gap=3.0)
        treatment = "shrunk"
    if max(image.size) > _MOST_SIDE:
        raise BrokenImage("too large", f"{width} × {height} pixels: a JPEG has {_MOST_SIDE} at most on a side")
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=encoding.quality, colorsubsampling="444")
    return jpeg, treatment


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large images and of odd metadata; nobody can act on either here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
