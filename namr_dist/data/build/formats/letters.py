"""letters: a class is a letter of one of six scripts, an image the letter in one family of fonts.

The pictures are made here, from fonts that `pip install 'namr-dist[letters]'` installs; their files
are those of letter_fonts.csv, by hash.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageFont

from namr_dist.atomic import write_atomic
from namr_dist.data.build.formats.glyphs import (
    IMAGE_SIZE,
    FontFile,
    draw,
    open_font,
    read_table,
)
from namr_dist.data.build.listing import Listing, SourceImage
from namr_dist.data.shardset.manifest import ImageClass
from namr_dist.errors import InputError

RANGES = {
    "Latin": ((0x0041, 0x00FF),),
    "Greek": ((0x0391, 0x03C9),),
    "Cyrillic": ((0x0400, 0x045F),),
    "Hebrew": ((0x05D0, 0x05EA),),
    "Arabic": ((0x0621, 0x063A), (0x0641, 0x064A)),
    "Devanagari": ((0x0905, 0x090C), (0x090F, 0x0911), (0x0913, 0x0939)),
}
"""Code points of each script, first and last, from which `letters_of` takes the letters."""
LOOK_ALIKES = {
    "Latin": "cijlosuvwxzø",
    "Greek": "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧορ",
    "Cyrillic": "ЅІЈАВГЕКМНОПРСТУФХабвгдежзиклмнопрстухцчшщъыьэюяєѕіјљњџ",
    "Hebrew": "\u05d5\u05d7\u05df\u05e1",  # vav, het, final nun, samekh
    "Arabic": "\u0627",  # alef
    "Devanagari": "",
}
"""Letters that make no class, for they are drawn like another at the size that all are given: small
letters like their own capital (z), and letters like one of the other case or of a script above (А).

How alike is too much, tests/data/build/test_letters.py states, and holds this list to it.
"""

_COUNTS = {
    "images": 3_469,
    "classes": 207,
    "categories": 6,
    "train images": 1_691,
    "train classes": 101,
    "val images": 402,
    "val classes": 23,
    "test images": 1_376,
    "test classes": 83,
}


def letters_of(script: str) -> list[str]:
    """A script's letters that make classes, by code point: those of its ranges that Unicode does
    not compose of others, such as an accent, without look-alikes."""
    found = [chr(code) for first, last in RANGES[script] for code in range(first, last + 1)]
    return [
        letter
        for letter in found
        if unicodedata.category(letter) in ("Lu", "Ll", "Lo")
        and not unicodedata.decomposition(letter)
        and letter not in LOOK_ALIKES[script]
    ]


def split_of(script: str) -> dict[str, str]:
    """Split of each of a script's letters.

    Of n, in the order of the SHA-256 of their UTF-8, the first n // 2 train, the next n // 8
    validate, and the others test.
    """
    drawn = sorted(letters_of(script), key=lambda letter: hashlib.sha256(letter.encode()).digest())
    train = len(drawn) // 2
    val = train + len(drawn) // 8
    return {
        letter: "train" if place < train else "val" if place < val else "test"
        for place, letter in enumerate(drawn)
    }


def read(source: Path) -> Listing:
    """Draw every letter in every font that has it into `source`, and list the pictures.

    `source` is a new folder or one of an earlier call; a picture that is there and right is left
    alone. Raises InputError for a file in its place, and for a font that is missing or another.
    """
    return draw_and_list(source, read_table())


def draw_and_list(source: Path, fonts: Sequence[FontFile]) -> Listing:
    """As `read`, in these fonts."""
    if source.exists() and not source.is_dir():
        raise InputError(f"{source} is no folder; give a new one, for the pictures of the letters")
    opened = [open_font(font) for font in fonts]  # all are sound before anything is drawn
    class_of = _classes()
    images = []
    for font, ready in zip(fonts, opened, strict=True):
        family = font.family.lower().replace(" ", "-")
        (source / family).mkdir(parents=True, exist_ok=True)
        for letter, entry in class_of.items():
            if entry.category in font.scripts and letter not in font.without:
                path = source / family / f"{ord(letter):04x}.png"
                _keep_or_write(path, _png(ready, letter))
                key = f"{family}_{path.stem}"
                images.append(SourceImage(path=path, key=key, label=entry.label, split=entry.split))
    drawn = {image.label for image in images}
    listing = Listing(
        name="letters",
        description=_description(fonts),
        root=source,
        classes=tuple(entry for entry in class_of.values() if entry.label in drawn),
        images=tuple(images),
        expected=_COUNTS,
    )
    listing.check()
    return listing


def _classes() -> dict[str, ImageClass]:
    """Each letter's class: label by script and code point, name as in Unicode."""
    splits = [
        (script, letter, split[letter])
        for script in RANGES
        for split in [split_of(script)]
        for letter in letters_of(script)
    ]
    return {
        letter: ImageClass(label=label, name=unicodedata.name(letter), category=script, split=split)
        for label, (script, letter, split) in enumerate(splits)
    }


def _png(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    file = io.BytesIO()
    draw(font, letter).save(file, "PNG")
    return file.getvalue()


def _keep_or_write(path: Path, data: bytes) -> None:
    """A file that keeps its time lets a build that was interrupted resume."""
    if not (path.is_file() and path.read_bytes() == data):
        write_atomic(path, data)


def _description(fonts: Sequence[FontFile]) -> str:
    licences = " and ".join(sorted({font.licence for font in fonts}))
    return (
        f"letters of {len(RANGES)} scripts at {IMAGE_SIZE} px, one image in each of {len(fonts)} "
        f"font families ({licences}) that has the script; by SHA-256 of the letter, half of a "
        "script's train, an eighth validate, the rest test, leave one out; fonts: letter_fonts.csv"
    )
