"""What the five Sweet Home 3D furniture catalogues hold, and whom to credit for each model.

A catalogue is a zip file (``*.sh3f``) with a Java properties file that numbers its entries
(``name#3=Bed``), the models themselves, and for the BlendSwap catalogues one licence note per
model folder. This module reads all of that into one :class:`Product` per model.
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from html import unescape
from pathlib import Path

PRODUCT_COUNT = 820
CATEGORIES = (
    "Bathroom",
    "Bedroom",
    "Characters",
    "Doors and windows",
    "Exterior",
    "Kitchen",
    "Lights",
    "Living room",
    "Miscellaneous",
    "Office",
    "Staircases",
    "Vehicles",
)
LICENCE_URLS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-3.0-US": "https://creativecommons.org/licenses/by/3.0/us/",
}
_CATALOGUE_LICENCES = {
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}
# The entries of these catalogues name a brand; the catalogues' licence texts name whom to credit.
_SCOPIA_CREDIT = "Emmanuel Puybaret / eTeks and Scopia Visual Interfaces Systems, s.l."
_FULL_CREDITS = {
    "Kator Legaz": "Andrew Kator & Jennifer Legaz",
    "Scopia": _SCOPIA_CREDIT,
    "Scopia & eTeks": _SCOPIA_CREDIT,
}
_ENTRY = re.compile(r"(\w+)#(\d+)\s*[=:]\s*(.*)")
_UNICODE_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
# The three layouts of Blend Swap's licence notes name the author in different places.
_AUTHOR_PATTERNS = (
    re.compile(r'^Thank you for downloading ".*" by (.+)$', re.MULTILINE),
    re.compile(r"<title>.* by (\S+) - \d+ - Creative Commons"),
    re.compile(r"Created by: *([^<\n]+)"),
)
_CSV_FIELDS = (
    "product_id",
    "name",
    "category",
    "creator",
    "licence",
    "licence_url",
    "catalogue",
    "source_model",
)


@dataclass(frozen=True)
class Product:
    """One model of a catalogue: its attribution, and where and how it is stored."""

    product_id: str
    name: str
    category: str
    creator: str
    licence: str
    catalogue: str
    source_model: str  # path of the OBJ file inside the archive
    archive: Path
    rotation: tuple[float, ...]  # row-major 3x3 matrix, to be applied to the vertices
    size: tuple[float, float, float]  # width (x), height (y), depth (z) in centimetres

    @property
    def licence_url(self) -> str:
        """Address of the licence's text."""
        return LICENCE_URLS[self.licence]


def read_products(catalogue_dir: Path) -> list[Product]:
    """Read every catalogue of ``catalogue_dir``, sorted by category, then by product id.

    Raises ValueError unless exactly the 820 known products come out, with unique ids, known
    categories and somebody to credit for each.
    """
    products: list[Product] = []
    for stem, licence in _CATALOGUE_LICENCES.items():
        path = catalogue_dir / f"{stem}.sh3f"
        if not path.is_file():
            raise ValueError(f"catalogue {path} is missing")
        products += _read_catalogue(path, licence)
    repeated = [key for key, count in Counter(p.product_id for p in products).items() if count > 1]
    if repeated:
        raise ValueError(f"product ids are not unique: {', '.join(sorted(repeated))}")
    if len(products) != PRODUCT_COUNT:
        raise ValueError(f"expected {PRODUCT_COUNT} products, the catalogues hold {len(products)}")
    for product in products:
        if product.category not in CATEGORIES:
            raise ValueError(f"{product.product_id}: unknown category {product.category!r}")
        if not product.creator:
            raise ValueError(f"{product.product_id}: nobody to credit")
    return sorted(products, key=lambda product: (product.category, product.product_id))


def write_products_csv(products: list[Product], path: Path) -> None:
    """Write the attribution table (UTF-8, one line per product) in the order given."""
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_CSV_FIELDS)
        writer.writerows([getattr(product, field) for field in _CSV_FIELDS] for product in products)
    os.replace(temporary, path)


def _read_catalogue(path: Path, licence: str) -> list[Product]:
    with zipfile.ZipFile(path) as archive:
        entries = _parse_entries(
            archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
        )
        notes = _licence_notes(archive)
        return [_product(path, entry, licence, notes) for entry in entries]


def _parse_entries(text: str) -> list[dict[str, str]]:
    """Group the numbered keys of a properties file: one dictionary per entry, in file order."""
    entries: dict[int, dict[str, str]] = {}
    for line in text.splitlines():
        match = _ENTRY.match(line)
        if match:
            value = _UNICODE_ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), match[3])
            entries.setdefault(int(match[2]), {})[match[1]] = value.strip()
    return list(entries.values())


def _licence_notes(archive: zipfile.ZipFile) -> dict[str, str]:
    """Text of the licence note of each model folder that has one, keyed by folder."""
    notes = {}
    for member in archive.namelist():
        folder, name = posixpath.split(member)
        if folder and "licen" in name.lower() and name.lower().endswith((".txt", ".html")):
            notes[folder] = archive.read(member).decode("utf-8", errors="replace").replace("\r", "")
    return notes


def _product(path: Path, entry: dict[str, str], licence: str, notes: dict[str, str]) -> Product:
    model = entry["model"].lstrip("/")
    note = notes.get(posixpath.dirname(model), "")
    # Two models of the CC0 catalogue carry a note that asks for attribution. Of the two
    # statements the stricter one is recorded; a CC0 note never relaxes a catalogue's licence.
    if licence == "CC0-1.0" and "Creative Commons Attribution" in note:
        licence = "CC-BY-3.0"
    # An underscore is kept out of the id because it sets off the view number in file names.
    local_id = entry["id"].split("#", 1)[1]
    product_id = re.sub(r"[^a-z0-9]+", "-", f"{path.stem}-{local_id}".lower()).strip("-")
    rotation = tuple(
        float(number) for number in entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()
    )
    if len(rotation) != 9:
        raise ValueError(f"{product_id}: modelRotation has {len(rotation)} numbers, not 9")
    return Product(
        product_id=product_id,
        name=entry["name"],
        category=entry["category"],
        creator=_credit(entry.get("creator", ""), note),
        licence=licence,
        catalogue=path.stem,
        source_model=model,
        archive=path,
        rotation=rotation,
        size=(float(entry["width"]), float(entry["height"]), float(entry["depth"])),
    )


def _credit(creator: str, note: str) -> str:
    """Whom to credit: the catalogue's creator, and the licence note's author where that differs."""
    matches = (pattern.search(note) for pattern in _AUTHOR_PATTERNS)
    author = next((unescape(match[1]).strip() for match in matches if match), "")
    if not creator:
        return author
    # "North.star" and "north star" are the same author.
    if re.sub(r"[\W_]", "", author).lower() in re.sub(r"[\W_]", "", creator).lower():
        return _FULL_CREDITS.get(creator, creator)
    return f"{creator} (licence note: {author})"
