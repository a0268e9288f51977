"""The proxy-anchor kernels against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import COMPILED, KERNEL_MARKS, REPEATS, through_kernels
from torch import Tensor

from namr_dist.kernels import reference
from namr_dist.kernels.gpu import gradient_sums, proxy_anchor
from namr_dist.kernels.gpu.launch import recording

# NumPy, which runs the interpreter, warns of entries that kernels mask.
pytestmark = [
    *KERNEL_MARKS,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp", "ignore:divide by zero"),
]
proxy_sums, proxy_gradient = (
    through_kernels(proxy_anchor.proxy_sums),
    through_kernels(proxy_anchor.proxy_gradient),
)

DEFAULTS = {"alpha": 32.0, "margin": 0.1}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Pair weights are rounded to the rows' own type for the matrix units, and where they are kept in
# memory, for an embedding too wide for registers. The interpreter multiplies in float32.
ROUNDED_GRADIENT = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _batch(
    B: int, C: int, D: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows somewhat near their proxies, so that both sums weigh; labels in no order, of any of
    the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.randint(C, (B,), generator=generator)
    proxies_CD = torch.randn(C, D, generator=generator, dtype=torch.float64)
    x_BD = proxies_CD[labels_B] + 4 * torch.randn(B, D, generator=generator, dtype=torch.float64)
    return reference.unit_rows(x_BD).to(dtype), labels_B, reference.unit_rows(proxies_CD).to(dtype)


def _run(
    x_BD: Tensor,
    labels_B: Tensor,
    proxies_CD: Tensor,
    sizes: list[int] | None = None,
    **constants: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients for rows and proxies, put together from local parts of these
    sizes."""
    constants = DEFAULTS | constants
    parts = list(
        zip(x_BD.split(sizes or len(x_BD)), labels_B.split(sizes or len(x_BD)), strict=True)
    )
    sums = [
        torch.stack(proxy_sums(x_bD, labels_b, proxies_CD, **constants)) for x_bD, labels_b in parts
    ]
    own_C, other_C = torch.logsumexp(torch.stack(sums), 0)
    zero = own_C.new_zeros(())
    own_log_C, other_log_C = torch.logaddexp(own_C, zero), torch.logaddexp(other_C, zero)
    own_weight = 1 / (own_C > -math.inf).sum()
    other_weight = torch.full_like(zero, 1 / len(proxies_CD))
    gradients = [
        proxy_gradient(
            x_bD,
            labels_b,
            proxies_CD,
            own_weight.expand(len(proxies_CD)),
            own_log_C,
            other_weight,
            other_log_C,
            **constants,
        )
        for x_bD, labels_b in parts
    ]
    grad_x, grad_proxies = zip(*gradients, strict=True)
    return (
        own_weight * own_log_C.sum() + other_log_C.mean(),
        torch.cat(grad_x),
        torch.stack(grad_proxies).sum(0),
    )


def _reference(
    x_BD: Tensor, labels_B: Tensor, proxies_CD: Tensor, **constants: float
) -> tuple[float, tuple[Tensor, Tensor]]:
    exact_BD, exact_CD = x_BD.double().requires_grad_(), proxies_CD.double().requires_grad_()
    loss = reference.proxy_anchor_loss(exact_BD, labels_B, exact_CD, **DEFAULTS | constants)
    grad_x_BD, grad_proxies_CD = torch.autograd.grad(loss, (exact_BD, exact_CD))
    return loss.item(), (grad_x_BD, grad_proxies_CD)


def _error(got: Tensor, want: Tensor) -> float:
    """Relative, the worse of norm-wise and over the largest entry."""
    difference = got.double() - want
    return max(
        float(difference.norm() / want.norm()), float(difference.abs().max() / want.abs().max())
    )


def _agrees(
    inputs: tuple[Tensor, Tensor, Tensor], *, gradient: float = 1e-4, **constants: float
) -> None:
    loss, *gradients = _run(*inputs, **constants)
    want_loss, want_gradients = _reference(*inputs, **constants)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(want_loss, rel=1e-5)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert got.dtype == torch.float32 and want.abs().max() > 1e-3
        assert _error(got, want) < gradient


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("B", "C", "D"),
    [
        (2, 1, 24),
        (2, 2, 8),
        (3, 100, 8),
        (33, 5, 100),
        (65, 100, 130),
        (130, 2, 24),
        (31, 1, 130),
        (64, 5, 512),
    ],
)
def test_agrees_with_the_reference(B: int, C: int, D: int, dtype: torch.dtype) -> None:
    rounded = COMPILED or gradient_sums.widest_gather(1, dtype) < D
    _agrees(_batch(B, C, D, dtype, seed=B), gradient=ROUNDED_GRADIENT[dtype] if rounded else 1e-4)


