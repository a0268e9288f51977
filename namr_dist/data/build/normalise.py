"""Any image file → a JPEG that a shard may hold: upright, RGB or greyscale, read whole by a strict
decoder.

What already is one keeps its bytes. All else is encoded again, at 4:4:4: chroma that a PNG or a
smaller copy has in full is not thrown away. Colour profiles are not applied, and go with all other
metadata when an image is encoded again.
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
from PIL import ExifTags, Image, UnidentifiedImageError

from namr_dist.data.picture import as_image, on_white, upright
from namr_dist.data.shardset.shards import END_OF_IMAGE, JPEG_TAIL, MOST_PIXELS
from namr_dist.errors import InputError

Treatment = Literal["kept", "cut", "turned", "converted", "repaired", "shrunk"]
"""What was done to an image: nothing; bytes behind its end cut off; its EXIF orientation applied;
another format or colour space made an RGB JPEG; oddities before or behind a JPEG's pixels, which
are whole, done away with; its shorter side shrunk. The last that applies.
"""

_MOST_SIDE = 65_500
"""Of a JPEG, as libjpeg has it."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""By Pillow's names. It is asked for no others: for some it starts a program."""
_STRAY_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_MOST_STRAY = 16
TOO_LARGE = "too large"
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
    least = encoding.size
    try:
        pixels, shrink = _strict_pixels(data, least)
    except BrokenImageError:
        raise
    except ValueError as error:
        # Which, like viewers, shows grey without a word where data is lost.
        image = _open_with_pillow(data, least)
        if not (
            _is_sound(_with_plain_header(data), least)
            or _is_sound(_without_stray_end(data, str(error)), least)
        ):
            raise BrokenImageError("damaged", str(error)) from None
        return _encode(image, "repaired", encoding)
    if pixels.shape[2] == 4:
        return _encode(_open_with_pillow(data, least), "converted", encoding)
    if _is_turned(data):
        return _encode(_open_with_pillow(data, least), "turned", encoding)
    if shrink > 1 or (least is not None and min(pixels.shape[:2]) > least):
        return _encode(Image.fromarray(pixels), "shrunk", encoding)
    end = next((end for code, _, end in _segments(data) if code == _END), len(data))
    if len(data) - end > JPEG_TAIL - len(END_OF_IMAGE) and _is_sound(data[:end], least):
        return data[:end], "cut"
    return data, "kept"


def viewed(picture: bytes | Image.Image | np.ndarray, least: int = 1) -> Image.Image:
    """RGB: what a viewer shows of the bytes of any image file that a build takes, of a PIL image,
    or of an array as `data.picture` takes it; of a JPEG file of more than MOST_PIXELS, at a half,
    a quarter or an eighth of its size, with `least` pixels or more on a side.

    Raises BrokenImageError.
    """
    if isinstance(picture, bytes):
        if not picture:
            raise BrokenImageError("empty", "")
        return on_white(_open_with_pillow(picture, least))
    try:
        with _quiet():
            image = as_image(picture)
            if image.width * image.height > MOST_PIXELS:
                raise _too_large(f"{image.width} × {image.height} pixels")
            return on_white(upright(image))
    except (BrokenImageError, MemoryError):
        raise
    except ValueError as error:
        raise BrokenImageError("not an image", str(error)) from None
    except Exception as error:
        raise _broken(error) from None


def _strict_pixels(jpeg: bytes, least: int | None) -> tuple[np.ndarray, int]:
    """uint8 (H, W, 3): RGB; (H, W, 4): inks; and by how much the decoder shrank the image, which is
    1 but for one of more than MOST_PIXELS (see `_shrink`). Raises ValueError for whatever libjpeg
    warns of, and BrokenImageError for too large an image."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
    shrink = _shrink(jpeg, width, height, least)
    return simplejpeg.decode_jpeg(
        jpeg,
        "CMYK" if colours in ("CMYK", "YCCK") else "RGB",
        min_height=-(-height // shrink),
        min_width=-(-width // shrink),
    ), shrink


def _is_sound(jpeg: bytes, least: int | None) -> bool:
    try:
        _strict_pixels(jpeg, least)
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


def _shrink(data: bytes, width: int, height: int, least: int | None) -> int:
    """1 for an image of at most MOST_PIXELS; for a JPEG of more the least of 2, 4 and 8 by which
    the decoder has to shrink it.

    Raises BrokenImageError for another format, without `least`, where fewer pixels than that would
    be left on a side, and for a JPEG of several scans, of which libjpeg keeps all coefficients at
    whatever scale.
    """
    for shrink in (1, 2, 4, 8):
        if -(-width // shrink) * -(-height // shrink) > MOST_PIXELS:
            continue
        if shrink == 1 or (
            least is not None and min(width, height) // shrink >= least and _has_one_scan(data)
        ):
            return shrink
        break
    raise _too_large(f"{width} × {height} pixels")


def _too_large(what: str) -> BrokenImageError:
    return BrokenImageError(
        TOO_LARGE,
        f"{what}, more than {MOST_PIXELS:,}; shrink the image, or give --size where it is a "
        "baseline JPEG",
    )


def _has_one_scan(data: bytes) -> bool:
    """Whether it is a sequential JPEG whose first scan has all its components."""
    components = 0
    for code, start, _ in _segments(data) if data.startswith(b"\xff\xd8") else ():
        if code in (_BASELINE, _EXTENDED):
            components = data[start + 9] if len(data) > start + 9 else 0
        elif code == _SCAN:
            return len(data) > start + 4 and data[start + 4] == components
    return False


def _is_turned(jpeg: bytes) -> bool:
    """Whether a viewer would turn or mirror the image. Pillow takes long to open one, and few have
    EXIF data."""
    if b"Exif\0\0" not in jpeg:
        return False
    try:
        with _quiet(), Image.open(io.BytesIO(jpeg), formats=FORMATS) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except MemoryError:
        raise
    except Exception:  # the pixels are whole, and metadata that cannot be read says nothing of them
        return False


def _open_with_pillow(data: bytes, least: int | None = None) -> Image.Image:
    """The image as it would be viewed, in any mode, shrunk as `_shrink` says."""
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            shrink = _shrink(data, image.width, image.height, least)
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
            return upright(image)
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        known = data.startswith((b"\xff\xd8", b"\x89PNG"))
        raise BrokenImageError(
            "damaged" if known else "not an image", f"cannot be read as {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(f"{int(pixels[0]):,} pixels" if pixels else str(error)) from None
    except Exception as error:  # damaged files raise whatever Pillow's parsers run into
        raise _broken(error) from None


def _broken(error: Exception) -> BrokenImageError:
    return BrokenImageError(
        "truncated" if "truncated" in str(error).lower() else "damaged", str(error)
    )


def _encode(
    image: Image.Image, treatment: Treatment, encoding: Encoding
) -> tuple[bytes, Treatment]:
    image = on_white(image)
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
            TOO_LARGE, f"{width} × {height} pixels: a JPEG has {_MOST_SIDE} at most on a side"
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
