"""A map of all embeddings for the report.

Shapes: N test images, D width, P points on the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from threadpoolctl import threadpool_limits

from namr_dist.results.charts import HUES, SHAPES, marker, scatter
from namr_dist.retrieval.arrays import Float64

_MAP_POINTS = 2_500
_TSNE_LEAST_POINTS = 50
_GROUPS = HUES * SHAPES


@dataclass(frozen=True, kw_only=True)
class EmbeddingMap:
    """The map, its legend, and how it was made."""

    svg: Markup
    legend: list[tuple[Markup, str]]
    method: str


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
