"""Every public op as one call on the same arguments, and the batches that they are tried on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from namr_dist import kernels
from namr_dist.kernels import dispatch, reference
from namr_dist.kernels.gpu import launch

CPU = torch.device("cpu")
COMPILED = torch.cuda.is_available()
"""Triton's kernels run compiled, on a GPU; else by Triton's interpreter, on CPU tensors."""
KERNEL_DEVICE = torch.device("cuda") if COMPILED else CPU
KERNEL_MARKS = [pytest.mark.gpu] if COMPILED else []
"""Of tests that run them."""
PATHS = ["cpu", pytest.param("triton", marks=KERNEL_MARKS)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Where operators are tried as PyTorch sees them, for which there is no need to interpret
kernels."""

ROUNDED_RANKING = 0.1
"""For gradients of multi-cluster ranking in a small batch of bfloat16 by kernels: rows less their
middle are rounded to that type, compiled also operands of products, so a pair near a centre may
fall on the centre's other side, which moves its rows' gradients."""
CLASSES = 9
REPEATS = 20 if COMPILED else 3
"""Calls that must give the same bits: few of Triton's interpreter, which runs one program after
another."""
UNEVEN = (5, 1, 0, 17)
"""Rows of ranks that differ as much as ranks may."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What an op may be given: z, s (B, D), unit rows x, labels (B,), proxies (C, D), one beta."""

    z: Tensor
    s: Tensor
    x: Tensor
    labels: Tensor
    proxies: Tensor
    beta: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | str = CPU) -> Batch:
        """The same numbers in `dtype`, without gradients."""
        floating = {name: getattr(self, name).detach().to(device, dtype) for name in FLOATING}
        return Batch(**floating, labels=self.labels.to(device))

    def leaves(self, dtype: torch.dtype, device: torch.device | str = CPU) -> Batch:
        """The same numbers in `dtype`, as leaves that ask for gradients."""
        ready = self.to(dtype, device)
        for name in FLOATING:
            getattr(ready, name).requires_grad_()
        return ready

    def rounded(self, dtype: torch.dtype) -> Batch:
        """The same batch after rounding to `dtype`, in float64: what a half-precision op really
        sees."""
        return self.to(dtype).to(torch.float64)


FLOATING = ("z", "s", "x", "proxies", "beta")


