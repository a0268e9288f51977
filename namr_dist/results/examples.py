"""Pictures for the report: searches as rows of pictures.

A class is always named with its number: names repeat within a set.
Shapes: N test images.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from namr_dist.data.shardset.shards import MOST_PIXELS
from namr_dist.errors import InputError
from namr_dist.results.class_figures import ClassFigures
from namr_dist.results.searches import (
    NEIGHBOURS,
    Searches,
    confused_pairs,
    hubs,
    worst_classes,
)
from namr_dist.retrieval.arrays import Int64
from namr_dist.retrieval.modes import SAMPLE

_QUERIES_OF_EACH_KIND = 5
_WORST, _PAIRS, _HUBS = 5, 5, 4
"""rows of each"""
_COUPLES = 4
"""pictures of a query with what it finds first, in a row"""


@dataclass(frozen=True, kw_only=True)
class _Size:
    """How large a picture may be."""

    side_px: int
    as_is_bytes: int
    """JPEGs up to this are taken as they are"""
    quality: int


_LARGE = _Size(side_px=160, as_is_bytes=12_000, quality=85)
_SMALL = _Size(side_px=96, as_is_bytes=2_500, quality=80)
"""of which a page has many"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the page."""

    uri: str
    alt: str
    caption: str
    name: str
    """of its class, which may be cut off"""
    number: str
    """of its class, which is not"""
    kind: str = ""
    """"right" or "wrong"; of a query neither"""
    distance: str = ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query, and the nearest images it finds, in order."""

    query: Picture
    neighbours: list[Picture]
    relevant: int
    """how many right answers exist"""


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """What was found of a class, a pair of classes or an item, with pictures."""

    title: str
    facts: list[str]
    couples: list[tuple[Picture, Picture]]
    """a query, and what it finds first"""
    lead: Picture | None = None
    pictures: list[Picture]


def class_title(name: str, label: int) -> str:
    """A class by its name and number."""
    return f"{name} #{label}".strip()


def data_uri(jpeg: bytes, name: str, size: _Size = _LARGE) -> str:
    """An image as a data URI: JPEGs up to 12 kB as they are, all else as a JPEG of at most 160 px.

    Raises InputError where the bytes are no image.
    """
    if not jpeg.startswith(b"\xff\xd8") or len(jpeg) > size.as_is_bytes:
        try:
            # Pillow runs a program to read some other formats.
            with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(
                        f"{image.width} × {image.height} pixels are more than {MOST_PIXELS:,}"
                    )
                small = image.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(
                f"image of {name!r} cannot be read ({error}): verify the data set"
            ) from None
        small.thumbnail((size.side_px, size.side_px))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=size.quality)
        jpeg = buffer.getvalue()
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


class Album:
    """The test images as pictures of the page, and rows of them."""

    def __init__(
        self,
        searches: Searches,
        load_jpeg: Callable[[int], bytes],
        names: Sequence[str],
        labels_N: Int64,
    ) -> None:
        """names: of each image's class; load_jpeg gives the image file of an index."""
        self._searches, self._load, self._names = searches, load_jpeg, names
        self._labels = labels_N.tolist()
        self._name_of = dict(zip(self._labels, names, strict=True))

    def title(self, label: int) -> str:
        """A class by its name and number."""
        return class_title(self._name_of.get(label, ""), label)

    def examples(self, *, seed: int) -> tuple[list[Example], list[Example]]:
        """Queries whose first neighbour is right, and queries where it is wrong.

        About ten queries, half of each kind where both exist, drawn by the seed from the queries
        that have a right answer; no class twice.
        """
        searches = self._searches
        drawn = np.random.default_rng(seed).permutation(np.flatnonzero(searches.relevant_Q > 0))
        kinds: dict[bool, list[int]] = {True: [], False: []}
        taken: set[int] = set()
        for query in drawn.tolist():
            kind = kinds[bool(searches.right_QK[query, 0])]
            label = int(searches.query_label_Q[query])
            if len(kind) < 2 * _QUERIES_OF_EACH_KIND and label not in taken:
                kind.append(query)
                taken.add(label)
        # A kind that is rare leaves its share to the other.
        both = 2 * _QUERIES_OF_EACH_KIND
        right = kinds[True][: both - min(len(kinds[False]), _QUERIES_OF_EACH_KIND)]
        wrong = kinds[False][: both - len(right)]
        return [self._example(query) for query in right], [self._example(query) for query in wrong]

    def worst(self, figures: ClassFigures) -> list[PictureRow]:
        """The classes with the lowest R@1, those with a wrong first neighbour alone."""
        searches, rows = self._searches, []
        of_sample = figures.rows[SAMPLE.name]
        for place in worst_classes(figures)[:_WORST]:
            if of_sample["R@1"][place] >= 100:
                break
            label = figures.label_C[place]
            queries_M = np.flatnonzero(
                (searches.query_label_Q == label) & (searches.relevant_Q > 0)
            )
            # Wrong ones first, the nearest of them before all.
            order_M = np.lexsort(
                (searches.distance_QK[queries_M, 0], searches.right_QK[queries_M, 0])
            )
            rows.append(
                PictureRow(
                    title=self.title(label),
                    facts=[
                        f"R@1 {of_sample['R@1'][place]:.1f}",
                        f"MAP@R {of_sample['MAP@R'][place]:.1f}",
                        _counted(len(queries_M), "query", "queries"),
                    ],
                    couples=list(self._couples(queries_M[order_M].tolist())),
                    pictures=[],
                )
            )
        return rows

    def confused(self) -> list[PictureRow]:
        """The pairs of classes that are taken for each other most often."""
        return [
            PictureRow(
                title=" ↔ ".join(map(self.title, pair.labels)),
                facts=[
                    f"{len(pair.wrong)} of {_counted(pair.queries, 'query', 'queries')} "
                    f"find{'s' * (len(pair.wrong) == 1)} the other class first"
                ],
                couples=list(self._couples(pair.wrong)),
                pictures=[],
            )
            for pair in confused_pairs(self._searches, _PAIRS)
        ]

    def hubs(self) -> tuple[list[PictureRow], str]:
        """The images that come up in the most searches, and how that compares with all others."""
        searches = self._searches
        found, found_G = hubs(searches, _HUBS)
        rows = []
        for hub in found:
            image = int(searches.sides.item_G[hub.item])
            pictures = []
            for query in hub.queries[:NEIGHBOURS]:
                place = int(np.flatnonzero(searches.ranked_QK[query] == hub.item)[0])
                pictures.append(self._found_by(query, place))
            title = self.title(self._labels[image])
            rows.append(
                PictureRow(
                    title=title,
                    facts=[
                        f"found by {_counted(hub.found, 'query', 'queries')}, "
                        f"{hub.wrong} of other classes"
                    ],
                    couples=[],
                    lead=self._picture(image, f"Hub: {title}", "hub", size=_SMALL),
                    pictures=pictures,
                )
            )
        share = (
            f"On average an image is among the first {NEIGHBOURS} of {found_G.mean():.1f} queries; "
            f"{int((found_G == 0).sum()):,} of the {len(found_G):,} images searched are among those of none."
        )
        return rows, share

    def _couples(self, queries: Sequence[int]) -> Iterator[tuple[Picture, Picture]]:
        searches, shown = self._searches, set[frozenset[int]]()
        for query in queries:
            image = int(searches.sides.query_Q[query])
            found = int(searches.sides.item_G[searches.ranked_QK[query, 0]])
            # Two images that find each other first are shown once.
            if len(shown) == _COUPLES or frozenset((image, found)) in shown:
                continue
            shown.add(frozenset((image, found)))
            title = self.title(int(searches.query_label_Q[query]))
            asking = self._picture(image, f"Query: {title}", "query", size=_SMALL)
            yield asking, self._neighbour(query, 0, "→ ", size=_SMALL)

    def _example(self, query: int) -> Example:
        searches = self._searches
        found = np.flatnonzero(searches.ranked_QK[query, :NEIGHBOURS] >= 0)
        image = int(searches.sides.query_Q[query])
        return Example(
            query=self._picture(image, f"Query: {self.title(self._labels[image])}", "query"),
            neighbours=[self._neighbour(query, place, f"{place + 1} ") for place in found.tolist()],
            relevant=int(searches.relevant_Q[query]),
        )

    def _neighbour(self, query: int, place: int, caption: str, size: _Size = _LARGE) -> Picture:
        searches = self._searches
        right = bool(searches.right_QK[query, place])
        asking = self.title(int(searches.query_label_Q[query]))
        image = int(searches.sides.item_G[searches.ranked_QK[query, place]])
        return self._picture(
            image,
            f"Neighbour {place + 1} of {asking}, {'right' if right else 'wrong'}: "
            f"{self.title(self._labels[image])}",
            f"{caption}{'✓' if right else '✗'}",
            kind="right" if right else "wrong",
            distance=_distance(float(searches.distance_QK[query, place])),
            size=size,
        )

    def _found_by(self, query: int, place: int) -> Picture:
        """A query that has a hub at this place."""
        searches = self._searches
        right = bool(searches.right_QK[query, place])
        image = int(searches.sides.query_Q[query])
        return self._picture(
            image,
            f"Query that finds it at place {place + 1}, {'right' if right else 'wrong'}: "
            f"{self.title(self._labels[image])}",
            f"place {place + 1} {'✓' if right else '✗'}",
            kind="right" if right else "wrong",
            distance=_distance(float(searches.distance_QK[query, place])),
            size=_SMALL,
        )

    def _picture(
        self,
        image: int,
        alt: str,
        caption: str,
        *,
        kind: str = "",
        distance: str = "",
        size: _Size = _LARGE,
    ) -> Picture:
        name, label = self._names[image], self._labels[image]
        return Picture(
            uri=data_uri(self._load(image), class_title(name, label), size),
            alt=alt,
            caption=caption,
            name=name,
            number=f"#{label}",
            kind=kind,
            distance=distance,
        )


def _distance(value: float) -> str:
    """With three digits, as far as those are of use."""
    return f"{value:#.3g}" if 1e-4 <= value < 100 else f"{value:.3g}"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
