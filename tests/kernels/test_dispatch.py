"""Who computes a primitive: Triton's kernels, blocked PyTorch where there is no kernel, and nobody
where it is unknown."""

from __future__ import annotations

import pytest
import torch
from op_cases import KERNEL_DEVICE, KERNEL_MARKS, OPS, batch, use_path, worst

from namr_dist import kernels
from namr_dist.kernels import cpu, dispatch, gpu

pytestmark = KERNEL_MARKS

# Each primitive with an op that needs it.
USES = [
    ("mean_distance", "row_moments"), ("mean_distance", "distance_sum_gradient"), ("ranking", "ranking"),
    ("hardest", "hardest_pairs"), ("semihard", "semihard_negatives"), ("distance_weighted", "sampled_negatives"),
    ("semihard", "pair_distance"), ("margin", "pair_gradient"), ("multi_similarity", "similarity_statistics"),
    ("multi_similarity", "similarity_gradient"), ("proxy_anchor", "proxy_sums"), ("proxy_anchor", "proxy_gradient"),
    ("nearest_centres", "k_nearest"), ("nearest_centres", "k_nearest_gradient"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def through_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors of these tests go to the kernels."""
    use_path("triton", monkeypatch)


def test_every_primitive_is_tried() -> None:
    assert {primitive for _, primitive in USES} == set(gpu.__all__)


@pytest.mark.parametrize(("name", "primitive"), USES)
def test_without_its_kernel_an_op_gives_the_same(
    name: str, primitive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, given = OPS[name], batch(21, 8).leaves(torch.float32, KERNEL_DEVICE)
    want_loss, want_gradients = op.value_and_gradients(kernels, given)
    monkeypatch.delattr(gpu, primitive)
    loss, gradients = op.value_and_gradients(kernels, given)
    assert abs(float(loss) - float(want_loss)) <= 1e-5 * abs(float(want_loss))
    for gradient, want in zip(gradients, want_gradients, strict=True):
        assert gradient.dtype == want.dtype and gradient.device == want.device
        assert worst(gradient, want.double()) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    op, given = OPS["multi_similarity"], batch(21, 8).leaves(dtype, KERNEL_DEVICE)
    want_loss, (want,) = op.value_and_gradients(kernels, given)
    monkeypatch.delattr(gpu, "similarity_gradient")
    loss, (gradient,) = op.value_and_gradients(kernels, given)
    assert torch.equal(loss, want_loss) and gradient.dtype == dtype
    assert worst(gradient, want.double()) <= 2 * torch.finfo(dtype).eps


def test_blocked_pytorch_fills_in_and_a_kernel_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(2, 2, device=KERNEL_DEVICE)
    assert dispatch.implementation(rows).row_moments is gpu.row_moments
    assert dispatch.implementation(rows.double()).row_moments is cpu.row_moments
    monkeypatch.delattr(gpu, "row_moments")
    assert dispatch.implementation(rows).row_moments is cpu.row_moments


def test_a_primitive_that_nobody_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(9, 8)
    monkeypatch.delattr(gpu, "proxy_sums")
    monkeypatch.delattr(cpu, "proxy_sums")
    for dtype, looked in (
        (torch.float32, r"\S*kernels\.gpu or \S*kernels\.cpu"),
        (torch.float64, r"\S*kernels\.cpu"),
    ):
        with pytest.raises(AttributeError, match=rf"no primitive 'proxy_sums' in {looked};"):
            OPS["proxy_anchor"].call(kernels, given.leaves(dtype, KERNEL_DEVICE))


def test_the_description_names_what_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels.describe(KERNEL_DEVICE)
    assert whole.startswith("Triton kernels") and ";" not in whole
    monkeypatch.delattr(gpu, "similarity_gradient")
    monkeypatch.delattr(gpu, "pair_gradient")
    monkeypatch.delattr(gpu, "pair_distance")
    margin = "margin_loss: pair_distance, pair_gradient in blocked PyTorch (no kernel)"
    similarity = "multi_similarity_loss: similarity_gradient in blocked PyTorch (no kernel)"
    assert (
        kernels.describe(KERNEL_DEVICE)
        == f"{whole}; {margin.replace('margin', 'triplet')}; {margin}; {similarity}"
    )
    assert kernels.describe(KERNEL_DEVICE, "margin_loss") == f"{whole}; {margin}"
    assert kernels.describe(KERNEL_DEVICE, "proxy_anchor_loss") == whole
    with pytest.raises(KeyError, match="nonsense"):
        kernels.describe(KERNEL_DEVICE, "nonsense")


def test_the_description_names_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cuda",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert kernels.describe(torch.device("cuda")) == "Triton kernels for sm_120"
    assert kernels.describe(torch.device("cpu")).startswith("blocked PyTorch")
