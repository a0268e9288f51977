"""The CPU primitives of pair lists, multi-similarity and proxy-anchor, put together as the losses
do, against the float64 definition and its autograd."""

import math

import pytest
import torch
from torch import Tensor

from namr_dist.kernels import cpu, reference
from namr_dist.kernels.cpu import blocks

SHAPES = [(2, 8), (3, 24), (17, 130), (100, 24), (300, 100)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MS = {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1}


@pytest.fixture(autouse=True, params=[2400, 1 << 20], ids=["small blocks", "one block"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(blocks, "SHORTEST", 4)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _pieces(B: int) -> list[slice]:
    """Uneven pieces of the rows, an empty one among them: 5, 0, 1 and 11 of 17."""
    ends = [0, B // 3, B // 3, B // 3 + 1, B]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _unit(B: int, D: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return reference.unit_rows(torch.randn(B, D, generator=generator, dtype=torch.float64) + 0.3)


def _labels(B: int, kind: str = "some") -> Tensor:
    """Unsorted labels below B; sizes of classes differ."""
    generator = torch.Generator().manual_seed(B)
    some_B = torch.randint(max(2, B // 4), (B,), generator=generator)
    return {
        "some": some_B,
        "one": torch.full((B,), B - 1),
        "all": torch.randperm(B, generator=generator),
    }[kind]


def _close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Norm-wise, and entry by entry relative to the largest."""
    assert got.shape == want.shape and got.isfinite().all()
    error = got.double() - want
    assert float(error.abs().max()) <= tolerance * max(float(want.abs().max()), 1e-12)
    assert float(error.norm()) <= tolerance * max(float(want.norm()), 1e-12)


def _tolerances(dtype: torch.dtype) -> tuple[float, float]:
    return (1e-12, 1e-11) if dtype == torch.float64 else (1e-5, 1e-4)


@pytest.mark.parametrize("slots", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_pairs(B: int, D: int, dtype: torch.dtype, slots: int) -> None:
    z_BD = (torch.randn(B, D, generator=torch.Generator().manual_seed(0)) + 5.0).to(dtype)
    z_BD[0] = z_BD[B - 1]
    index_BS = torch.randint(-1, B, (B, slots), generator=torch.Generator().manual_seed(1))
    index_BS[:1] = B - 1  # a pair at distance 0
    weight_BS = torch.randn(
        B, slots, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    weight_BS[1:2] = 0.0
    with torch.enable_grad():
        leaf_BD = z_BD.double().requires_grad_()
        diff_BSD = leaf_BD[:, None] - leaf_BD[index_BS.clamp_min(0)]
        want_BS = reference.pairwise_distance(
            diff_BSD.reshape(-1, D), leaf_BD.new_zeros(1, D)
        ).reshape(B, slots)
        want_BS = want_BS.where(index_BS >= 0, 0.0)
        want_BD = torch.autograd.grad((want_BS * weight_BS).sum(), leaf_BD)[0]
    value, slope = _tolerances(dtype)
    for pieces in ([slice(0, B)], _pieces(B)):
        got_BS = torch.cat([cpu.pair_distance(z_BD[p], z_BD, index_BS[p]) for p in pieces])
        _close(got_BS, want_BS.detach(), value) if slots else None
        grads = [
            cpu.pair_gradient(z_BD, index_BS, weight_BS, first=p.start, rows=p.stop - p.start)
            for p in pieces
        ]
        _close(torch.cat(grads), want_BD, slope) if slots else None
        assert torch.cat(grads).shape == z_BD.shape and got_BS.shape == (B, slots)


def _multi_similarity(
    x_BD: Tensor, labels_B: Tensor, pieces: list[slice], **options: float
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, from the pieces' primitives."""
    statistics_B4 = torch.cat(
        [
            cpu.similarity_statistics(
                x_BD[p], x_BD, labels_B[p], labels_B, offset=p.start, **options
            )
            for p in pieces
        ]
    )
    grads = [
        cpu.similarity_gradient(
            x_BD[p],
            x_BD,
            labels_B[p],
            labels_B,
            statistics_B4[p],
            statistics_B4,
            offset=p.start,
            **options,
        )
        for p in pieces
    ]
    loss = (statistics_B4[:, 2] / options["alpha"] + statistics_B4[:, 3] / options["beta"]).mean()
    return loss, torch.cat(grads) / len(x_BD)


def _multi_similarity_reference(
    x_BD: Tensor, labels_B: Tensor, **options: float
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x_BD = x_BD.double().requires_grad_()
        loss = reference.multi_similarity_loss(x_BD, labels_B, **options)
        return loss.detach(), torch.autograd.grad(loss, x_BD)[0]


@pytest.mark.parametrize("kind", ["some", "one", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_multi_similarity(B: int, D: int, dtype: torch.dtype, kind: str) -> None:
    x_BD, labels_B = _unit(B, D).to(dtype), _labels(B, kind)
    want = _multi_similarity_reference(x_BD, labels_B, **MS)
    for pieces in ([slice(0, B)], _pieces(B)):
        for ours, theirs, tolerance in zip(
            _multi_similarity(x_BD, labels_B, pieces, **MS), want, _tolerances(dtype), strict=True
        ):
            _close(ours, theirs, tolerance)


@pytest.mark.parametrize("beta", [1.0, 1000.0])
@pytest.mark.parametrize("epsilon", [0.02, 3.0])
def test_multi_similarity_with_other_constants(beta: float, epsilon: float) -> None:
    x_BD, labels_B = _unit(40, 5), _labels(40)
    options = {"alpha": 30.0, "beta": beta, "base": -0.2, "epsilon": epsilon}
    want = _multi_similarity_reference(x_BD, labels_B, **options)
    for ours, theirs in zip(
        _multi_similarity(x_BD, labels_B, _pieces(40), **options), want, strict=True
    ):
        _close(ours, theirs, 1e-10)


def test_multi_similarity_does_not_overflow() -> None:
    # Similarity 1 between all rows, so that exp(β (1 - base)) is no float32.
    x_BD, labels_B = torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 3])
    x_BD[:, 0] = 1.0
    options = {**MS, "beta": 1000.0}
    for ours, theirs in zip(
        _multi_similarity(x_BD, labels_B, [slice(0, 6)], **options),
        _multi_similarity_reference(x_BD, labels_B, **options),
        strict=True,
    ):
        _close(ours, theirs, 1e-5)


def test_multi_similarity_statistics_name_what_was_found() -> None:
    x_BD, labels_B = _unit(12, 4), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4])
    S_BB = x_BD @ x_BD.T
    got_B4 = cpu.similarity_statistics(x_BD, x_BD, labels_B, labels_B, offset=0, **MS)
    for i in range(12):
        same = [float(S_BB[i, j]) for j in range(12) if j != i and labels_B[j] == labels_B[i]]
        differ = [float(S_BB[i, j]) for j in range(12) if labels_B[j] != labels_B[i]]
        assert float(got_B4[i, 0]) == pytest.approx(min(same, default=math.inf), rel=1e-12)
        assert float(got_B4[i, 1]) == pytest.approx(max(differ), rel=1e-12)


def _proxy_anchor(
    x_BD: Tensor,
    labels_B: Tensor,
    proxies_CD: Tensor,
    pieces: list[slice],
    *,
    alpha: float,
    margin: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients, the pieces merged as ranks would merge them."""
    options = {"alpha": alpha, "margin": margin}
    sums = [cpu.proxy_sums(x_BD[p], labels_B[p], proxies_CD, **options) for p in pieces]
    own_C, other_C = (torch.logsumexp(torch.stack(side), 0) for side in zip(*sums, strict=True))
    zero = own_C.new_zeros(())
    own_log_C, other_log_C = torch.logaddexp(own_C, zero), torch.logaddexp(other_C, zero)
    present_C = own_C > -math.inf
    weights = (present_C.to(own_C.dtype) / present_C.sum(), zero + 1 / len(proxies_CD))
    grads = [
        cpu.proxy_gradient(
            x_BD[p],
            labels_B[p],
            proxies_CD,
            weights[0],
            own_log_C,
            weights[1],
            other_log_C,
            **options,
        )
        for p in pieces
    ]
    loss = (weights[0] * own_log_C).sum() + weights[1] * other_log_C.sum()
    return loss, torch.cat([x for x, _ in grads]), torch.stack([p for _, p in grads]).sum(0)


def _proxy_anchor_reference(
    x_BD: Tensor, labels_B: Tensor, proxies_CD: Tensor, **options: float
) -> list[Tensor]:
    with torch.enable_grad():
        x_BD, proxies_CD = x_BD.double().requires_grad_(), proxies_CD.double().requires_grad_()
        loss = reference.proxy_anchor_loss(x_BD, labels_B, proxies_CD, **options)
        return [loss.detach(), *torch.autograd.grad(loss, (x_BD, proxies_CD))]


@pytest.mark.parametrize("kind", ["some", "one", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_proxy_anchor(B: int, D: int, dtype: torch.dtype, kind: str) -> None:
    x_BD, labels_B = _unit(B, D).to(dtype), _labels(B, kind)
    proxies_CD = _unit(B + 3, D, seed=1).to(dtype)
    want = _proxy_anchor_reference(x_BD, labels_B, proxies_CD, alpha=32.0, margin=0.1)
    value, slope = _tolerances(dtype)
    for pieces in ([slice(0, B)], _pieces(B)):
        got = _proxy_anchor(x_BD, labels_B, proxies_CD, pieces, alpha=32.0, margin=0.1)
        for ours, theirs, tolerance in zip(got, want, (value, slope, slope), strict=True):
            _close(ours, theirs, tolerance)


def test_proxy_anchor_with_one_proxy_and_without_overflow() -> None:
    x_BD, labels_B = torch.ones(4, 2), torch.tensor([0, 0, 1, 1])
    proxies_CD = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    want = _proxy_anchor_reference(x_BD, labels_B, proxies_CD, alpha=1000.0, margin=0.0)
    for ours, theirs in zip(
        _proxy_anchor(x_BD, labels_B, proxies_CD, _pieces(4), alpha=1000.0, margin=0.0),
        want,
        strict=True,
    ):
        _close(ours, theirs, 1e-4)  # exp of a difference of logarithms near 2000, in float32
    alone = torch.zeros(4, dtype=torch.int64)
    want = _proxy_anchor_reference(x_BD, alone, proxies_CD[:1], alpha=32.0, margin=0.1)
    for ours, theirs in zip(
        _proxy_anchor(x_BD, alone, proxies_CD[:1], [slice(0, 4)], alpha=32.0, margin=0.1),
        want,
        strict=True,
    ):
        _close(ours, theirs, 1e-5)


def test_nan_comes_out_as_nan() -> None:
    x_BD, labels_B = _unit(20, 4).float(), _labels(20)
    x_BD[3, 1] = math.nan
    assert all(
        part.isnan().any() for part in _multi_similarity(x_BD, labels_B, [slice(0, 20)], **MS)
    )
    got = _proxy_anchor(
        x_BD, labels_B, _unit(20, 4, seed=1).float(), [slice(0, 20)], alpha=32.0, margin=0.1
    )
    assert all(part.isnan().any() for part in got)
    index_BS = torch.arange(20)[:, None].flip(0)
    assert cpu.pair_distance(x_BD, x_BD, index_BS).isnan().any()
    assert cpu.pair_gradient(x_BD, index_BS, torch.ones(20, 1), first=0, rows=20).isnan().any()


def test_equal_calls_give_equal_bits() -> None:
    x_BD, labels_B, proxies_CD = _unit(90, 33).float(), _labels(90), _unit(90, 33, seed=1).float()
    # Every row is the other one of many pairs.
    index_BS = torch.randint(-1, 90, (90, 40), generator=torch.Generator().manual_seed(0))
    weight_BS = torch.randn(90, 40, generator=torch.Generator().manual_seed(1))

    def once() -> list[Tensor]:
        return [
            *_multi_similarity(x_BD, labels_B, [slice(0, 90)], **MS),
            *_proxy_anchor(x_BD, labels_B, proxies_CD, [slice(0, 90)], alpha=32.0, margin=0.1),
            cpu.pair_distance(x_BD, x_BD, index_BS),
            cpu.pair_gradient(x_BD, index_BS, weight_BS, first=0, rows=90),
        ]

    first = once()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
