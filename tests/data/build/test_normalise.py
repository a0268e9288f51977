"""What a shard may hold is kept to the byte; all else becomes the picture that a viewer would
show."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from conftest import picture
from pictures import jpeg_claiming, saved
from PIL import Image

from namr_dist.data.build.normalise import BrokenImageError, Encoding, as_shard_jpeg
from namr_dist.data.shardset.shards import check_jpeg, decode_rgb

PLAIN = Encoding()


def shown(data: bytes, encoding: Encoding = PLAIN) -> tuple[np.ndarray, str]:
    """Pixels of the JPEG made of a file, which is one that a shard may hold, and what was done."""
    jpeg, treatment = as_shard_jpeg(data, encoding)
    check_jpeg(jpeg, "x", decode=True)
    return decode_rgb(jpeg, "x").astype(int), treatment


def far(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of two pictures' values."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


@pytest.fixture(scope="module")
def smooth() -> Image.Image:
    """A picture of which every quarter differs, not square, that a JPEG shows well."""
    return Image.fromarray(picture(3, 0)).resize((5, 4)).resize((64, 48), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 5}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_good_jpeg_keeps_its_bytes(smooth: Image.Image, mode: str, options: dict) -> None:
    data = saved(smooth.convert(mode), "JPEG", **options)
    assert as_shard_jpeg(data, PLAIN) == (data, "kept")
    assert as_shard_jpeg(data, Encoding(size=48, quality=10)) == (data, "kept"), (
        "no image is larger than asked for"
    )


def test_bytes_behind_the_end_are_cut_off(smooth: Image.Image) -> None:
    data = saved(smooth, "JPEG")
    assert as_shard_jpeg(data + b"\0" * 30, PLAIN) == (data + b"\0" * 30, "kept")
    assert as_shard_jpeg(data + b"\0" * 31, PLAIN) == (data, "cut")
    assert as_shard_jpeg(data + b"trailer " * 1000, PLAIN) == (data, "cut")
    assert as_shard_jpeg(data + b"trailer\xff\xd9" * 9 + b"\0" * 40, PLAIN) == (data, "cut")
    assert as_shard_jpeg(data + data, PLAIN) == (data, "cut")


def test_a_preview_inside_is_not_the_end(smooth: Image.Image) -> None:
    """Cameras put a whole small JPEG, with an end of its own, into a segment of the header."""
    preview, data = saved(smooth.resize((16, 12)), "JPEG"), saved(smooth, "JPEG", progressive=True)
    segment = b"\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview
    whole = data[:20] + segment + data[20:]
    assert as_shard_jpeg(whole, PLAIN) == (whole, "kept")
    assert as_shard_jpeg(whole + bytes(99), PLAIN) == (whole, "cut")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """EXIF 2.3, 4.6.4: where the stored first row and first column are to be seen."""
    stored = np.full((40, 56, 3), 128, np.uint8)
    stored[:16, :16] = (255, 0, 0)  # first row and column meet here
    stored[:16, -16:] = (0, 0, 255)  # the first row ends here
    row_at, column_at = {
        1: "top left",
        2: "top right",
        3: "bottom right",
        4: "bottom left",
        5: "left top",
        6: "right top",
        7: "right bottom",
        8: "left bottom",
    }[orientation].split()
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, treatment = shown(
        saved(Image.fromarray(stored), "JPEG", exif=exif, quality=95, subsampling=0)
    )
    assert treatment == ("kept" if orientation == 1 else "turned")
    if treatment == "kept":
        return
    assert pixels.shape[:2] == ((40, 56) if orientation < 5 else (56, 40))

    def corner(*sides: str) -> tuple[int, int]:
        return (-4 if "bottom" in sides else 4), (-4 if "right" in sides else 4)

    opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    assert np.abs(pixels[corner(row_at, column_at)] - (255, 0, 0)).max() < 12
    assert np.abs(pixels[corner(row_at, opposite[column_at])] - (0, 0, 255)).max() < 12


@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
@pytest.mark.parametrize(
    ("inks", "colour"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_inks_are_the_colours_they_print(
    kind: str, inks: tuple[int, ...], colour: tuple[int, ...]
) -> None:
    """Both are stored inverted, as Adobe's programs do."""
    flat = np.broadcast_to(np.array(inks, np.uint8), (32, 32, 4))
    data = (
        saved(Image.fromarray(np.ascontiguousarray(flat), "CMYK"), "JPEG")
        if kind == "CMYK"
        else simplejpeg.encode_jpeg(
            np.ascontiguousarray(255 - flat), colorspace="CMYK", colorsubsampling="420"
        )
    )
    assert simplejpeg.decode_jpeg_header(data)[2] == kind
    pixels, treatment = shown(data)
    assert treatment == "converted" and np.abs(pixels - colour).max() <= 4


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("BMP", "RGB"),
        ("BMP", "L"),
        ("BMP", "P"),
        ("WEBP", "RGB"),
    ],
)
def test_other_formats_look_the_same(smooth: Image.Image, kind: str, mode: str) -> None:
    image = smooth.quantize(16) if mode == "P" else smooth.convert(mode)
    # An option of WEBP, which the others pass over.
    pixels, treatment = shown(saved(image, kind, lossless=True))
    assert treatment == "converted" and far(pixels, np.asarray(image.convert("RGB"))) < 2.5


