"""Embeddings of the size of Stanford Online Products, drawn at random, for tools that measure time,
memory and agreement: structure_recall.py and structure_at_scale.py.

Shapes: N rows, C classes, D width.

Families of classes are shared by training and test, as kinds of products are; classes are not. They
differ in how far their classes and images spread, so that some regions are crowded and others
sparse. Coordinates have falling variance, as those of trained embeddings do. Retrieval accuracies
on such rows say nothing about trained networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TRAIN_ROWS, TRAIN_CLASSES = 59_551, 11_318
TEST_ROWS, TEST_CLASSES = 60_502, 11_316
WIDTH = 512
FAMILIES = 300
_DECAY = 0.7
"""a coordinate's deviation is its number to minus this"""
_CLASS, _IMAGE, _UNEVEN = 0.5, 0.6, 0.3
"""deviations of a class in its family and of an image in its class, both relative to that of
families, and of the logarithm of a family's and of a class's own factor to them"""

PROTOCOL = (
    f"{TRAIN_ROWS:,} training and {TEST_ROWS:,} test rows, {WIDTH} wide, of {TRAIN_CLASSES:,} and "
    f"{TEST_CLASSES:,} classes in {FAMILIES} families (tools/clustered_gaussians.py)"
)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Embeddings with their classes."""

    z_ND: np.ndarray
    """fp32"""
    label_N: np.ndarray


def clustered_gaussians(*, seed: int) -> tuple[Rows, Rows]:
    """Training and test rows."""
    rng = np.random.default_rng(seed)
    deviation_D = (np.arange(1, WIDTH + 1) ** -_DECAY).astype(np.float32)
    family_FD = deviation_D * _normal(rng, FAMILIES)
    spread_F = np.exp(_UNEVEN * rng.standard_normal(FAMILIES)).astype(np.float32)

    def draw(rows: int, classes: int) -> Rows:
        family_C = rng.integers(FAMILIES, size=classes)
        class_CD = spread_F[family_C, None] * deviation_D * _normal(rng, classes)
        mean_CD = family_FD[family_C] + np.float32(_CLASS) * class_CD
        own_C = np.exp(_UNEVEN * rng.standard_normal(classes)).astype(np.float32)
        spread_C = np.float32(_IMAGE) * spread_F[family_C] * own_C
        label_N = rng.integers(classes, size=rows)
        z_ND = spread_C[label_N, None] * deviation_D * _normal(rng, rows)
        return Rows(z_ND=mean_CD[label_N] + z_ND, label_N=label_N)

    return draw(TRAIN_ROWS, TRAIN_CLASSES), draw(TEST_ROWS, TEST_CLASSES)


def _normal(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.standard_normal((rows, WIDTH), dtype=np.float32)