@pytest.mark.parametrize("programs", [1, 30], ids=["one split", "three splits"])
def test_agrees_over_many_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("namr_dist.kernels.gpu.launch.TARGET_PROGRAMS", programs)
    _agrees(_batch(300, 100, 24))


@pytest.mark.parametrize(
    "constants",
    [
        {"alpha": 200.0},
        {"alpha": 200.0, "margin": 1.0},
        {"alpha": 200.0, "margin": -0.2},
        {"alpha": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("D", [24, 160])
def test_agrees_for_other_constants(constants: dict[str, float], D: int) -> None:
    # Rows and proxies on a grid, whose products are exact: α of 200 would show the products' own
    # rounding.
    x_BD, labels_B, proxies_CD = _batch(70, 9, D, seed=3)
    _agrees(((x_BD * 64).round() / 64, labels_B, (proxies_CD * 64).round() / 64), **constants)


@pytest.mark.parametrize(("b", "C", "D"), [(1, 5, 24), (37, 5, 24), (130, 40, 100)])
def test_sums_are_the_log_sums_of_either_kind(b: int, C: int, D: int) -> None:
    x_bD, labels_b, proxies_CD = _batch(b, C, D)
    own_C, other_C = proxy_sums(x_bD, labels_b, proxies_CD, **DEFAULTS)
    S_bC = x_bD.double() @ proxies_CD.double().T
    own_bC = labels_b[:, None] == torch.arange(C)
    want_own_C = torch.logsumexp((-32 * (S_bC - 0.1)).masked_fill(~own_bC, -math.inf), 0)
    want_other_C = torch.logsumexp((32 * (S_bC + 0.1)).masked_fill(own_bC, -math.inf), 0)
    torch.testing.assert_close(own_C.double(), want_own_C, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_C.double(), want_other_C, rtol=1e-5, atol=1e-5)
    assert torch.equal(own_C == -math.inf, ~own_bC.any(0)) and torch.equal(
        other_C == -math.inf, own_bC.all(0)
    )


@pytest.mark.parametrize("D", [24, 160])
def test_local_parts_make_up_the_batch(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _batch(101, 70, D, seed=5)
    whole = _run(*inputs)
    monkeypatch.setattr(gradient_sums, "CHUNK_BYTES", 8 * 48**2)  # 32 rows by 64 columns at a time
    loss, *gradients = _run(*inputs, sizes=[1, 37, 63])
    for got, want in zip((loss, *gradients), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients, _reference(*inputs)[1], strict=True):
        assert _error(got, want) < 1e-4


@pytest.mark.parametrize("shift", [0.0, 2.0], ids=["near", "all far"])
@pytest.mark.parametrize(
    "labels", [[0] * 8, [3] * 8, [7, 6, 5, 4, 3, 2, 1, 0], [1, 0] * 4], ids=str
)
def test_equal_and_opposite_rows(labels: list[int], shift: float) -> None:
    # Each row twice, equal proxies, a row that is its own proxy and one opposite to it; classes 8
    # and 9 are absent.
    x_BD, _, proxies_CD = _batch(8, 10, 24, seed=1)
    x_BD[4:] = x_BD[:4]
    proxies_CD[3:5] = proxies_CD[2].clone()
    x_BD[0] = x_BD[4] = proxies_CD[0]
    x_BD[1] = x_BD[5] = -proxies_CD[1]
    _agrees((x_BD, torch.tensor(labels), proxies_CD), margin=0.1 + shift)


def test_one_row_everywhere() -> None:
    x_BD, labels_B, proxies_CD = _batch(40, 5, 24)
    _agrees((x_BD[:1].repeat(40, 1), labels_B, proxies_CD))
    _agrees((x_BD[:1].repeat(40, 1), labels_B, x_BD[:1].repeat(5, 1)))


@pytest.mark.parametrize("D", [24, 300])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weights_of_any_size_give_the_same_direction(D: int, dtype: torch.dtype) -> None:
    x_BD, labels_B, proxies_CD = _batch(33, 7, D, dtype)
    own_log_C, other_log_C = (
        torch.logaddexp(sums_C, torch.zeros(()))
        for sums_C in proxy_sums(x_BD, labels_B, proxies_CD, **DEFAULTS)
    )
    own_weight_C, other_weight = torch.linspace(0.1, 1, 7), torch.tensor(0.3)

    def gradients(scale: float) -> tuple[Tensor, Tensor]:
        return proxy_gradient(x_BD, labels_B, proxies_CD, own_weight_C * scale, own_log_C, other_weight * scale,
                              other_log_C, **DEFAULTS)  # fmt: skip

    for scale in (2.0**-30, 2.0**20, -1.0):
        for got, want in zip(gradients(scale), gradients(1), strict=True):
            assert want.any() and torch.equal(got, want * scale)
    assert not any(got.any() for got in gradients(0))
    assert all(got.isnan().all() for got in gradients(math.nan))


@pytest.mark.parametrize("D", [24, 160])
def test_each_proxy_has_its_own_weight(D: int) -> None:
    x_BD, labels_B, proxies_CD = _batch(40, 6, D)
    weight_C = torch.tensor([0.3, 0.0, 2.0, 0.01, 1.0, 0.5])
    exact_BD, exact_CD = x_BD.double().requires_grad_(), proxies_CD.double().requires_grad_()
    S_BC, own_BC = exact_BD @ exact_CD.T, labels_B[:, None] == torch.arange(6)
    own_log_C = torch.log1p(torch.where(own_BC, torch.exp(-32 * (S_BC - 0.1)), 0.0).sum(0))
    other_log_C = torch.log1p(torch.where(own_BC, 0.0, torch.exp(32 * (S_BC + 0.1))).sum(0))
    total = (weight_C * own_log_C).sum() + 0.05 * other_log_C.sum()
    want = torch.autograd.grad(total, (exact_BD, exact_CD))
    got = proxy_gradient(x_BD, labels_B, proxies_CD, weight_C, own_log_C.detach().float(), torch.tensor(0.05),
                         other_log_C.detach().float(), **DEFAULTS)  # fmt: skip
    for one, other in zip(got, want, strict=True):
        assert _error(one, other) < 1e-4


def test_half_rows_meet_float32_proxies() -> None:
    x_BD, labels_B, proxies_CD = _batch(40, 6, 24)
    _agrees((x_BD.bfloat16(), labels_B, proxies_CD))


@pytest.mark.parametrize(("B", "C", "D"), [(66, 5, 8), (20, 40, 160)])
def test_runs_agree_in_every_bit(B: int, C: int, D: int) -> None:
    inputs = _batch(B, C, D, seed=4)
    first = _run(*inputs)
    for _ in range(1, REPEATS):
        assert all(torch.equal(got, want) for got, want in zip(_run(*inputs), first, strict=True))


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [0, 1, 4]], ids=str)
def test_nan_reaches_the_loss_and_the_gradients(labels: list[int]) -> None:
    x_BD, _, proxies_CD = _batch(3, 5, 24)
    x_BD[1, 7] = math.nan
    own_C, other_C = proxy_sums(x_BD, torch.tensor(labels), proxies_CD, **DEFAULTS)
    # A row is in one of the two sums of every proxy.
    assert (own_C + other_C).isnan().all() and own_C[labels[1]].isnan()
    loss, grad_x_BD, grad_proxies_CD = _run(x_BD, torch.tensor(labels), proxies_CD)
    assert loss.isnan() and grad_x_BD.isnan().any() and grad_proxies_CD.isnan().any()


def test_rows_labels_and_weights_may_be_strided() -> None:
    x_BD, labels_B, proxies_CD = _batch(33, 5, 24)
    wide = [
        torch.stack([tensor, tensor + 1], -1)[..., 0] for tensor in (x_BD, labels_B, proxies_CD)
    ]
    for got, want in zip(_run(*wide), _run(x_BD, labels_B, proxies_CD), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("D", [128, 512])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_launches_without_reading_the_device(D: int, dtype: torch.dtype) -> None:
    x_BD = torch.empty(512, D, dtype=dtype, device="meta")
    with recording(90) as seen:
        _, grad_x_BD, grad_proxies_CD = _run(
            x_BD, torch.empty(512, dtype=torch.int64, device="meta"), x_BD[:100]
        )
    assert [one.kernel.__name__ for one in seen.launches] == ["_proxy_sums", "_rows", "_proxies"]
    assert grad_x_BD.shape == (512, D) and grad_proxies_CD.shape == (100, D)