def test_transparent_is_white() -> None:
    black = np.zeros((16, 48, 2), np.uint8)
    black[..., 1] = np.repeat((0, 128, 255), 16)
    grey = Image.fromarray(black, "LA")
    palette = Image.new("P", (48, 16), 0)
    palette.putpalette([0, 0, 0] * 3)
    palette.putdata([position // 16 for _ in range(16) for position in range(48)])
    for data in (
        saved(grey, "PNG"),
        saved(grey.convert("RGBA"), "PNG"),
        saved(grey.convert("RGBA"), "WEBP"),
        saved(palette, "PNG", transparency=bytes([0, 128, 255])),
    ):
        pixels, _ = shown(data)
        assert [round(float(pixels[:, at : at + 8].mean())) for at in (4, 20, 36)] == pytest.approx(
            [255, 127, 0], abs=2
        )


def test_16_bit_grey_keeps_its_range() -> None:
    steps = np.repeat(np.array([[0, 0x1000, 0x8000, 0xFFFF]], np.uint16), 16, axis=1).repeat(
        16, axis=0
    )
    pixels, _ = shown(saved(Image.fromarray(steps), "PNG"))
    assert pixels[8, 8::16, 0] == pytest.approx([0, 16, 128, 255], abs=2)


def stray_bytes(jpeg: bytes) -> bytes:
    return jpeg[:20] + b"\x55" * 3 + jpeg[20:]  # between the first two segments


def unknown_revision(jpeg: bytes) -> bytes:
    return jpeg[:11] + b"\x09" + jpeg[12:]


def odd_profile(jpeg: bytes) -> bytes:
    return jpeg[:20] + b"\xff\xe2" + struct.pack(">H", 19) + b"ICC_PROFILE\0\x05\x02abc" + jpeg[20:]


def odd_scan(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xda")
    end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[: end - 2] + b"\0" + jpeg[end - 1 :]


ODDITIES = [
    (stray_bytes, "3 extraneous bytes before marker"),
    (unknown_revision, "unknown JFIF revision"),
    (odd_profile, "bad ICC marker"),
    (odd_scan, "Invalid SOS parameters"),
]


def half(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9"


def hole(jpeg: bytes) -> bytes:
    return jpeg[: len(jpeg) // 2] + bytes(200) + jpeg[len(jpeg) // 2 + 200 :]


@pytest.mark.parametrize(
    ("oddity", "warning"), ODDITIES, ids=lambda it: getattr(it, "__name__", "")
)
def test_an_odd_header_is_done_away_with(
    smooth: Image.Image, oddity: Callable[[bytes], bytes], warning: str
) -> None:
    data = saved(smooth, "JPEG", quality=95)
    with pytest.raises(ValueError, match=warning):
        simplejpeg.decode_jpeg(oddity(data))
    pixels, treatment = shown(oddity(data))
    assert treatment == "repaired" and far(pixels, simplejpeg.decode_jpeg(data)) < 1


@pytest.mark.parametrize(("stray", "treatment"), [(10, "repaired"), (16, "repaired"), (40, None)])
def test_a_few_stray_bytes_before_the_end_are_done_away_with(
    smooth: Image.Image, stray: int, treatment: str | None
) -> None:
    data = saved(smooth, "JPEG", quality=95)
    odd = data[:-2] + b"\x5a" * stray + data[-2:]
    with pytest.raises(ValueError, match="extraneous bytes before marker 0xd9"):
        simplejpeg.decode_jpeg(odd)
    if treatment is None:
        with pytest.raises(BrokenImageError, match="damaged"):
            as_shard_jpeg(odd, PLAIN)
    else:
        pixels, done = shown(odd)
        assert done == treatment and far(pixels, simplejpeg.decode_jpeg(data)) < 1


@pytest.mark.parametrize("loss", [half, hole])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_lost_pixels_are_damage(
    loss: Callable[[bytes], bytes], progressive: bool, mode: str
) -> None:
    """Pillow reads all of these, the lost parts in grey. libjpeg tells only the first of its
    warnings."""
    data = saved(
        Image.fromarray(picture(0, 0, size=80)).convert(mode),
        "JPEG",
        quality=95,
        progressive=progressive,
    )
    oddities = [oddity for oddity, _ in ODDITIES[: 4 - progressive]] if mode == "RGB" else []
    for broken in (loss(data), *(oddity(loss(data)) for oddity in oddities)):
        with Image.open(io.BytesIO(broken)) as image:
            image.load()
        with pytest.raises(BrokenImageError) as caught:
            as_shard_jpeg(broken, PLAIN)
        assert caught.value.kind == "damaged"


def png_claiming(width: int, height: int) -> bytes:
    data = saved(Image.fromarray(picture(0, 0)), "PNG")
    chunk = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"<html>Not found</html>", "not an image"),
        (simplejpeg.encode_jpeg(picture(0, 0))[:700], "truncated"),
        (simplejpeg.encode_jpeg(picture(0, 0))[:-2], "truncated"),
        (simplejpeg.encode_jpeg(picture(0, 0))[:40], "truncated"),
        (simplejpeg.encode_jpeg(picture(0, 0))[:2] + b"no more of it", "damaged"),
        (saved(Image.fromarray(picture(0, 0)), "PNG")[:2000], "truncated"),
        (saved(Image.fromarray(picture(0, 0)), "GIF"), "not an image"),
        (jpeg_claiming(20_000, 20_000), "too large"),
        (png_claiming(20_000, 20_000), "too large"),
        (saved(Image.new("1", (70_000, 2)), "PNG"), "too large"),
    ],
)
def test_broken_files_are_told_by_kind(data: bytes, kind: str) -> None:
    with pytest.raises(BrokenImageError) as caught:
        as_shard_jpeg(data, PLAIN)
    assert caught.value.kind == kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_single_pixel_is_an_image(kind: str) -> None:
    pixels, _ = shown(saved(Image.new("RGB", (1, 1), (200, 100, 50)), kind), Encoding(size=1))
    assert pixels.shape == (1, 1, 3) and np.abs(pixels - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_shorter_side_is_shrunk(smooth: Image.Image, kind: str) -> None:
    large = smooth.resize((320, 240), Image.Resampling.BICUBIC)
    pixels, treatment = shown(saved(large, kind), Encoding(size=60))
    assert treatment == "shrunk" and pixels.shape == (60, 80, 3)
    assert far(pixels, np.asarray(large.resize((80, 60), Image.Resampling.LANCZOS))) < 1.5
    assert shown(saved(large, kind), Encoding(size=240))[0].shape == (240, 320, 3)


def test_quality_is_that_of_the_new_jpeg(smooth: Image.Image) -> None:
    data = saved(smooth, "PNG")
    assert len(as_shard_jpeg(data, Encoding(quality=50))[0]) < len(
        as_shard_jpeg(data, Encoding(quality=95))[0]
    )
    assert simplejpeg.decode_jpeg_header(as_shard_jpeg(data, PLAIN)[0])[3] == "444"
