"""Write the table of the fonts of `letters`: those of the installed packages fontpkg-*.

    python tools/letter_fonts.py        # with fontTools, which matplotlib brings

Of a family, its upright file of regular weight, or the variable one. Latin, Greek and Cyrillic are
drawn from the families that have all letters of Latin and Greek (and of Cyrillic, for that), so
that Latin letters which other families borrowed are not there twice; Hebrew, Arabic and
Devanagari from all that have them in full. Of two letters that one font draws alike, as some do Λ
and Л, only the first is drawn from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont

from namr_dist.csv_file import write_csv
from namr_dist.data.build.formats.glyphs import TABLE, FontFile, draw, open_font
from namr_dist.data.build.formats.letters import RANGES, letters_of

_PACKAGE = re.compile(r"fontpkg-.+")
_LEVELS = 8
"""Of 255: two pictures that differ nowhere by more are one."""
_WITH_GREEK = ("Latin", "Greek", "Cyrillic")


def row(distribution: metadata.Distribution) -> FontFile:
    """The line of one package."""
    folder = distribution.name.replace("-", "_")
    root = Path(str(distribution.locate_file(folder)))
    facts = json.loads((root / "metadata.json").read_text(encoding="utf-8"))
    (file,) = (
        entry["path"]
        for entry in facts["files"]
        if entry["style"] == "normal" and (entry["variable"] or entry["weight"] == 400)
    )
    has = TTFont(root / file).getBestCmap().keys()
    scripts = [script for script in RANGES if not set(map(ord, letters_of(script))) - has]
    if "Greek" not in scripts:
        scripts = [script for script in scripts if script not in _WITH_GREEK]
    font = FontFile(
        family=facts["family"],
        package=distribution.name,
        version=distribution.version,
        licence=facts["license"],
        file=f"{folder}/{file}",
        sha256=hashlib.sha256((root / file).read_bytes()).hexdigest(),
        scripts=tuple(scripts),
    )
    return dataclasses.replace(font, without=drawn_alike(font))


def drawn_alike(font: FontFile) -> str:
    """Letters whose picture is that of an earlier one, to within _LEVELS."""
    opened = open_font(font)
    pictures: list[np.ndarray] = []
    alike = ""
    for letter in (one for script in font.scripts for one in letters_of(script)):
        pixels = np.asarray(draw(opened, letter)).astype(int)
        if any(abs(pixels - other).max() <= _LEVELS for other in pictures):
            alike += letter
        pictures.append(pixels)
    return alike


def main() -> None:
    """Write the table into the package."""
    fonts = [
        row(distribution)
        for distribution in metadata.distributions()
        if _PACKAGE.fullmatch(distribution.name)
    ]
    used = sorted((font for font in fonts if font.scripts), key=lambda font: font.package)
    rows = [{**dataclasses.asdict(font), "scripts": " ".join(font.scripts)} for font in used]
    write_csv(TABLE, rows)
    print(f"{TABLE}: {len(used)} of {len(fonts)} families")


if __name__ == "__main__":
    main()
