"""Groups of items that show nearly the same: what is cleaned first in a catalogue.

By embeddings, which see what the network learnt to see: the same picture in another size, encoded
again or slightly cropped, and pictures that it cannot tell apart. data/shardset/near_duplicates.py
compares pixels, between the splits of a set.

Shapes: N items, M a sample of them, D width of z, P pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from namr_dist.errors import InputError
from namr_dist.gallery.gallery import Gallery
from namr_dist.gallery.page import template
from namr_dist.gallery.sheet import shown_small
from namr_dist.progress import counted
from namr_dist.retrieval.arrays import Float32, Float64, Int64
from namr_dist.retrieval.search import search_excluding_self

DEFAULT_RATIO = 0.3
"""Of the spacing, up to which two items count as near-duplicates; `near_duplicates` says why."""
SPACING_NEIGHBOUR = 10
"""The spacing is the median distance of an item to this neighbour."""
_SAMPLE = 2_000
_BLOCK = 1_024
_BLOCK_PAIRS = 2**26
"""At most, that a block of items may find before they are counted; 12 bytes each in faiss."""
_MOST_PAIRS = 20_000_000
_ROUNDING = 2.0**-23
_SHOWN_GROUPS, _SHOWN_ITEMS = 100, 12
_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class Group:
    """Items that are linked, one to the next, by pairs within the threshold."""

    ids: tuple[str, ...]
    labels: tuple[str | None, ...]
    paths: tuple[str, ...]
    least: float
    """distance of the nearest two"""
    most: float
    """of the farthest two that are linked: ends of a chain may be farther apart"""

    @property
    def different_labels(self) -> int:
        """Labels that are known; more than one is a mistake, or a look-alike."""
        return len({label for label in self.labels if label is not None})


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What was found."""

    name: str
    items: int
    threshold: float
    """sample distance, of unit vectors where the index compares by cosine"""
    spacing: float
    groups: tuple[Group, ...]
    """the largest first, then the nearest"""

    @property
    def about(self) -> str:
        """In a sentence or two."""
        inside = sum(len(group.ids) for group in self.groups)
        ratio = f", {self.threshold / self.spacing:.2g} of the spacing" if self.spacing else ""
        return (
            f"{len(self.groups):,} groups with {inside:,} of {self.items:,} items, within a distance of "
            f"{self.threshold:.4g}{ratio}. Half of the items have their "
            f"{SPACING_NEIGHBOUR}th neighbour within {self.spacing:.4g}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dataclasses.asdict(self)

    def page(self, gallery: Gallery) -> str:
        """A contact sheet of the first groups, as one HTML file that needs nothing else."""
        groups = [
            {
                "size": len(group.ids),
                "labels": group.different_labels,
                "least": group.least,
                "most": group.most,
                "pictures": [
                    (shown_small(gallery.picture, one), {"id": one, "label": label})
                    for one, label in list(zip(group.ids, group.labels, strict=True))[:_SHOWN_ITEMS]
                ],
                "more": max(0, len(group.ids) - _SHOWN_ITEMS),
            }
            for group in self.groups[:_SHOWN_GROUPS]
        ]
        return template("duplicates.html").render(
            name=self.name,
            about=f"{self.about}.",
            groups=groups,
            more=max(0, len(self.groups) - _SHOWN_GROUPS),
        )


def near_duplicates(
    gallery: Gallery,
    *,
    threshold: float | None = None,
    ratio: float | None = None,
    progress: bool = False,
) -> Duplicates:
    """All groups of items within `threshold` of one another by sample distance, whatever the mode
    of the index; None takes `ratio` times the spacing, by default DEFAULT_RATIO.

    How far apart two pictures of different things are is a matter of the network and the items, so
    the default is relative to the spacing, the median distance of an item to its tenth neighbour,
    which copies do not move unless most items have ten. On homeware's validation images, products
    that the network was not trained on, no image is within 0.3 of the spacing of one of another
    product, and of changed copies so many are near their original: JPEG quality 75, 85 %; 0.7 of
    the size, 87 %; 15 % brighter, 93 %; 4 % of width and height cut off, 99 %; mirrored, 94 %; half
    the size, 25 %, where 0.4 finds 69 % and 1 % of other products. Measured:
    tools/duplicate_recall.py.
    Exact; O(N²) time. Raises InputError for a threshold or ratio that is none, and where the
    threshold links more pairs than there is memory for.
    """
    for name, value in (("--threshold", threshold), ("--ratio", ratio)):
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"{name} is {value}; take a number from 0 on")
    if threshold is not None and ratio is not None:
        raise InputError("--threshold and --ratio are both given; give one")
    if len(gallery) < 2:
        raise InputError(f"{gallery.name} has {len(gallery)} items, of which none has another")
    z_ND = gallery.side(np.arange(len(gallery))).z
    z_ND = z_ND - z_ND.mean(axis=0)
    stored_ND = z_ND.astype(np.float32)
    spacing = _spacing(stored_ND)
    if threshold is None:
        threshold = (DEFAULT_RATIO if ratio is None else ratio) * spacing
    pairs_P2, distance_P = _pairs(z_ND, stored_ND, threshold, progress=progress)
    return Duplicates(
        name=gallery.name,
        items=len(gallery),
        threshold=threshold,
        spacing=spacing,
        groups=_groups(gallery, pairs_P2, distance_P),
    )


