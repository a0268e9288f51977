"""Any image file → a JPEG that a shard may hold: upright, RGB or greyscale, read whole by a strict
decoder.

What already is one keeps its bytes. All else is encoded anew, at 4:4:4: chroma that a PNG or a
smaller copy has in full is not thrown away. Colour profiles are not applied, and go with all other
metadata when an image is encoded anew.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from namr_dist.data.shardset.shards import END_OF_IMAGE, JPEG_TAIL, MOST_PIXELS
from namr_dist.errors import InputError

Treatment = Literal["kept", "cut", "turned", "converted", "repaired", "shrunk"]
"""What was done to an image: nothing; bytes behind its end cut off; its EXIF orientation applied;
another format or colour space made an RGB JPEG; oddities before or behind a JPEG's pixels, which
are whole, done away with; its shorter side shrunk. The last that applies.
"""

_MOST_SIDE = 65_500
"""Of a JPEG, as libjpeg has it."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_STRAY_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MOST_STRAY = 16
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
"""Of a JPEG's segment or end (ITU T.81, B.1), not what may stand within image data: a stuffed zero,
a restart."""
_BASELINE, _EXTENDED, _END, _SCAN, _FIRST_APPLICATION = 0xC0, 0xC1, 0xD9, 0xDA, 0xE0


class BrokenImageError(InputError):
    """A file that is no whole image. `kind` is what `broken` files are counted by, the message says
    it all."""

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

    What the file is, its content says; its name does not count. Raises BrokenImageError, also for a
    JPEG of which a viewer would show a part.
    """
    if not data:
        raise BrokenImageError("empty", "")
    if not data.startswith(b"\xff\xd8"):
        return _encode(_open_with_pillow(data), "converted", encoding)
    try:
        pixels = _strict_pixels(data)
    except BrokenImageError:
        raise
    except ValueError as error:
        # Which, like viewers, shows grey without a word where data is lost.
        image = _open_with_pillow(data)
        if not (
            _is_sound(_with_plain_header(data)) or _is_sound(_without_stray_end(data, str(error)))
        ):
            raise BrokenImageError("damaged", str(error)) from None
        return _encode(image, "repaired", encoding)
    if pixels.shape[2] == 4:
        return _encode(_open_with_pillow(data), "converted", encoding)
    if _is_turned(data):
        return _encode(_open_with_pillow(data), "turned", encoding)
    if encoding.size is not None and min(pixels.shape[:2]) > encoding.size:
        return _encode(Image.fromarray(pixels), "shrunk", encoding)
    end = next((end for code, _, end in _segments(data) if code == _END), len(data))
    if len(data) - end > JPEG_TAIL - len(END_OF_IMAGE) and _is_sound(data[:end]):
        return data[:end], "cut"
    return data, "kept"


def viewed_rgb(data: bytes) -> np.ndarray:
    """uint8 (H, W, 3): what a viewer shows of any image file that a build takes. Raises
    BrokenImageError."""
    if not data:
        raise BrokenImageError("empty", "")
    return np.asarray(_as_rgb(_open_with_pillow(data)))


def _strict_pixels(jpeg: bytes) -> np.ndarray:
    """uint8 (H, W, 3): RGB; (H, W, 4): inks. Raises ValueError for whatever libjpeg warns of, and
    BrokenImageError for too large an image."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
    _check_size(width, height)
    return simplejpeg.decode_jpeg(jpeg, "CMYK" if colours in ("CMYK", "YCCK") else "RGB")


def _is_sound(jpeg: bytes) -> bool:
    try:
        _strict_pixels(jpeg)
    except ValueError:
        return False
    return True


def _with_plain_header(jpeg: bytes) -> bytes:
    """The JPEG with nothing before its first scan but what the scans are decoded by.

    libjpeg tells its first warning alone, so one of the header hides those of the pixels: this has
    none of the header.
    """
    kept = [jpeg[:2]]
    sequential = False
    for code, start, end in _segments(jpeg):
        if code == _SCAN:
            # A sequential scan holds all 64 coefficients, whatever it states; libjpeg warns, and
            # decodes it so.
            scan = jpeg[start : end - 3] + bytes((0, 63, 0)) if sequential else jpeg[start:end]
            return b"".join((*kept, scan, jpeg[end:]))
        sequential |= code in (_BASELINE, _EXTENDED)
        if code < _FIRST_APPLICATION:
            kept.append(jpeg[start:end])
    return jpeg


def _without_stray_end(jpeg: bytes, said: str) -> bytes:
    """The JPEG without the few bytes that libjpeg said it had no use for before the end marker.

    Some writers leave them. After lost data there are more of them, or what comes before does not
    decode either.
    """
    match = _STRAY_END.search(said)
    at = next((start for code, start, _ in _segments(jpeg) if code == _END), 0)
    return (
        jpeg[: at - int(match[1])] + jpeg[at:] if match and int(match[1]) <= _MOST_STRAY else jpeg
    )


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker code, first byte and end of each segment of the first image. What lies between them,
    such as the entropy-coded data behind a scan's header, is of none."""
    end = 2
    while match := _MARKER.search(jpeg, end):
        code, at = match[0][1], match.end()
        end = at if code == _END else at + int.from_bytes(jpeg[at : at + 2], "big")
        yield code, match.start(), end
        if code == _END:
            return


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BrokenImageError("too large", f"{width} × {height} pixels")


def _is_turned(jpeg: bytes) -> bool:
    """Whether a viewer would turn or mirror the image. Pillow takes long to open one, and few have
    EXIF data."""
    if b"Exif\0\0" not in jpeg:
        return False
    try:
        with _quiet(), Image.open(io.BytesIO(jpeg), formats=_FORMATS) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except MemoryError:
        raise
    except Exception:  # the pixels are whole, and metadata that cannot be read says nothing of them
        return False


def _open_with_pillow(data: bytes) -> Image.Image:
    """The image as it would be viewed, in any mode."""
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size)
            image.load()
            return ImageOps.exif_transpose(image)
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        known = data.startswith((b"\xff\xd8", b"\x89PNG"))
        raise BrokenImageError(
            "damaged" if known else "not an image", f"cannot be read as {', '.join(_FORMATS)}"
        ) from None
    except Image.DecompressionBombError as error:
        raise BrokenImageError("too large", str(error)) from None
    except Exception as error:  # damaged files raise whatever Pillow's parsers run into
        raise BrokenImageError(
            "truncated" if "truncated" in str(error).lower() else "damaged", str(error)
        ) from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """On white where it was transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips
        return Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _encode(
    image: Image.Image, treatment: Treatment, encoding: Encoding
) -> tuple[bytes, Treatment]:
    image = _as_rgb(image)
    width, height = image.size
    size = encoding.size
    if size is not None and min(width, height) > size:
        scale = size / min(width, height)
        image = image.resize(
            (round(width * scale), round(height * scale)),
            Image.Resampling.LANCZOS,
            reducing_gap=3.0,
        )
        treatment = "shrunk"
    if max(image.size) > _MOST_SIDE:
        raise BrokenImageError(
            "too large", f"{width} × {height} pixels: a JPEG has {_MOST_SIDE} at most on a side"
        )
    jpeg = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=encoding.quality, colorsubsampling="444"
    )
    return jpeg, treatment


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large images and of odd metadata; nobody can act on either here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