def batch(
    B: int,
    D: int,
    *,
    seed: int = 0,
    z: Tensor | None = None,
    labels: Tensor | None = None,
    classes: int = CLASSES,
) -> Batch:
    """Random rows about a mean that is not 0, labels in no order; z and labels may be given."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(B, D, generator=generator, dtype=torch.float64)
    z = (normal + 0.5) * (2 / D) ** 0.5 if z is None else z.double()
    if labels is None:
        labels = torch.randint(min(classes, B), (B,), generator=generator)
    proxies = torch.randn(classes, D, generator=generator, dtype=torch.float64)
    return Batch(z=z, s=0.5 + torch.rand(B, D, generator=generator, dtype=torch.float64), x=reference.unit_rows(z),
                 labels=labels, proxies=reference.unit_rows(proxies),
                 beta=torch.tensor([1.2], dtype=torch.float64))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Op:
    """An op called on a batch by way of a module that has it, and the arguments it is
    differentiated by."""

    call: Callable[[ModuleType, Batch], Tensor]
    by: tuple[str, ...]

    def value_and_gradients(self, ops: ModuleType, given: Batch) -> tuple[Tensor, list[Tensor]]:
        value = self.call(ops, given)
        return value.detach(), list(
            torch.autograd.grad(value, [getattr(given, name) for name in self.by])
        )


OPS = {
    "mean_distance": Op(call=lambda k, b: k.mean_pairwise_distance(b.z), by=("z",)),
    "ranking": Op(call=lambda k, b: k.multi_cluster_ranking(b.z, b.s), by=("z", "s")),
    "ranking of 5 by anchor": Op(
        call=lambda k, b: k.multi_cluster_ranking(b.z, b.s, clusters=5, statistics="anchor", spread=2.0),
        by=("z", "s")),
    "ranking of 16": Op(
        call=lambda k, b: k.multi_cluster_ranking(b.z, b.s, clusters=16, sharpness=2.0), by=("z", "s")),
    "nearest_centres": Op(call=lambda k, b: k.nearest_centres(b.z, b.proxies, k=3)[0].mean(), by=("z", "proxies")),
    "semihard": Op(call=lambda k, b: k.triplet_loss(b.z, b.labels), by=("z",)),
    "hardest": Op(call=lambda k, b: k.triplet_loss(b.z, b.labels, mining="hardest"), by=("z",)),
    "distance_weighted": Op(
        call=lambda k, b: k.triplet_loss(b.z, b.labels, mining="distance_weighted", seed=2**40 + 3), by=("z",)),
    "margin": Op(call=lambda k, b: k.margin_loss(b.x, b.labels, beta=b.beta, seed=7), by=("x", "beta")),
    "multi_similarity": Op(call=lambda k, b: k.multi_similarity_loss(b.x, b.labels), by=("x",)),
    "proxy_anchor": Op(call=lambda k, b: k.proxy_anchor_loss(b.x, b.labels, b.proxies), by=("x", "proxies")),
}  # fmt: skip

ROWS: dict[str, tuple[str, Callable[..., Any]]] = {
    "mean_distance": ("mean_distance", lambda b, i, j, gather: kernels.mean_distance_of_rows(
        b.z[i:j], b.z, offset=i, gather=gather, with_grad=True)),
    "ranking": ("ranking", lambda b, i, j, gather: kernels.ranking_of_rows(
        b.z[i:j], b.s[i:j], b.z, b.s, offset=i, gather=gather, clusters=2, spread=3.0, floor=0.2, sharpness=10.0,
        statistics="batch", with_grad=True)),
    "ranking of 5 by anchor": ("ranking of 5 by anchor", lambda b, i, j, gather: kernels.ranking_of_rows(
        b.z[i:j], b.s[i:j], b.z, b.s, offset=i, gather=gather, clusters=5, spread=2.0, floor=0.2, sharpness=10.0,
        statistics="anchor", with_grad=True)),
    **{mining: (mining, lambda b, i, j, gather, mining=mining: kernels.triplet_of_rows(
        b.z[i:j], b.labels[i:j], b.z, b.labels, offset=i, gather=gather, margin=0.2, mining=mining, seed=2**40 + 3,
        most_positives=None, with_grad=True)) for mining in ("semihard", "hardest", "distance_weighted")},
    "margin": ("margin", lambda b, i, j, gather: kernels.margin_of_rows(
        b.x[i:j], b.labels[i:j], b.x, b.labels, b.beta, offset=i, gather=gather, alpha=0.2, seed=7,
        most_positives=None, with_grad=True)),
    "multi_similarity": ("multi_similarity", lambda b, i, j, gather: kernels.multi_similarity_of_rows(
        b.x[i:j], b.labels[i:j], b.x, b.labels, offset=i, gather=gather, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1,
        with_grad=True)),
    "proxy_anchor": ("proxy_anchor", lambda b, i, j, gather: kernels.proxy_anchor_of_rows(
        b.x[i:j], b.labels[i:j], b.proxies, gather=gather, alpha=32.0, margin=0.1, with_grad=True)),
}  # fmt: skip
"""Each op from rows i..j of a batch alone. z, x and labels may have further rows, those of a
memory."""


def use_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send tensors on `device_of(path)` to blocked PyTorch ("cpu") or to Triton's kernels
    ("triton")."""
    if path == "triton":
        monkeypatch.setattr(dispatch, "TRITON_DEVICES", (KERNEL_DEVICE.type,))
        # Few programs: each walks several tiles, and several share a row, so both ways of adding up
        # are met.
        monkeypatch.setattr(launch, "TARGET_PROGRAMS", 6)


def device_of(path: str) -> torch.device:
    """Where a path's tensors belong."""
    return KERNEL_DEVICE if path == "triton" else CPU


def through_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, with CPU tensors taken to the kernels' device and what it returns
    brought back."""
    if not COMPILED:
        return function

    @functools.wraps(function)
    def there_and_back(*arguments: Any, **options: Any) -> Any:
        copies: dict[
            int, Tensor
        ] = {}  # one for each tensor: functions ask whether two arguments are the same
        given = tree_map_only(
            Tensor,
            lambda tensor: copies.setdefault(id(tensor), _copied(tensor)),
            (arguments, options),
        )
        results = function(*given[0], **given[1])
        return tree_map_only(
            Tensor, lambda tensor: tensor.cpu() if tensor.is_cuda else tensor, results
        )

    return there_and_back


def _copied(tensor: Tensor) -> Tensor:
    """On the kernels' device with the same strides, for some are strided on purpose; what is not on
    a CPU stays."""
    if tensor.device != CPU:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(KERNEL_DEVICE).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def worst(got: Tensor, want: Tensor) -> float:
    """Largest difference, as a share of the largest entry wanted, which is in float64."""
    return float((got.to(want) - want).abs().max() / want.abs().max().clamp_min(1e-12))


def on_ranks(
    counts: tuple[int, ...], function: Callable[[int, int, Callable[[Tensor], Tensor]], Any]
) -> list[Any]:
    """function(first, last, gather) in one thread a rank, of so many rows each; gather waits for
    all."""
    results: list[Any] = [None] * len(counts)
    parts: list[Any] = [None] * len(counts)
    barrier = threading.Barrier(len(counts), timeout=60)
    turn = threading.Lock()  # Triton's interpreter serves one thread at a time

    def run(rank: int) -> None:
        def gather(local: Tensor) -> Tensor:
            parts[rank] = local
            turn.release()
            barrier.wait()
            everything = torch.cat(parts)
            barrier.wait()
            turn.acquire()
            return everything

        with torch.no_grad(), turn:
            results[rank] = function(sum(counts[:rank]), sum(counts[: rank + 1]), gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results, "a rank failed"
    return results
