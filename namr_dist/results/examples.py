"""Pictures for the report: queries with their neighbours, and a map of all embeddings.

Shapes: N test images, Q of them queries, G of them searched, D width, K neighbours, P points on the
map.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image
from threadpoolctl import threadpool_limits

from namr_dist.data.shardset.shards import MOST_PIXELS
from namr_dist.errors import InputError
from namr_dist.results.charts import HUES, SHAPES, marker, scatter
from namr_dist.retrieval.arrays import Float64, Int64
from namr_dist.retrieval.metrics import relevance, relevant_counts
from namr_dist.retrieval.roles import Division
from namr_dist.retrieval.search import search_excluding_self
from namr_dist.retrieval.vectors import sample_vectors

NEIGHBOURS = 8
_QUERIES_OF_EACH_KIND = 5
_EMBEDDED_AS_IS_BYTES = 12_000
_THUMBNAIL_SIDE = 160
_MAP_POINTS = 2_500
_TSNE_LEAST_POINTS = 50
_GROUPS = HUES * SHAPES


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the page."""

    uri: str
    name: str
    alt: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query, and the nearest images it finds, in order."""

    query: Picture
    neighbours: list[Picture]
    relevant: int
    """how many right answers exist"""


@dataclass(frozen=True, kw_only=True)
class EmbeddingMap:
    """The map, its legend, and how it was made."""

    svg: Markup
    legend: list[tuple[Markup, str]]
    method: str


def data_uri(jpeg: bytes, name: str) -> str:
    """An image as a data URI: JPEGs up to 12 kB as they are, all else as a JPEG of at most 160 px.

    Raises InputError where the bytes are no image.
    """
    if not jpeg.startswith(b"\xff\xd8") or len(jpeg) > _EMBEDDED_AS_IS_BYTES:
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
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        jpeg = buffer.getvalue()
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def neighbour_examples(
    z_ND: Float64,
    labels_N: Int64,
    sides: Division,
    load_jpeg: Callable[[int], bytes],
    names: Sequence[str],
    *,
    cosine: bool,
    seed: int,
) -> tuple[list[Example], list[Example]]:
    """Queries whose first neighbour is right, and queries where it is wrong.

    About ten queries, half of each kind where both exist, drawn by the seed from the queries that
    have a right answer; no class twice. Neighbours are those of the sample mode.
    """
    query_labels_Q, item_labels_G = labels_N[sides.query_Q], labels_N[sides.item_G]
    served = sample_vectors(z_ND[sides.query_Q], z_ND[sides.item_G], cosine=cosine)
    _, ranked_QK = search_excluding_self(
        served.queries_QV,
        served.items_NV,
        NEIGHBOURS,
        query_ids_Q=sides.own_Q,
        metric=served.metric,
    )
    right_QK = relevance(ranked_QK, query_labels_Q, item_labels_G)
    relevant_Q = relevant_counts(query_labels_Q, item_labels_G, query_ids_Q=sides.own_Q)
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(relevant_Q > 0))
    kinds: dict[bool, list[int]] = {True: [], False: []}
    taken: set[int] = set()
    for query in drawn.tolist():
        kind = kinds[bool(right_QK[query, 0])]
        if len(kind) < 2 * _QUERIES_OF_EACH_KIND and int(query_labels_Q[query]) not in taken:
            kind.append(query)
            taken.add(int(query_labels_Q[query]))
    # A kind that is rare leaves its share to the other.
    right = kinds[True][: 2 * _QUERIES_OF_EACH_KIND - min(len(kinds[False]), _QUERIES_OF_EACH_KIND)]
    wrong = kinds[False][: 2 * _QUERIES_OF_EACH_KIND - len(right)]

    def picture(image: int, caption: str, *, right: bool) -> Picture:
        name = names[image]
        return Picture(
            uri=data_uri(load_jpeg(image), name), name=name, alt=f"{caption}: {name}", right=right
        )

    def example(query: int) -> Example:
        image = int(sides.query_Q[query])
        neighbours = []
        for rank, (item, good) in enumerate(
            zip(ranked_QK[query], right_QK[query], strict=True), start=1
        ):
            if item >= 0:
                caption = f"Neighbour {rank} of {names[image]}, {'right' if good else 'wrong'}"
                neighbours.append(picture(int(sides.item_G[item]), caption, right=bool(good)))
        return Example(
            query=picture(image, "Query", right=True),
            neighbours=neighbours,
            relevant=int(relevant_Q[query]),
        )

    return [example(query) for query in right], [example(query) for query in wrong]


def embedding_map(
    z_ND: Float64, names: Sequence[str], categories: Sequence[str], *, seed: int
) -> EmbeddingMap | None:
    """The embeddings in two dimensions, marked by super-category; None where all points coincide.

    t-SNE of at most 2,500 images drawn by the seed, some 5 s on one core; PCA below 50 images.
    """
    # Seconds of imports, which only a report needs.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen_P = np.arange(len(z_ND))
    if len(chosen_P) > _MAP_POINTS:
        chosen_P = np.sort(np.random.default_rng(seed).choice(chosen_P, _MAP_POINTS, replace=False))
    z_PD = z_ND[chosen_P] - z_ND[chosen_P].mean(axis=0)
    spread = float(np.abs(z_PD).max())
    if len(z_PD) < 2 or spread == 0 or z_PD.shape[1] < 2:
        return None
    z_PD = z_PD / spread
    if len(z_PD) < _TSNE_LEAST_POINTS:
        points_P2, method = PCA(2, random_state=seed).fit_transform(z_PD), "PCA"
    else:
        perplexity = min(30.0, (len(z_PD) - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed)
        # Its threads wait actively: beside another busy process several take ten times as long as
        # one.
        with threadpool_limits(1):
            points_P2 = tsne.fit_transform(z_PD.astype(np.float32)).astype(np.float64)
        method = f"t-SNE (perplexity {perplexity:g}, 500 iterations, seed {seed})"
    if not np.isfinite(points_P2).all():
        return None
    if len(chosen_P) < len(z_ND):
        method += f" of {len(chosen_P):,} of the {len(z_ND):,} images"

    images = chosen_P.tolist()
    kinds = [categories[i] for i in images]
    names_K, counts_K = np.unique([kind for kind in kinds if kind], return_counts=True)
    shown = sorted(str(names_K[i]) for i in np.argsort(-counts_K, kind="stable")[:_GROUPS])
    if len(names_K) > _GROUPS:  # the last symbol stands for all rare ones
        shown = sorted(str(names_K[i]) for i in np.argsort(-counts_K, kind="stable")[: _GROUPS - 1])
    groups = [shown.index(kind) if kind in shown else len(shown) for kind in kinds]
    hints = [
        f"{names[i]} – {kind}" if kind else names[i] for i, kind in zip(images, kinds, strict=True)
    ]
    labels = shown + ["all others"] if shown and len(shown) in groups else shown
    svg = scatter(points_P2, groups, hints, title=f"Map of {len(chosen_P)} test images by {method}")
    return EmbeddingMap(
        svg=svg, legend=[(marker(i), label) for i, label in enumerate(labels)], method=method
    )
