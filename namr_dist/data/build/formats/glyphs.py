"""A letter of an open font → a picture of it. Font files are those of installed packages, and each
is known by its hash.

No code of a font's package is imported or run.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from namr_dist.errors import InputError

TABLE = Path(__file__).with_name("letter_fonts.csv")
"""The fonts of the set `letters`, a line each, as tools/letter_fonts.py writes them."""
IMAGE_SIZE, LETTER_SIZE = 112, 78
"""Sides, in pixels, of an image and of the longer side of the letter in its middle."""

_EM = 400
"""Pixels of the font size at which a letter is drawn before it is shrunk, so large that hinting
moves no edge of the small image."""
_REGULAR = 400
"""The weight that a variable font is set to; its other axes keep their defaults."""


@dataclass(frozen=True, kw_only=True)
class FontFile:
    """A font file of a package on PyPI."""

    family: str
    package: str
    version: str
    """Of the package that has the file."""
    licence: str
    """SPDX identifier."""
    file: str
    """Its path among the package's installed files."""
    sha256: str
    scripts: tuple[str, ...]
    """Those whose letters are drawn from it."""
    without: str = ""
    """Letters that are not, for it draws them as it draws another."""


def read_table(path: Path = TABLE) -> tuple[FontFile, ...]:
    """The fonts of a table, in its order."""
    with open(path, encoding="utf-8", newline="") as file:
        return tuple(
            FontFile(scripts=tuple(row.pop("scripts").split()), **row)
            for row in csv.DictReader(file)
        )


def open_font(font: FontFile) -> ImageFont.FreeTypeFont:
    """The font, ready to draw with, a variable one at its regular weight.

    Raises InputError if the package or the file is missing, or if the file's hash is another.
    """
    remedy = f"pip install --force-reinstall --no-deps {font.package}=={font.version}"
    try:
        distribution = metadata.distribution(font.package)
    except metadata.PackageNotFoundError:
        raise InputError(
            f"the font {font.family} is in the package {font.package}, which is not installed; "
            "pip install 'namr-dist[letters]' installs all fonts of letters"
        ) from None
    path = Path(str(distribution.locate_file(font.file)))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}, a font of {font.package} {distribution.version}, cannot be read "
            f"({error.strerror}); {remedy}"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != font.sha256:
        raise InputError(
            f"{path}, of {font.package} {distribution.version}, has the SHA-256 {digest}, not "
            f"{font.sha256} as in {font.version}; {remedy}"
        )
    # The very bytes that were hashed. Basic layout: a letter stands alone and needs no shaping.
    opened = ImageFont.truetype(io.BytesIO(data), _EM, layout_engine=ImageFont.Layout.BASIC)
    try:
        axes = opened.get_variation_axes()
    except OSError:  # not a variable font
        return opened
    opened.set_variation_by_axes(
        [_REGULAR if axis["name"] == b"Weight" else axis["default"] or 0 for axis in axes]
    )
    return opened


def draw(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image:
    """The letter, black on white: grey, IMAGE_SIZE a side.

    The box around its ink is centred, and its longer side is LETTER_SIZE pixels. Raises InputError
    for one without ink.
    """
    ink = Image.new("L", (4 * _EM, 4 * _EM), 0)
    # From a whole pixel: Pillow would shift the outline by what is left of any other.
    ImageDraw.Draw(ink).text((_EM, _EM), letter, fill=255, font=font)
    box = ink.getbbox()
    if box is None:
        raise InputError(
            f"the font {font.getname()[0]} draws nothing for {letter!r}; take it out of its table"
        )
    ink = ink.crop(box)
    scale = LETTER_SIZE / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    # One side, then the other: which Pillow takes first changes with its version, and the pixels
    # with that.
    narrow = ink.resize((width, ink.height), Image.Resampling.LANCZOS)
    small = narrow.resize((width, height), Image.Resampling.LANCZOS)
    page = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)
    page.paste(0, ((IMAGE_SIZE - width) // 2, (IMAGE_SIZE - height) // 2), mask=small)
    return page
