"""Images whose headers ask for more memory than anybody means to give: refused before they are
decoded, or decoded at a fraction."""

from __future__ import annotations

import io
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from pictures import saved
from PIL import Image

from namr_dist.data.build.normalise import BrokenImageError, Encoding, as_shard_jpeg, viewed
from namr_dist.data.shardset.shards import MOST_PIXELS
from namr_dist.errors import InputError
from namr_dist.results.examples import data_uri

BOMB = 13_376
"""Pixels on a side: as many as Pillow lets pass, in a PNG of some twenty KiB."""
LARGE = 8_256
"""On a side of an image that is a little above the limit."""
REMEDY = "more than 67,108,864; shrink the image, or give --size where it is a baseline JPEG"


def within(mebibytes: int, work: Callable[[], None]) -> None:
    """Run in a child that can get so much more memory than it has; fails where `work` does."""
    child = os.fork()
    if not child:
        code = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (mebibytes << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture(scope="module")
def large() -> bytes:
    """A baseline JPEG, black with a white quarter."""
    pixels = np.zeros((LARGE, LARGE, 1), np.uint8)
    pixels[: LARGE // 2, : LARGE // 2] = 255
    return simplejpeg.encode_jpeg(pixels, colorspace="GRAY", quality=50)


def test_a_small_file_of_a_huge_image_costs_nothing() -> None:
    bomb = saved(Image.new("P", (BOMB, BOMB)), "PNG", transparency=0)
    jpeg = saved(Image.new("L", (BOMB, BOMB)), "JPEG")

    def refused() -> None:
        for read in (lambda: as_shard_jpeg(bomb, Encoding(size=64)), lambda: viewed(bomb)):
            with pytest.raises(BrokenImageError) as caught:
                read()
            assert str(caught.value) == f"too large ({BOMB} × {BOMB} pixels, {REMEDY})"
        with pytest.raises(
            InputError, match=f"'a' cannot be read .{BOMB} × {BOMB} pixels are more"
        ):
            data_uri(jpeg, "a")
        with pytest.raises(InputError, match="'a' cannot be read .cannot identify"):
            data_uri(bomb, "a")

    within(64, refused)


def test_the_limit_is_the_last_that_passes() -> None:
    at_limit = saved(Image.new("1", (1 << 16, MOST_PIXELS >> 16)), "PNG")
    with pytest.raises(BrokenImageError, match="a JPEG has 65500 at most on a side"):
        as_shard_jpeg(at_limit, Encoding())
    above = saved(Image.new("1", (1 << 16, (MOST_PIXELS >> 16) + 1)), "PNG")
    with pytest.raises(BrokenImageError, match=re.escape(REMEDY)):
        as_shard_jpeg(above, Encoding())


def test_a_large_baseline_jpeg_is_decoded_at_a_fraction(large: bytes) -> None:
    with pytest.raises(BrokenImageError, match=re.escape(REMEDY)):
        as_shard_jpeg(large, Encoding())

    def shrunk() -> None:
        jpeg, treatment = as_shard_jpeg(large, Encoding(size=64))
        assert treatment == "shrunk"
        pixels = simplejpeg.decode_jpeg(jpeg)
        assert pixels.shape == (64, 64, 3)
        want = np.zeros((64, 64))
        want[:32, :32] = 255
        assert np.abs(pixels.mean(2) - want).mean() < 3
        assert viewed(large, least=64).size == (LARGE // 2, LARGE // 2)

    within(512, shrunk)
    # Of which half would be fewer pixels than asked for.
    with pytest.raises(BrokenImageError, match=re.escape(REMEDY)):
        as_shard_jpeg(large, Encoding(size=LARGE // 2 + 1))


def test_a_turned_one_is_turned(large: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    block = b"Exif\0\0" + exif.tobytes()
    turned = large[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + large[2:]
    jpeg, _ = as_shard_jpeg(turned, Encoding(size=64))
    pixels = simplejpeg.decode_jpeg(jpeg).mean(2)
    assert pixels.shape == (64, 64)
    assert pixels[:32, :32].mean() < 3 and pixels[32:, 32:].mean() > 250


def test_of_several_scans_all_coefficients_would_be_kept(large: bytes) -> None:
    """A scan's header that states another number of components is all that tells, and all that is
    looked at before the image is decoded."""
    at = large.index(b"\xff\xda") + 4
    for data in (
        large.replace(b"\xff\xc0", b"\xff\xc2", 1),
        large[:at] + b"\x02" + large[at + 1 :],
    ):
        with pytest.raises(BrokenImageError, match="too large"):
            as_shard_jpeg(data, Encoding(size=64))


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "LA"])
def test_strips_change_no_pixel(mode: str) -> None:
    """As the whole image at once, on white where it is transparent."""
    rng = np.random.default_rng(0)
    if mode == "I;16":
        values = rng.integers(0, 1 << 16, (200, 31), np.uint16)
        data = saved(Image.fromarray(values), "PNG")
        want = np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    else:
        image = Image.fromarray(rng.integers(0, 256, (200, 31, 4), np.uint8), "RGBA")
        if mode == "P":
            image = image.convert("RGB").quantize(16)
            data = saved(image, "PNG", transparency=3)
        else:
            data = saved(image.convert(mode), "PNG")
        whole = Image.open(io.BytesIO(data)).convert("RGBA")
        white = Image.new("RGBA", whole.size, "white")
        want = np.asarray(Image.alpha_composite(white, whole).convert("RGB"))
    assert (np.asarray(viewed(data)) == want).all()
