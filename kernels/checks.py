"""Checks of what a caller passes to an op; every op of this package uses the same ones.

Each raises ValueError saying what is wrong, which value it found and what to do.
Shapes: B rows of the global batch, D embedding width.
"""

import torch
from torch import Tensor

MINING = ("semihard", "hardest", "distance_weighted")
"""How `triplet_loss` may choose its triplets."""

STATISTICS = ("batch", "anchor")
"""What `multi_cluster_ranking` may take mean and deviation over."""


def check_rows(name: str, rows_BD: Tensor) -> None:
    """`rows_BD` must be a floating (B, D) tensor with B >= 2 and D >= 1."""
    if not rows_BD.is_floating_point():
        raise ValueError(
            f"{name} must be floating point, got {rows_BD.dtype}; convert it with .float()"
        )
    if rows_BD.dim() != 2 or rows_BD.shape[1] < 1:
        raise ValueError(f"{name} must have shape (B, D) with D >= 1, got {tuple(rows_BD.shape)}")
    if rows_BD.shape[0] < 2:
        raise ValueError(
            f"{name} has {rows_BD.shape[0]} row(s); a loss over pairs needs B >= 2, so use a larger batch"
        )


def check_same_shape(name: str, rows: Tensor, other_name: str, other: Tensor) -> None:
    """`rows` and `other` must agree in shape."""
    if rows.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(rows.shape)} and {tuple(other.shape)}; "
            "pass both embeddings of the same images"
        )


def check_labels(labels_B: Tensor, rows_BD: Tensor) -> None:
    """`labels_B` must hold one integer for each row of `rows_BD`, on the same device."""
    if labels_B.is_floating_point() or labels_B.is_complex() or labels_B.dtype == torch.bool:
        raise ValueError(
            f"labels must be integers, got {labels_B.dtype}; convert them with .long()"
        )
    if labels_B.dim() != 1 or labels_B.shape[0] != rows_BD.shape[0]:
        raise ValueError(
            f"labels must have shape ({rows_BD.shape[0]},), one per row, got {tuple(labels_B.shape)}"
        )
    if labels_B.device != rows_BD.device:
        raise ValueError(
            f"labels are on {labels_B.device} and the rows on {rows_BD.device}; move them with .to()"
        )


def check_memory(
    rows_BD: Tensor, memory_QD: Tensor | None, *memory_labels_Q: Tensor | None
) -> None:
    """Memory rows must be as wide as the batch's and come with a label each, where the loss reads
    labels."""
    if any((memory_QD is None) != (labels_Q is None) for labels_Q in memory_labels_Q):
        raise ValueError("memory rows and memory labels belong together; pass both or neither")
    if memory_QD is None:
        return
    if (
        not memory_QD.is_floating_point()
        or memory_QD.dim() != 2
        or memory_QD.shape[1] != rows_BD.shape[1]
    ):
        raise ValueError(
            f"memory must be floating (Q, {rows_BD.shape[1]}), as wide as the rows, "
            f"got {memory_QD.dtype} {tuple(memory_QD.shape)}"
        )
    for labels_Q in memory_labels_Q:
        assert labels_Q is not None
        check_labels(labels_Q, memory_QD)


def check_mining(mining: str) -> None:
    """`mining` must be one of `MINING`."""
    if mining not in MINING:
        raise ValueError(f"unknown mining {mining!r}; use one of {', '.join(MINING)}")


def check_clusters(*, clusters: int, floor: float, statistics: str) -> None:
    """At least two clusters, a near centre between 0 and the far one, a known kind of
    statistics."""
    if clusters < 2:
        raise ValueError(f"clusters must be at least 2 (a near and a far one), got {clusters}")
    if not 0.0 <= floor <= 1.0:
        raise ValueError(
            f"floor is a fraction of the mean distance and must lie in [0, 1], got {floor}"
        )
    if statistics not in STATISTICS:
        raise ValueError(f"unknown statistics {statistics!r}; use one of {', '.join(STATISTICS)}")


def check_single(name: str, value: Tensor) -> None:
    """`value` must hold one floating number."""
    if value.numel() != 1:
        raise ValueError(f"{name} must hold a single number, got shape {tuple(value.shape)}")


def check_proxies(proxies_CD: Tensor, rows_BD: Tensor) -> None:
    """`proxies_CD` must be floating (C, D), C >= 1, as wide as the rows."""
    if not proxies_CD.is_floating_point():
        raise ValueError(
            f"proxies must be floating point, got {proxies_CD.dtype}; convert them with .float()"
        )
    if proxies_CD.dim() != 2 or proxies_CD.shape[0] < 1 or proxies_CD.shape[1] != rows_BD.shape[1]:
        raise ValueError(
            f"proxies must have shape (C, {rows_BD.shape[1]}), C >= 1, as wide as the embeddings, "
            f"got {tuple(proxies_CD.shape)}"
        )


def check_proxy_labels(labels_B: Tensor, classes: int) -> None:
    """Every label must lie in 0..classes-1: ValueError on a CPU; on a GPU a device assertion, which
    does not wait."""
    outside_B = (labels_B < 0) | (labels_B >= classes)
    if labels_B.device.type != "cpu":
        torch._assert_async(~outside_B.any(), "a label has no proxy: labels must lie in 0..C-1")
    elif outside_B.any():
        raise ValueError(
            f"label {int(labels_B[outside_B][0])} has no proxy: labels must lie in 0..{classes - 1}; "
            "number the training classes from 0 or make as many proxies as there are classes"
        )


def check_centres(rows_ND: Tensor, centres_MD: Tensor, k: int) -> None:
    """Floating (N, D) rows and (M, D) centres, D >= 1, and 1 <= k <= M."""
    for name, tensor in (("z", rows_ND), ("centres", centres_MD)):
        if not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floating point, got {tensor.dtype}; convert it with .float()"
            )
    if rows_ND.dim() != 2 or rows_ND.shape[1] < 1:
        raise ValueError(f"z must have shape (N, D) with D >= 1, got {tuple(rows_ND.shape)}")
    if centres_MD.dim() != 2 or centres_MD.shape[1] != rows_ND.shape[1]:
        raise ValueError(
            f"centres must have shape (M, {rows_ND.shape[1]}), as wide as the rows, "
            f"got {tuple(centres_MD.shape)}"
        )
    if not 1 <= k <= centres_MD.shape[0]:
        raise ValueError(
            f"k must lie in 1..{centres_MD.shape[0]}, the number of centres, got {k}; "
            "ask for fewer or pass more centres"
        )


def check_finite(name: str, rows: Tensor) -> None:
    """No NaN and no infinity; reads the tensor, so on a GPU it waits for the device."""
    finite = torch.isfinite(rows)
    if not finite.all():
        where = tuple((~finite).nonzero()[0].tolist())
        position = (
            f"row {where[0]}" + (f", column {where[1]}" if len(where) > 1 else "")
            if where
            else "its only entry"
        )
        raise ValueError(
            f"{name} is not finite: {float(rows[where])} at {position}; "
            "look at the learning rate, the data of that row, or a division by a zero norm"
        )
