"""letters: which letters are classes, which split each is of, what is drawn, and from which fonts.

The fonts of the set itself are not needed here: its table says what they have, and others are drawn
from in their place, DejaVu of matplotlib and one that is made here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib.tables.TupleVariation import TupleVariation
from PIL import Image
from scipy.ndimage import gaussian_filter

from namr_dist.cli.main import main
from namr_dist.data.build.build import BuildOptions, build
from namr_dist.data.build.formats import letters
from namr_dist.data.build.formats.glyphs import FontFile, draw, open_font, read_table
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.errors import InputError
from namr_dist.recipes.homeware import homeware
from namr_dist.recipes.letters import letters as recipe

OWN_CAPITAL, OTHER = 0.92, 0.95
"""Cosine of two blurred pictures from which letters are look-alikes: the cases of one letter, whose
strokes differ in weight at one size, and any others."""
BLUR = 3.0
"""Standard deviation of the blur in pixels, about half a stroke."""


def dejavu(name: str, scripts: str) -> FontFile:
    file = f"matplotlib/mpl-data/fonts/ttf/{name}.ttf"
    distribution = metadata.distribution("matplotlib")
    data = Path(str(distribution.locate_file(file))).read_bytes()
    return FontFile(
        family=name,
        package="matplotlib",
        version=distribution.version,
        licence="Bitstream-Vera",
        file=file,
        sha256=hashlib.sha256(data).hexdigest(),
        scripts=tuple(scripts.split()),
    )


def test_letters_are_left_out_by_what_they_look_like() -> None:
    """A letter of the ranges makes a class unless it is drawn as its own capital, or as one of a
    group before it is; capitals are a group of each script, small letters the next. In DejaVu Sans,
    which has no Devanagari."""
    font = open_font(dejavu("DejaVuSans", ""))
    before: dict[str, np.ndarray] = {}
    for script, ranges in letters.RANGES.items():
        simple = [
            chr(code)
            for first, last in ranges
            for code in range(first, last + 1)
            if unicodedata.normalize("NFKD", chr(code)) == chr(code)
        ]
        left_out = set()
        for case in ("Lu", "Ll", "Lo") if script != "Devanagari" else ():
            group = {}
            for letter in (one for one in simple if unicodedata.category(one) == case):
                ink = gaussian_filter(255.0 - np.asarray(draw(font, letter)), BLUR).ravel()
                group[letter] = ink / np.linalg.norm(ink)
                alike = {other: float(group[letter] @ ink) for other, ink in before.items()}
                if max(alike.values(), default=0) >= OTHER:
                    left_out.add(letter)
                if alike.get(letter.upper(), 0) >= OWN_CAPITAL:
                    left_out.add(letter)
            before |= group
        assert "".join(sorted(left_out)) == "".join(sorted(letters.LOOK_ALIKES[script]))
        kept = set(letters.letters_of(script))
        assert kept == {one for one in simple if one.isalpha()} - left_out


def test_counts_are_those_of_the_docs() -> None:
    classes = {script: len(letters.letters_of(script)) for script in letters.RANGES}
    assert classes == {
        "Latin": 49,
        "Greek": 33,
        "Cyrillic": 25,
        "Hebrew": 23,
        "Arabic": 30,
        "Devanagari": 47,
    }
    fonts = read_table()
    images = Counter(script for font in fonts for script in font.scripts)
    assert images == {
        "Latin": 25,
        "Greek": 25,
        "Cyrillic": 24,
        "Hebrew": 9,
        "Arabic": 8,
        "Devanagari": 8,
    }
    by_split = Counter()
    alike = "".join(font.without for font in fonts)
    for script, number in images.items():
        for letter, split in letters.split_of(script).items():
            by_split[f"{split} classes"] += 1
            by_split[f"{split} images"] += number - alike.count(letter)
    assert by_split == {
        "train classes": 101,
        "train images": 1_691,
        "val classes": 23,
        "val images": 402,
        "test classes": 83,
        "test images": 1_376,
    }


def test_the_table_names_open_fonts_by_hash_one_a_family() -> None:
    fonts = read_table()
    assert len({font.family for font in fonts}) == len({font.sha256 for font in fonts}) == 45
    assert {font.licence for font in fonts} == {"OFL-1.1", "Apache-2.0"}
    for font in fonts:
        assert len(bytes.fromhex(font.sha256)) == 32 and font.scripts
        assert font.file.startswith(font.package.replace("-", "_") + "/files/")


def test_the_split_is_a_function_of_the_letter() -> None:
    drawn: dict[str, str] = {}
    for letter, split in letters.split_of("Cyrillic").items():
        drawn[split] = drawn.get(split, "") + letter
    assert drawn == {"train": "ЊћЉЋЏЄЯДШЮЪЫ", "val": "фЗђ", "test": "ЭЛЂИЖЧБЬЦЩ"}
    digests = [
        [hashlib.sha256(letter.encode("utf-8")).hexdigest() for letter in drawn[split]]
        for split in ("train", "val", "test")
    ]
    assert [len(part) for part in digests] == [25 // 2, 25 // 8, 10]
    assert max(digests[0]) < min(digests[1]) and max(digests[1]) < min(digests[2])


def test_a_letter_fills_the_middle() -> None:
    font = open_font(dejavu("DejaVuSans", ""))
    for letter in "Ijшם\u0641":
        pixels = np.asarray(draw(font, letter))
        assert pixels.shape == (112, 112) and pixels.min() < 16
        rows, columns = np.nonzero((pixels < 250).any(1))[0], np.nonzero((pixels < 250).any(0))[0]
        spans = [(side[0], side[-1]) for side in (rows, columns)]
        assert 77 <= max(last - first + 1 for first, last in spans) <= 78
        assert all(abs(first + last - 111) <= 2 for first, last in spans)
    with pytest.raises(InputError, match=r"draws nothing for ' '"):
        draw(font, " ")


def test_pictures_become_a_shard_set(tmp_path: Path) -> None:
    serif = dataclasses.replace(dejavu("DejaVuSerif", "Greek"), without="\u03a9")
    fonts = [dejavu("DejaVuSans", "Greek Hebrew"), serif]
    source = tmp_path / "pictures"
    listing = letters.draw_and_list(source, fonts)
    assert len(listing.images) == 2 * 33 - 1 + 23 and len(listing.classes) == 33 + 23
    files = {path: path.read_bytes() for path in source.rglob("*.png")}
    assert sorted(files) == sorted(image.path for image in listing.images)
    built = build(listing, tmp_path / "shards", BuildOptions())
    assert verify_shards(built.manifest, built.manifest.splits, decode=True) == 88
    for entry in built.manifest.classes:
        letter = unicodedata.lookup(entry.name)
        assert entry.split == letters.split_of(entry.category)[letter]

    first, second = sorted(files)[:2]
    Image.new("L", (112, 112)).save(first)
    time = second.stat().st_mtime_ns
    assert letters.draw_and_list(source, fonts) == listing
    assert {path: path.read_bytes() for path in source.rglob("*.png")} == files
    assert second.stat().st_mtime_ns == time  # or a build that broke off would begin again
    assert letters.draw_and_list(tmp_path / "again", fonts).images != listing.images
    assert sorted(path.read_bytes() for path in (tmp_path / "again").rglob("*.png")) == sorted(
        files.values()
    )


def test_no_other_font_is_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    font = bar_font(tmp_path, monkeypatch)
    file = tmp_path / font.file
    for changed, named in (
        (
            {"package": "fontpkg-of-nobody"},
            r"fontpkg-of-nobody, which is not installed; pip .*letter",
        ),
        (
            {"file": "bars/none.ttf"},
            r"none\.ttf.* cannot be read \(No such .*pip install .*bars==1\.5",
        ),
        ({"sha256": "0" * 64}, rf"{font.sha256}, not 0{{64}} as in 1\.5; pip install .*bars==1\.5"),
    ):
        with pytest.raises(InputError, match=named):
            letters.draw_and_list(tmp_path / "pictures", [dataclasses.replace(font, **changed)])
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"bars 1\.5, has the SHA-256"):
        open_font(font)
    assert not (tmp_path / "pictures").exists()


def test_a_variable_font_is_drawn_at_its_regular_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar is 100 units wide at weight 100, its default, and 900 at 900, of 1000 high."""
    pixels = np.asarray(draw(open_font(bar_font(tmp_path, monkeypatch)), "A"))
    assert (255.0 - pixels).sum() / 255 == pytest.approx(78 * 78 * 0.4, rel=0.02)


