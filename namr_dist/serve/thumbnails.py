"""Small JPEGs of indexed pictures, made when they are first asked for."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from dataclasses import dataclass

from PIL import Image

SIDE = 256
"""Most pixels on a side of a thumbnail."""
_QUALITY = 85
_MOST_KEPT = 1024
"""Thumbnails, of 20 kB at most or so."""


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A JPEG, and a name for its bytes that changes when they do."""

    jpeg: bytes
    etag: str


def thumbnail_of(picture: Image.Image) -> Thumbnail:
    """The picture on SIDE pixels at most; a smaller one keeps its size."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), reducing_gap=3.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=_QUALITY)
    jpeg = file.getvalue()
    return Thumbnail(jpeg=jpeg, etag=f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"')


class Thumbnails:
    """The thumbnails that were asked for last, by the id of their item. For one thread at a
    time."""

    def __init__(self, most: int = _MOST_KEPT) -> None:
        self._most = most
        self._kept: OrderedDict[str, Thumbnail] = OrderedDict()

    def get(self, id: str) -> Thumbnail | None:
        """The one that is kept for an item, if it is."""
        if id in self._kept:
            self._kept.move_to_end(id)
        return self._kept.get(id)

    def keep(self, id: str, thumbnail: Thumbnail) -> None:
        """Keep one, and no longer the one that was asked for longest ago if there are too many."""
        self._kept[id] = thumbnail
        self._kept.move_to_end(id)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
