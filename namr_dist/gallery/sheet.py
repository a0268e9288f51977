"""Pictures of a search's result: a contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from namr_dist.data.picture import Picture
from namr_dist.errors import ReportedError
from namr_dist.gallery.items import Hit
from namr_dist.gallery.page import template
from namr_dist.gallery.pictures import name_of, shown_picture
from namr_dist.text import printable

_SIDE, _GAP, _LINE, _COLUMNS = 160, 12, 16, 7
_PAPER, _INK, _FAINT = "white", "#1c1c1c", "#6b6b6b"
_LONGEST = 24
"""Letters of a line under a picture."""


Pictures = Callable[[str], Image.Image]
"""id of an item → its picture; InputError where it cannot be had"""


def contact_sheet(picture: Picture, hits: Sequence[Hit], pictures: Pictures) -> Image.Image:
    """The query, framed, and its hits, nearest first, in rows of seven. A hit whose picture cannot
    be shown leaves its place grey."""
    cells: list[tuple[Image.Image | None, str, str]] = [(shown_picture(picture), "query", "")]
    for hit in hits:
        try:
            shown: Image.Image | None = pictures(hit.id)
        except ReportedError:
            shown = None
        cells.append((shown, hit.label or hit.id, f"{hit.distance:.3g}"))
    columns = min(len(cells), _COLUMNS)
    rows = -(-len(cells) // columns)
    step_x, step_y = _SIDE + _GAP, _SIDE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for number, (shown, name, distance) in enumerate(cells):
        left = _GAP + number % columns * step_x
        top = _GAP + number // columns * step_y
        box = (left, top, left + _SIDE - 1, top + _SIDE - 1)
        if shown is None:
            draw.rectangle(box, fill="#e4e4e4")
        else:
            fitted = ImageOps.contain(shown, (_SIDE, _SIDE))
            sheet.paste(
                fitted, (left + (_SIDE - fitted.width) // 2, top + (_SIDE - fitted.height) // 2)
            )
        if number == 0:
            draw.rectangle(
                (left - 3, top - 3, left + _SIDE + 2, top + _SIDE + 2), outline=_INK, width=2
            )
        name = printable(name)
        name = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        draw.text((left, top + _SIDE + 2), name, _INK, font=font)
        draw.text((left, top + _SIDE + 2 + _LINE), distance, _FAINT, font=font)
    return sheet


def search_page(
    name: str,
    about: str,
    queries: Sequence[Picture],
    found: Sequence[Sequence[Hit]],
    pictures: Pictures,
) -> str:
    """The same for several queries as one HTML file that needs nothing else."""
    rows = [
        {
            "query": _data_url(shown_picture(query)),
            "name": name_of(query, number),
            "hits": [(shown_small(pictures, hit.id), hit) for hit in hits],
        }
        for number, (query, hits) in enumerate(zip(queries, found, strict=True))
    ]
    return template("search.html").render(name=name, about=about, rows=rows)


def shown_small(pictures: Pictures, id: str) -> str | None:
    """A data URL of an item's picture; None where it cannot be had."""
    try:
        return _data_url(pictures(id))
    except ReportedError:
        return None


def _data_url(picture: Image.Image) -> str:
    small = ImageOps.contain(picture, (_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