def test_a_file_is_no_place_for_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(
        ["shards", "build", "letters", str(tmp_path / "file"), "--out", str(tmp_path / "o")]
    )
    assert "is no folder; give a new one" in capsys.readouterr().err


def test_the_recipe_is_that_of_homeware() -> None:
    config = recipe()
    assert config.data.path == "shards/letters" and config.recipe == "letters"
    data = dataclasses.replace(config.data, path=None)
    assert dataclasses.replace(config, recipe="homeware", data=data) == homeware()
    assert (config.data.classes_per_batch, config.data.images_per_class) == (20, 4)


def bar_font(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FontFile:
    """A variable font of one letter, in an installed package of its own."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (100, 1000), (100, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "A"])
    builder.setupCharacterMap({ord("A"): "A"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "A": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "A": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Thin"})
    builder.setupFvar([("wght", 100, 100, 900, "Weight")], [])
    wider = [(0, 0), (0, 0), (800, 0), (800, 0), *[(0, 0)] * 4]
    builder.setupGvar({"A": [TupleVariation({"wght": (0, 1, 1)}, wider)]})
    builder.setupOS2()
    builder.setupPost()
    (folder / "bars").mkdir()
    (folder / "bars-1.5.dist-info").mkdir()
    (folder / "bars-1.5.dist-info" / "METADATA").write_text("Name: bars\nVersion: 1.5\n")
    builder.save(folder / "bars" / "Bars.ttf")
    monkeypatch.syspath_prepend(str(folder))
    return FontFile(
        family="Bars",
        package="bars",
        version="1.5",
        licence="CC0-1.0",
        file="bars/Bars.ttf",
        sha256=hashlib.sha256((folder / "bars" / "Bars.ttf").read_bytes()).hexdigest(),
        scripts=("Latin",),
    )
