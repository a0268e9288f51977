"""Every public op as one call on the same arguments, and the batches that they are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from namr_dist.kernels import reference

CLASSES = 9


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an op may be given: z, s (B, D), unit rows x, labels (B,), proxies (C, D), one beta."""

    z: Tensor
    s: Tensor
    x: Tensor
    labels: Tensor
    proxies: Tensor
    beta: Tensor

    def leaves(self, dtype: torch.dtype) -> Batch:
        """The same numbers in `dtype`, as leaves that ask for gradients."""
        ready = {name: getattr(self, name).to(dtype).requires_grad_() for name in ("z", "s", "x", "proxies", "beta")}
        return Batch(**ready, labels=self.labels)

    def rounded(self, dtype: torch.dtype) -> Batch:
        """The same batch after rounding to `dtype`, in float64: what a half-precision op really sees."""
        return Batch(**{name: getattr(self, name).to(dtype).double() for name in ("z", "s", "x", "proxies", "beta")},
                     labels=self.labels)


def batch(B: int, D: int, *, seed: int = 0, z: Tensor | None = None, labels: Tensor | None = None) -> Batch:
    """Random rows about a mean that is not 0, labels in no order; z and labels may be given."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(B, D, generator=generator, dtype=torch.float64)
    z = (normal + 0.5) * (2 / D) ** 0.5 if z is None else z.double()
    if labels is None:
        labels = torch.randint(min(CLASSES, B), (B,), generator=generator)
    proxies = torch.randn(CLASSES, D, generator=generator, dtype=torch.float64)
    return Batch(z=z, s=0.5 + torch.rand(B, D, generator=generator, dtype=torch.float64), x=reference.unit_rows(z),
                 labels=labels, proxies=reference.unit_rows(proxies),
                 beta=torch.tensor([1.2], dtype=torch.float64))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Op:
    """An op called on a batch by way of a module that has it, and the arguments it is differentiated by."""

    call: Callable[[ModuleType, Batch], Tensor]
    by: tuple[str, ...]

    def value_and_gradients(self, ops: ModuleType, given: Batch) -> tuple[Tensor, list[Tensor]]:
        value = self.call(ops, given)
        return value.detach(), list(torch.autograd.grad(value, [getattr(given, name) for name in self.by]))


OPS = {
    "mean_distance": Op(call=lambda k, b: k.mean_pairwise_distance(b.z), by=("z",)),
    "ranking": Op(call=lambda k, b: k.multi_cluster_ranking(b.z, b.s), by=("z", "s")),
    "ranking of 5 by anchor": Op(
        call=lambda k, b: k.multi_cluster_ranking(b.z, b.s, clusters=5, statistics="anchor", spread=2.0),
        by=("z", "s")),
    "ranking of 16": Op(
        call=lambda k, b: k.multi_cluster_ranking(b.z, b.s, clusters=16, sharpness=2.0), by=("z", "s")),
    "semihard": Op(call=lambda k, b: k.triplet_loss(b.z, b.labels), by=("z",)),
    "hardest": Op(call=lambda k, b: k.triplet_loss(b.z, b.labels, mining="hardest"), by=("z",)),
    "distance_weighted": Op(
        call=lambda k, b: k.triplet_loss(b.z, b.labels, mining="distance_weighted", seed=2**40 + 3), by=("z",)),
    "margin": Op(call=lambda k, b: k.margin_loss(b.x, b.labels, beta=b.beta, seed=7), by=("x", "beta")),
    "multi_similarity": Op(call=lambda k, b: k.multi_similarity_loss(b.x, b.labels), by=("x",)),
    "proxy_anchor": Op(call=lambda k, b: k.proxy_anchor_loss(b.x, b.labels, b.proxies), by=("x", "proxies")),
}  # fmt: skip
