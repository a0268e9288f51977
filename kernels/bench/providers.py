"""Who computes a loss: this project, plain PyTorch, torch.compile, loops, another library; and the bare product.

A provider is a name.  `find_form` gives its form of a loss, `obstacle` says why it sits a case out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import (
    margin_loss,
    multi_cluster_ranking,
    multi_similarity_loss,
    proxy_anchor_loss,
    reference,
    triplet_loss,
)
from . import eager, library, naive
from .cases import CLUSTERS, LOSSES, POSITIVES, Case, Form

PROVIDERS = ("ours", "eager", "compile", "naive", "pml", "matmul")
NAIVE_ROWS = {"cuda": 1024, "cpu": 256}
"""The loop form is measured up to this batch: it holds B²D numbers, and runs several operations an anchor."""
GRADIENT_IN_FORWARD = ("ours",)
"""These compute the gradient beside the loss, so their backward alone is no measure of anything."""
_PAIR_TENSORS = 16
"""A generous count of the (B, B) float32 tensors alive in one pass of the forms that hold them."""


def _ours(mining: str) -> Form:
    return lambda labels_B, z_BD: triplet_loss(z_BD, labels_B, mining=mining, most_positives=POSITIVES)


OURS: dict[str, Form] = {
    "multi-cluster-ranking": lambda labels_B, z_BD, s_BD: multi_cluster_ranking(z_BD, s_BD, clusters=CLUSTERS),
    "triplet-hardest": _ours("hardest"),
    "triplet-semihard": _ours("semihard"),
    "triplet-distance-weighted": _ours("distance_weighted"),
    "margin": lambda labels_B, x_BD, beta: margin_loss(x_BD, labels_B, beta=beta, seed=0, most_positives=POSITIVES),
    "multi-similarity": lambda labels_B, x_BD: multi_similarity_loss(x_BD, labels_B),
    "proxy-anchor": lambda labels_B, x_BD, proxies_CD: proxy_anchor_loss(x_BD, labels_B, proxies_CD),
}

REFERENCE: dict[str, Form] = {
    "multi-cluster-ranking": lambda labels, z, s: reference.multi_cluster_ranking(z, s, clusters=CLUSTERS),
    "triplet-hardest": lambda labels, z: reference.triplet_loss(z, labels, mining="hardest"),
    "triplet-semihard": lambda labels, z: reference.triplet_loss(z, labels, mining="semihard"),
    "triplet-distance-weighted": lambda labels, z: reference.triplet_loss(z, labels, mining="distance_weighted"),
    "margin": lambda labels, x, beta: reference.margin_loss(x, labels, beta=beta, seed=0),
    "multi-similarity": lambda labels, x: reference.multi_similarity_loss(x, labels),
    "proxy-anchor": lambda labels, x, proxies: reference.proxy_anchor_loss(x, labels, proxies),
}


def _compiled(loss: str) -> Form:
    # One graph a shape, as in training; the reset keeps earlier cases from using up the recompilation limit.
    torch._dynamo.reset()
    compiled: Form = torch.compile(eager.FORMS[loss], dynamic=False)
    return compiled


_FINDERS: dict[str, Callable[[str], Form]] = {
    "ours": OURS.__getitem__,
    "eager": eager.FORMS.__getitem__,
    "compile": _compiled,
    "naive": naive.FORMS.__getitem__,
    "pml": lambda loss: library.forms()[loss],
    "matmul": lambda loss: bare_product,
}


def bare_product(labels_B: Tensor, rows_BD: Tensor, *_: Tensor) -> Tensor:
    """X·Xᵀ by the library in the rows' own dtype: the witness."""
    return rows_BD @ rows_BD.T


def find_form(provider: str, loss: str) -> Form:
    """A provider's form of a loss."""
    return _FINDERS[provider](loss)


def available() -> tuple[str, ...]:
    """Providers whose packages are installed."""
    missing = importlib.util.find_spec("pytorch_metric_learning") is None
    return tuple(name for name in PROVIDERS if not (missing and name == "pml"))


def obstacle(provider: str, case: Case) -> str | None:
    """Why a provider cannot run a case, or None."""
    kind = torch.device(case.device).type
    if provider == "pml" and case.loss == "multi-cluster-ranking":
        return "pytorch-metric-learning has no such loss"
    if provider == "naive" and case.rows > NAIVE_ROWS[kind]:
        return f"the loop form is measured up to B {NAIVE_ROWS[kind]}"
    # A GPU says itself that its memory is full; on a CPU the system would end the process.
    needed, free = 4 * _PAIR_TENSORS * case.rows**2, _free_bytes()
    if provider in ("eager", "compile", "pml") and kind == "cpu" and free is not None and needed > free:
        return f"needs up to {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def _free_bytes() -> int | None:
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.is_file() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def difference(provider: str, loss: str) -> str | None:
    """Why a provider's results cannot be those of the definition, or None."""
    if provider == "ours":
        return None
    if LOSSES[loss].sampled:
        return "draws other negatives"
    if provider == "pml" and loss == "triplet-semihard":
        return "one triplet an anchor"
    return None