def _spacing(z_ND: Float32) -> float:
    neighbour = min(SPACING_NEIGHBOUR, len(z_ND) - 1)
    some_M = np.sort(np.random.default_rng(_SEED).permutation(len(z_ND))[:_SAMPLE])
    squared_MK, _ = search_excluding_self(z_ND[some_M], z_ND, neighbour, query_ids_Q=some_M)
    return float(np.median(np.sqrt(squared_MK[:, -1])))


def _pairs(
    z_ND: Float64, stored_ND: Float32, threshold: float, *, progress: bool
) -> tuple[Int64, Float64]:
    """(P, 2) ascending positions of all pairs within the threshold, and (P,) their distances."""
    import faiss

    index: Any = faiss.IndexFlatL2(stored_ND.shape[1])
    index.add(stored_ND)
    # faiss subtracts squares from each other, in fp32; what it finds is measured again.
    longest = float(np.linalg.norm(z_ND, axis=1).max())
    slack = (stored_ND.shape[1] + 8) * _ROUNDING * (2 * longest) ** 2
    # faiss takes what is nearer than the radius, not what is as near: copies are at 0.
    radius = float(np.nextafter(np.float32(threshold * threshold + slack), np.float32(np.inf)))
    rows = max(1, min(_BLOCK, _BLOCK_PAIRS // len(z_ND)))
    parts, distances, total = [np.empty((0, 2), dtype=np.int64)], [np.empty(0)], 0
    with counted("comparing", len(z_ND), "items", shown=progress) as bar:
        for start in range(0, len(z_ND), rows):
            block_BD = stored_ND[start : start + rows]
            limits, _, others_P = index.range_search(block_BD, radius)
            own_P = start + np.repeat(np.arange(len(block_BD)), np.diff(limits.astype(np.int64)))
            after_P = own_P < others_P
            own_P, others_P = own_P[after_P], others_P[after_P]
            distance_P = _distances(z_ND, own_P, others_P)
            near_P = distance_P <= threshold
            parts.append(np.stack([own_P[near_P], others_P[near_P]], axis=1))
            distances.append(distance_P[near_P])
            total += int(near_P.sum())
            if total > _MOST_PAIRS:
                raise InputError(
                    f"more than {_MOST_PAIRS:,} pairs lie within {threshold:.4g}; take a smaller --threshold "
                    "or --ratio"
                )
            bar.advance(len(block_BD))
    return np.concatenate(parts), np.concatenate(distances)


def _distances(z_ND: Float64, own_P: Int64, others_P: Int64) -> Float64:
    distance_P = np.empty(len(own_P))
    step = 2**16
    for start in range(0, len(own_P), step):
        block = slice(start, start + step)
        distance_P[block] = np.linalg.norm(z_ND[own_P[block]] - z_ND[others_P[block]], axis=1)
    return distance_P


def _groups(gallery: Gallery, pairs_P2: Int64, distance_P: Float64) -> tuple[Group, ...]:
    if not len(pairs_P2):
        return ()
    count = len(gallery)
    linked = coo_array((np.ones(len(pairs_P2)), (pairs_P2[:, 0], pairs_P2[:, 1])), (count, count))
    _, group_N = connected_components(linked, directed=False)
    group_P = group_N[pairs_P2[:, 0]]
    numbers_G, first_P = np.unique(group_P, return_inverse=True)
    least_G, most_G = np.full(len(numbers_G), np.inf), np.zeros(len(numbers_G))
    np.minimum.at(least_G, first_P, distance_P)
    np.maximum.at(most_G, first_P, distance_P)
    members: dict[int, list[int]] = {int(number): [] for number in numbers_G}
    for position in np.unique(pairs_P2).tolist():
        members[int(group_N[position])].append(position)
    items = gallery.items
    groups = [
        Group(
            ids=tuple(items.ids[one] for one in members[int(number)]),
            labels=tuple(items.labels[one] for one in members[int(number)]),
            paths=tuple(items.path(one) for one in members[int(number)]),
            least=float(least),
            most=float(most),
        )
        for number, least, most in zip(numbers_G, least_G, most_G, strict=True)
    ]
    return tuple(sorted(groups, key=lambda group: (-len(group.ids), group.least, group.ids)))
