"""An export's model card: it prepares pictures as the product does, and hubs read its header."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
from conftest import launch
from huggingface_hub import ModelCard
from pictures import saved
from PIL import Image

from namr_dist.config import Config, DataConfig
from namr_dist.data.picture import Picture, prepare
from namr_dist.data.read.image_folder import read_picture
from namr_dist.errors import InputError
from namr_dist.gallery.pictures import collect
from namr_dist.results.export import describe, export_run
from namr_dist.results.model_card import model_card
from namr_dist.train.embed import test_transform as transform_of

SIDE = 12
CONFIG = Config(recipe="sop", data=DataConfig(test_size=20, test_crop=0.75))
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
GREY = RNG.integers(0, 256, (SIDE, SIDE), np.uint8)
GREY16 = RNG.integers(0, 1 << 16, (SIDE, SIDE), np.uint16)
HALF = np.arange(SIDE) < SIDE // 2
CLEAR = np.broadcast_to(HALF, (SIDE, SIDE))
CUT_OUT = np.dstack([np.where(CLEAR[..., None], 0, RGB), np.where(CLEAR, 0, 255)]).astype(np.uint8)
"""Black under alpha."""
ON_WHITE = np.where(CLEAR[..., None], 255, RGB)
PALETTE = RNG.integers(0, 256, (256, 3), np.uint8)


def _png(depth: int, colour: int, samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of whole bytes a sample (RFC 2083), with chunks that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = samples.shape[:2]
    rows = samples.astype(f">u{depth // 8}").reshape(height, -1)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
            *(chunk(*one) for one in chunks),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
            chunk(b"IEND", b""),
        )
    )


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _in_palette(**options) -> bytes:  # type: ignore[no-untyped-def]
    image = Image.fromarray(GREY, "L")
    image.putpalette(PALETTE.tobytes())
    return saved(image, "PNG", **options)


def _shown() -> Iterator[tuple[str, Picture, np.ndarray]]:
    """Pictures, and what a viewer shows, by NumPy alone: within a level where colours blend."""
    yield "RGB", saved(Image.fromarray(RGB), "PNG"), RGB
    yield "BMP", saved(Image.fromarray(RGB), "BMP"), RGB
    yield "lossless WebP", saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB
    yield "grey", saved(Image.fromarray(GREY), "PNG"), _grey(GREY)
    yield "16-bit grey", _png(16, 0, GREY16), _grey(np.rint(GREY16 / 257))
    yield (
        "16-bit grey, a value transparent",
        _png(16, 0, GREY16, (b"tRNS", struct.pack(">H", GREY16[3, 4]))),
        _grey(np.where(np.equal(GREY16, GREY16[3, 4]), 255, np.rint(GREY16 / 257))),
    )
    yield "16-bit RGB", _png(16, 2, RGB.astype(np.uint16) * 257), RGB
    yield "1 bit", saved(Image.fromarray(GREY > 127), "PNG"), _grey((GREY > 127) * 255)
    yield "palette", _in_palette(), PALETTE[GREY]
    yield (
        "palette, a colour transparent",
        _in_palette(transparency=int(GREY[0, 0])),
        np.where(np.equal(GREY, GREY[0, 0])[..., None], 255, PALETTE[GREY]),
    )
    alpha = RNG.integers(0, 256, 256, np.uint8)
    yield (
        "palette with alpha",
        _in_palette(transparency=alpha.tobytes()),
        _blended(PALETTE[GREY], alpha[GREY]),
    )
    yield (
        "grey, a value transparent",
        saved(Image.fromarray(GREY), "PNG", transparency=int(GREY[0, 0])),
        _grey(np.where(np.equal(GREY, GREY[0, 0]), 255, GREY)),
    )
    yield (
        "RGB, a colour transparent",
        saved(Image.fromarray(RGB), "PNG", transparency=tuple(RGB[0, 0].tolist())),
        np.where(np.equal(RGB, RGB[0, 0]).all(axis=2, keepdims=True), 255, RGB),
    )
    yield "cut-out", saved(Image.fromarray(CUT_OUT), "PNG"), ON_WHITE
    yield "cut-out WebP", saved(Image.fromarray(CUT_OUT), "WEBP", lossless=True), ON_WHITE
    rgba = RNG.integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    blended = _blended(rgba[..., :3], rgba[..., 3])
    yield "half transparent", saved(Image.fromarray(rgba), "PNG"), blended
    grey_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(rgba[..., 3])])
    on_white = _blended(_grey(GREY), rgba[..., 3])
    yield "LA", saved(grey_alpha, "PNG"), on_white
    for orientation in range(1, 9):
        upright = {
            1: RGB,
            2: RGB[:, ::-1],
            3: RGB[::-1, ::-1],
            4: RGB[::-1],
            5: RGB.transpose(1, 0, 2),
            6: np.rot90(RGB, -1),
            7: RGB[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(RGB),
        }[orientation]
        turned = saved(Image.fromarray(RGB), "PNG", exif=_exif(orientation))
        yield f"orientation {orientation}", turned, upright
        yield f"an image of orientation {orientation}", Image.open(io.BytesIO(turned)), upright
    yield (
        "16-bit grey of orientation 6",
        saved(Image.fromarray(GREY16), "PNG", exif=_exif(6)),
        _grey(np.rot90(np.rint(GREY16 / 257), -1)),
    )
    yield "grey array", GREY, _grey(GREY)
    yield "RGB array", RGB, RGB
    yield "a view of an array", RGB[::-1, ::-1], RGB[::-1, ::-1]
    yield "RGBA array", CUT_OUT, ON_WHITE
    yield "16-bit array", GREY16, _grey(np.rint(GREY16 / 257))
    yield "big-endian array", GREY16.astype(">u2"), _grey(np.rint(GREY16 / 257))
    yield "an open file", io.BytesIO(saved(Image.fromarray(RGB), "PNG")), RGB
    # Modes that no file of ours decodes to.
    wide = np.array([[-5, 0, 128, 129], [257, 65535, 65536, 1 << 30]], np.int32).repeat(3, axis=1)
    wide = wide.repeat(6, axis=0)
    yield "I", Image.fromarray(wide), _grey(np.rint(wide.clip(0, 65535) / 257))
    yield "RGBX", Image.fromarray(RGB).convert("RGBX"), RGB
    yield "RGBa", Image.fromarray(CUT_OUT).convert("RGBa"), ON_WHITE
    yield "La", grey_alpha.convert("La"), on_white
    yield "PA", Image.open(io.BytesIO(_in_palette())).convert("PA"), PALETTE[GREY]
    inks = RNG.integers(0, 256, (SIDE, SIDE, 4), np.uint8)
    light = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    yield "CMYK", Image.fromarray(inks, "CMYK"), np.rint(light)


def _blended(colours_HW3: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    share_HW1 = alpha_HW[..., None] / 255
    return np.rint(share_HW1 * colours_HW3 + (1 - share_HW1) * 255)


SHOWN = {name: (picture, want) for name, picture, want in _shown()}


@pytest.mark.parametrize("name", SHOWN)
def test_a_picture_is_what_a_viewer_shows(name: str, tmp_path: Path) -> None:
    picture, want = SHOWN[name]
    pictures = [picture]
    if isinstance(picture, bytes):
        path = tmp_path / "picture"
        path.write_bytes(picture)
        pictures += [path, str(path)]
    for one in pictures:
        for read in (prepare, read_picture):
            shown = read(one, size=SIDE, share=1.0)
            if isinstance(one, io.BytesIO):
                one.seek(0)
            assert shown.dtype == np.uint8 and shown.shape == (SIDE, SIDE, 3)
            # Colours that a half transparent premultiplied image has lost.
            blends = name in ("half transparent", "LA", "palette with alpha", "CMYK")
            off = np.abs(shown.astype(int) - want).max()
            assert off <= (2 if name == "La" else blends), off


def test_a_given_image_stays_as_it_is() -> None:
    image = Image.open(io.BytesIO(saved(Image.fromarray(CUT_OUT), "PNG", exif=_exif(6))))
    prepare(image, size=4, share=1.0)
    assert image.mode == "RGBA" and image.getexif()[0x0112] == 6
    assert (np.asarray(image) == CUT_OUT).all()


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (b"", "empty"),
        (b"no image", "not an image"),
        (io.BytesIO(saved(Image.fromarray(RGB), "PNG")[:-40]), "truncated"),
        (Image.open(io.BytesIO(saved(Image.fromarray(RGB), "BMP")[:-40])), "truncated"),
        (Image.fromarray(GREY.astype(np.float32)), "floats"),
        (RGB.astype(np.float32), "uint8"),
        (RGB[None], r"the picture cannot be decoded \(not an image \(.*uint8 .*; give another"),
        (RGB.tolist(), "list is no picture; give a path"),
        (GREY16[..., None], "uint16"),
        (np.empty((0, 5), np.uint8), "no pixel"),
        (Image.new("L", (0, 5)), "no pixel"),
        (np.broadcast_to(np.uint8(0), (8193, 8193)), "too large"),
        (Path("nowhere.jpg"), r"nowhere.jpg cannot be read .*; repair or remove it"),
    ],
)
def test_what_is_no_picture_is_reported(picture: Picture, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_picture(picture, size=SIDE, share=1.0)


def _files() -> Iterator[bytes]:
    """Of all kinds that a folder may hold: those above, other encodings and other shapes."""
    yield from (picture for picture, _ in SHOWN.values() if isinstance(picture, bytes))
    smooth = np.linspace(0, 255, 37 * 52 * 3).reshape(37, 52, 3).astype(np.uint8)
    image = Image.fromarray(smooth)
    yield saved(image, "JPEG", quality=80)
    yield saved(image, "JPEG", progressive=True, exif=_exif(8))
    yield saved(image, "JPEG", quality=95, subsampling=0, keep_rgb=True)
    yield saved(image.convert("L"), "JPEG", exif=_exif(5))
    yield saved(image.convert("CMYK"), "JPEG")
    yield saved(image.convert("YCbCr"), "JPEG")
    yield saved(image, "WEBP", quality=50, exif=_exif(6))
    transparent = image.copy()
    transparent.putalpha(Image.fromarray(smooth[..., 1]))
    yield saved(transparent, "WEBP", quality=50)
    yield saved(transparent, "PNG", exif=_exif(7))
    yield saved(image, "WEBP", save_all=True, append_images=[transparent])
    yield saved(image, "PNG", icc_profile=b"whatever a profile says")
    yield _png(8, 2, smooth, (b"gAMA", struct.pack(">I", 100_000)))
    yield saved(image.convert("1"), "BMP")
    yield saved(image.quantize(16), "BMP")
    for height, width in ((1, 1), (1, 40), (40, 1), (3, 2), (7, 300), (300, 8), (131, 90)):
        odd = RNG.integers(0, 256, (height, width, 4), np.uint8)
        yield saved(Image.fromarray(odd), "PNG")
        yield saved(Image.fromarray(odd).convert("RGB"), "JPEG")
        yield saved(Image.fromarray(odd[..., 0].astype(np.uint16) * 200), "PNG")


def test_the_card_prepares_pictures_as_the_product_does(tmp_path: Path) -> None:
    """Its code where nothing but NumPy and Pillow can be imported, bit for bit."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, data in enumerate(_files()):
        (pictures / f"{number:03}.png").write_bytes(data)  # what a file is, its content says
    collection = collect([pictures], transform_of(CONFIG))
    images = collection.images
    batch = images.__getitems__([(position, 0) for position in range(len(images))])
    assert not isinstance(batch, Exception), batch
    packages = tmp_path / "packages"
    packages.mkdir()
    for name, module in (("numpy", np), ("PIL", PIL), ("numpy.libs", np), ("pillow.libs", PIL)):
        folder = Path(module.__file__).parents[1] / name
        if folder.is_dir():  # .libs: the shared libraries of a wheel
            (packages / name).symlink_to(folder)
    files = [str(pictures / name) for name in collection.items.ids]
    script = tmp_path / "prepare.py"
    script.write_text(
        f"""import importlib.util, sys
sys.path.append({str(packages)!r})
assert not any(map(importlib.util.find_spec, ("namr_dist", "torch", "simplejpeg")))
{_card_code().replace('["photo.jpg"]', repr(files))}
assert not {{"namr_dist", "torch"}} & sys.modules.keys()
np.save({str(tmp_path / "images.npy")!r}, images)
"""
    )
    done = launch(sys.executable, "-I", "-S", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    by_card, by_us = np.load(tmp_path / "images.npy"), batch.images_bHW3.numpy()
    assert by_card.dtype == np.uint8 and by_card.shape == by_us.shape
    assert len(by_us) > 60
    wrong = [
        name
        for name, a, b in zip(collection.items.ids, by_card, by_us, strict=True)
        if (a != b).any()
    ]
    assert not wrong


@pytest.mark.parametrize("licence", [None, "cc-by-nc-4.0", "1.0", "no"])
def test_a_model_hub_reads_the_header(licence: str | None) -> None:
    """By the hub's own client."""
    stated = {"license": licence} if licence else {"license": "other", "license_name": "not-stated"}
    card = ModelCard(_card(licence))
    assert card.data.to_dict() == {
        "library_name": "namr-dist",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-retrieval", "metric-learning"],
        **stated,
    }
    assert card.text.strip().startswith("# a run\n")
    assert f"`{licence}`, as stated" in card.text if licence else "Not stated here" in card.text


@pytest.mark.parametrize("licence", ["", "Apache-2.0", "mit\nlicense: none", 'm"it', "cc by", "-1"])
def test_what_is_no_licence_is_refused(licence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"--license {licence!r} is no identifier")):
        export_run(tmp_path / "run", tmp_path / "out", licence=licence)
    assert not list(tmp_path.iterdir())


def _card(licence: str | None = None) -> str:
    return model_card(
        name="a run",
        about=describe(None, CONFIG, {"steps": 1, "machine": "a machine", "versions": "versions"}),
        sizes={},
        differences={},
        tolerance=1e-4,
        metrics=None,
        licence=licence,
    )


def _card_code() -> str:
    card = _card()
    return re.findall(r"```python\n(.*?)```", card[card.index("## Prepare") :], re.S)[0]
