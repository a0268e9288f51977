"""Checked conversions that every retrieval module starts with.

Shapes: N items, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from namr_dist.errors import InputError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# Squares of larger entries leave the range of fp32 once a few hundred of them are added up.
_LARGEST_ENTRY = 1e17


def _as_numpy(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach()
        if values.is_floating_point() and values.dtype != torch.float64:
            values = values.float()  # numpy has no bf16
        return np.asarray(values.cpu().numpy())
    return np.asarray(values)


def as_matrix(values_ND: Any, name: str) -> Float64:
    """(N, D) numbers from numpy or torch (any float type, any device) as contiguous float64.

    Raises InputError unless the input is two-dimensional, non-empty, finite and below 1e17.
    """
    return _checked(np.ascontiguousarray(_as_numpy(values_ND), dtype=np.float64), name)


def as_float32(values_ND: Any, name: str) -> Float32:
    """As :func:`as_matrix`, rounded to fp32: half the memory, and no copy of what is fp32
    already."""
    values = _as_numpy(values_ND)
    with np.errstate(over="ignore"):
        matrix = _checked(np.ascontiguousarray(values, dtype=np.float32), name)
    if not matrix.any() and values.any():
        raise InputError(
            f"{name}: all entries are so small that fp32 holds 0 for them; multiply queries and items by a "
            "power of two, which changes no order"
        )
    return matrix


def _checked(matrix_ND: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    if matrix_ND.ndim != 2 or 0 in matrix_ND.shape:
        raise InputError(
            f"{name}: a non-empty (rows, width) matrix is needed, got shape {matrix_ND.shape}"
        )
    # By rows' extremes, which NaN passes through: no second matrix is made.
    with np.errstate(invalid="ignore"):
        inside_N = (matrix_ND.max(axis=1) <= _LARGEST_ENTRY) & (
            matrix_ND.min(axis=1) >= -_LARGEST_ENTRY
        )
    bad_N: Bool = ~inside_N
    if bad_N.any():
        row = int(np.flatnonzero(bad_N)[0])
        raise InputError(
            f"{name}: row {row} holds NaN, infinity or an entry above {_LARGEST_ENTRY:.0e} "
            f"({int(bad_N.sum())} such rows of {len(bad_N)}); look at the run that made the embeddings"
        )
    return matrix_ND


def as_labels(labels_N: Any, count: int, name: str = "labels") -> Int64:
    """(N,) integer labels as int64; raises InputError unless there are `count` of them."""
    labels = _as_numpy(labels_N)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{name}: {count} integers are needed, one for each embedding, "
            f"got shape {labels.shape} of {labels.dtype}"
        )
    return labels.astype(np.int64)


def unit_rows(z_ND: Float64) -> Float64:
    """(N, D) rows scaled to length 1; a zero row stays zero."""
    norms_N1 = np.linalg.norm(z_ND, axis=1, keepdims=True)
    scaled: Float64 = z_ND / np.where(norms_N1 > 0, norms_N1, 1.0)
    return scaled
