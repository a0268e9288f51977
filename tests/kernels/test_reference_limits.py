"""Every op at its limits: batches without terms, memory, dtypes, arguments that are wrong."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from namr_dist.kernels import reference

BETA = torch.tensor(1.2)


def _proxies(x_BD: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    rows_CD = torch.randn(6, x_BD.shape[-1], generator=generator, dtype=torch.float64)
    return reference.unit_rows(rows_CD).to(
        x_BD.dtype if x_BD.is_floating_point() else torch.float64
    )


Loss = Callable[[Tensor, Tensor], Tensor]
PAIR_LOSSES: dict[str, Loss] = {
    "semihard": lambda z, y: reference.triplet_loss(z, y),
    "hardest": lambda z, y: reference.triplet_loss(z, y, mining="hardest"),
    "distance_weighted": lambda z, y: reference.triplet_loss(z, y, mining="distance_weighted"),
    "margin": lambda z, y: reference.margin_loss(z, y, beta=BETA),
    "multi_similarity": lambda z, y: reference.multi_similarity_loss(z, y),
}
LABELLED: dict[str, Loss] = {
    **PAIR_LOSSES,
    "proxy_anchor": lambda z, y: reference.proxy_anchor_loss(z, y, _proxies(z)),
}
EVERY: dict[str, Loss] = {
    **LABELLED,
    "ranking": lambda z, _: reference.multi_cluster_ranking(
        z, torch.linspace(0.5, 1.5, z.numel()).view_as(z)
    ),
    "mean_distance": lambda z, _: reference.mean_pairwise_distance(z),
}


def _unit(B: int, D: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rows_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return reference.unit_rows(rows_BD).to(dtype)


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
@pytest.mark.parametrize(
    "labels",
    [[3] * 6, list(range(6)), [0, 0], [0, 1]],
    ids=["one class", "no positives", "B=2 alike", "B=2 unlike"],
)
def test_without_a_triplet_the_loss_is_zero_with_a_gradient_of_zeros(
    loss: Loss, labels: list[int]
) -> None:
    x_BD = _unit(len(labels), 4).requires_grad_()
    value = loss(x_BD, torch.tensor(labels))
    assert value.shape == () and value.grad_fn is not None
    assert float(value.detach()) == 0.0
    value.backward()
    assert x_BD.grad is not None and torch.equal(x_BD.grad, torch.zeros_like(x_BD))


def test_beta_also_gets_a_zero_gradient() -> None:
    beta = torch.tensor(1.2, requires_grad=True)
    reference.margin_loss(_unit(4, 3), torch.zeros(4, dtype=torch.int64), beta=beta).backward()
    assert beta.grad is not None and float(beta.grad) == 0.0


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_all_rows_equal(loss: Loss) -> None:
    x_BD = _unit(1, 4).repeat(6, 1).requires_grad_()
    value = loss(x_BD, torch.tensor([0, 0, 1, 1, 2, 2]))
    value.backward()
    assert float(value.detach()) > 0.0
    assert x_BD.grad is not None and x_BD.grad.isfinite().all()


def test_triplet_on_equal_rows_is_the_margin() -> None:
    value = reference.triplet_loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), margin=0.3)
    assert float(value) == pytest.approx(0.3)


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_proxy_anchor_with_two_rows_or_one_class(labels: list[int]) -> None:
    x_BD, y_B = _unit(2, 4), torch.tensor(labels)
    similarity = (x_BD @ _proxies(x_BD).T).tolist()
    attract, repel = [], []
    for p in range(6):
        own = [similarity[i][p] for i in range(2) if labels[i] == p]
        other = [similarity[i][p] for i in range(2) if labels[i] != p]
        if own:
            attract.append(math.log1p(sum(math.exp(-32 * (s - 0.1)) for s in own)))
        repel.append(math.log1p(sum(math.exp(32 * (s + 0.1)) for s in other)))
    want = sum(attract) / len(attract) + sum(repel) / 6
    got = reference.proxy_anchor_loss(x_BD, y_B, _proxies(x_BD))
    assert float(got) == pytest.approx(want, rel=1e-12)


class _Largest(TorchDispatchMode):
    """Largest tensor, in elements, that any op returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def _memory(loss: Loss, x_BD: Tensor, y_B: Tensor) -> tuple[int, int]:
    """Largest tensor of forward and backward, and all that forward saves, in elements."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with _Largest() as meter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(x_BD, y_B)
        value.backward()
    return meter.largest, sum(saved.values())


@pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
def test_memory_stays_of_the_order_of_the_pairs(loss: Loss) -> None:
    B, D = 160, 96
    x_BD = _unit(B, D, torch.float32).requires_grad_()
    largest, saved = _memory(loss, x_BD, torch.arange(B) % 6)
    assert largest <= 3 * B * B  # two clusters, or B + 1 columns
    assert saved <= 16 * B * B


def test_the_memory_meter_sees_the_naive_form() -> None:
    x_BD = _unit(20, 50, torch.float32).requires_grad_()
    largest, saved = _memory(
        lambda z, _: (z[:, None] - z[None]).square().sum(), x_BD, torch.zeros(20, dtype=torch.int64)
    )
    assert largest == 20 * 20 * 50 and saved >= 20 * 20 * 50


@pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)]
)
def test_narrower_dtypes_compute_in_float32(
    loss: Loss, dtype: torch.dtype, tolerance: float
) -> None:
    # Both sides see the same rounded rows, so what is left is the rounding of float32.
    y_B = torch.arange(24) % 6
    narrow_BD = _unit(24, 16).to(dtype).requires_grad_()
    wide_BD = narrow_BD.detach().double().requires_grad_()
    proxy_free = loss is not EVERY["proxy_anchor"]
    got, want = loss(narrow_BD, y_B), loss(wide_BD, y_B)
    assert got.dtype == torch.float32 and want.dtype == torch.float64
    # Proxies are made in the rows' dtype, hence rounded too.
    slack = tolerance if proxy_free or dtype == torch.float32 else 0.03
    torch.testing.assert_close(got.double(), want, rtol=slack, atol=1e-6)
    got.backward()
    want.backward()
    assert narrow_BD.grad is not None and narrow_BD.grad.dtype == dtype
    error = (narrow_BD.grad.double() - wide_BD.grad).norm() / wide_BD.grad.norm()
    assert float(error) < (1e-4 if dtype == torch.float32 else 0.02 if proxy_free else 0.2)


@pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
def test_autocast_does_not_lower_the_precision(loss: Loss) -> None:
    x_BD, y_B = _unit(12, 16, torch.float32), torch.arange(12) % 3
    plain = loss(x_BD, y_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(x_BD, y_B)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
def test_rows_that_are_no_batch(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"1 row\(s\).*larger batch"):
        loss(_unit(1, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, D\).*\(4,\)"):
        loss(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"D >= 1, got \(4, 0\)"):
        loss(torch.zeros(4, 0), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64; convert it with \.float"):
        loss(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_labels_that_do_not_fit(loss: Loss) -> None:
    x_BD = _unit(4, 3)
    with pytest.raises(ValueError, match=r"\(4,\), one per row, got \(5,\)"):
        loss(x_BD, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(4,\), one per row, got \(4, 1\)"):
        loss(x_BD, torch.zeros(4, 1, dtype=torch.int64))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"integers, got {dtype}"):
            loss(x_BD, torch.zeros(4, dtype=dtype))
    with pytest.raises(ValueError, match="labels are on meta"):
        loss(x_BD, torch.zeros(4, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(("label", "at"), [(6, 2), (-1, 0)])
def test_a_label_without_a_proxy(label: int, at: int) -> None:
    x_BD, y_B = _unit(4, 3), torch.tensor([0, 1, 2, 3])
    y_B[at] = label
    with pytest.raises(ValueError, match=rf"label {label} has no proxy.*0\.\.5"):
        reference.proxy_anchor_loss(x_BD, y_B, _proxies(x_BD))


def test_proxies_and_beta_of_a_wrong_shape() -> None:
    x_BD, y_B = _unit(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"\(C, 3\).*\(2, 5\)"):
        reference.proxy_anchor_loss(x_BD, y_B, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"single number, got shape \(2,\)"):
        reference.margin_loss(x_BD, y_B, beta=torch.ones(2))
