"""Multi-cluster ranking against a naive form written from docs/algorithm.md, one number at a
time."""

import math

import pytest
import torch
from torch import Tensor

from namr_dist.kernels import reference


def _batch(B: int = 6, D: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_BD = torch.randn(B, D, generator=generator, dtype=torch.float64)
    s_BD = 0.5 + torch.rand(B, D, generator=generator, dtype=torch.float64)
    return z_BD.requires_grad_(), s_BD.requires_grad_()


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _naive(
    z_BD: Tensor, s_BD: Tensor, M: int, t: float, phi: float, a: float, statistics: str
) -> Tensor:
    B, D = z_BD.shape
    d = [[math.dist(z_BD[i].tolist(), z_BD[j].tolist()) for j in range(B)] for i in range(B)]
    total = z_BD.new_zeros(())
    for i in range(B):
        mu, sigma = _mean_and_deviation(d[i] if statistics == "anchor" else sum(d, []))
        near = max(phi * mu, mu - t * sigma)
        for j in range(B):
            if i == j:
                continue
            D2 = z_BD.new_zeros(())
            for k in range(D):
                D2 = D2 + s_BD[i, k] * (z_BD[i, k] - z_BD[j, k]) ** 2
            r = [
                (D2.sqrt() - (mu - (m - 1) / (M - 1) * (mu - near))).abs() for m in range(1, M + 1)
            ]
            e = [torch.exp(-a * (M - 1) * r_m) for r_m in r]
            for m in range(M):
                total = total + e[m] / sum(e) * r[m]
    return total / (B * (B - 1))


@pytest.mark.parametrize("statistics", ["batch", "anchor"])
@pytest.mark.parametrize("M", [2, 3, 4, 8])
@pytest.mark.parametrize(("t", "phi", "a"), [(3.0, 0.2, 10.0), (0.7, 0.1, 4.0)])
def test_agrees_with_the_naive_loops(
    statistics: str, M: int, t: float, phi: float, a: float
) -> None:
    inputs = _batch(seed=M)
    ours = reference.multi_cluster_ranking(
        *inputs, clusters=M, spread=t, floor=phi, sharpness=a, statistics=statistics
    )
    naive = _naive(*inputs, M, t, phi, a, statistics)
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=0)
    for got, want in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(naive, inputs), strict=True
    ):
        assert float(want.abs().max()) > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_defaults_are_those_of_the_algorithm() -> None:
    inputs = _batch()
    torch.testing.assert_close(
        reference.multi_cluster_ranking(*inputs),
        _naive(*inputs, 2, 3.0, 0.2, 10.0, "batch"),
        rtol=1e-12,
        atol=0,
    )


def test_floor_and_spread_each_set_the_near_centre() -> None:
    z_BD, s_BD = (x.detach() for x in _batch(B=8))
    values = {
        (spread, floor): float(
            reference.multi_cluster_ranking(z_BD, s_BD, spread=spread, floor=floor)
        )
        for spread in (0.5, 30.0, 40.0)
        for floor in (0.1, 0.2)
    }
    assert values[0.5, 0.1] == values[0.5, 0.2]  # μ - tσ is above either floor
    assert values[30.0, 0.2] == values[40.0, 0.2]  # below it: the floor decides
    assert values[30.0, 0.1] != values[30.0, 0.2]


def test_two_clusters_are_the_sigmoid_weighted_pair_of_the_forerunner() -> None:
    z_BD, s_BD = _batch(B=7, D=4, seed=5)
    d_BB = torch.cdist(z_BD, z_BD).detach()
    far = d_BB.mean()
    near = torch.maximum(0.2 * far, far - 3.0 * d_BB.std())
    off = ~torch.eye(7, dtype=torch.bool)
    diff_BBD = z_BD[:, None] - z_BD[None]
    D_P = (s_BD[:, None] * diff_BBD.square()).sum(2)[off].sqrt()
    to_far_P, to_near_P = (D_P - far).abs(), (D_P - near).abs()
    p_far_P = torch.sigmoid(10.0 * (to_near_P - to_far_P))
    want = (p_far_P * to_far_P + (1 - p_far_P) * to_near_P).mean()
    torch.testing.assert_close(
        reference.multi_cluster_ranking(z_BD, s_BD), want, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("statistics", ["batch", "anchor"])
@pytest.mark.parametrize("M", [2, 4])
def test_gradcheck_with_the_centres_held_still(
    statistics: str, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The centres are detached by definition, so finite differences agree only when z does not move
    # them.
    z_BD, s_BD = _batch(B=5)
    centres = reference.losses._cluster_centres(
        z_BD, z_BD, clusters=M, spread=0.8, floor=0.2, statistics=statistics
    )
    assert not centres.requires_grad
    monkeypatch.setattr(reference.losses, "_cluster_centres", lambda *_, **__: centres)
    assert torch.autograd.gradcheck(
        lambda z, s: reference.multi_cluster_ranking(z, s, clusters=M, statistics=statistics),
        [z_BD, s_BD],
    )


def test_centres_run_evenly_from_far_to_near() -> None:
    z_BD, _ = _batch(B=8)
    centres = reference.losses._cluster_centres(
        z_BD, z_BD, clusters=4, spread=0.5, floor=0.2, statistics="batch"
    )
    centres = centres.flatten()
    steps = centres.diff()
    assert (steps < 0).all()
    torch.testing.assert_close(steps, steps[:1].expand(3))
    d_BB = torch.cdist(z_BD, z_BD)
    torch.testing.assert_close(centres[0], d_BB.mean().detach())
    torch.testing.assert_close(centres[-1], (d_BB.mean() - 0.5 * d_BB.std()).detach())


@pytest.mark.parametrize("statistics", ["batch", "anchor"])
def test_all_rows_equal_give_zero_and_zero_gradient(statistics: str) -> None:
    z_BD = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    s_BD = torch.full((4, 3), 1.2, dtype=torch.float64, requires_grad=True)
    loss = reference.multi_cluster_ranking(z_BD, s_BD, statistics=statistics)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(z_BD.grad, torch.zeros_like(z_BD)) and torch.equal(
        s_BD.grad, torch.zeros_like(s_BD)
    )


def test_one_pair_of_duplicates_among_others() -> None:
    z_BD, s_BD = _batch()
    twin_BD = z_BD.detach().clone()
    twin_BD[1] = twin_BD[0]
    twin_BD.requires_grad_()
    loss = reference.multi_cluster_ranking(twin_BD, s_BD)
    loss.backward()
    assert loss.isfinite() and twin_BD.grad.isfinite().all() and s_BD.grad.isfinite().all()
    # The duplicates' own two terms count in the value: leaving them out changes the mean.
    apart_BD = twin_BD.detach().clone()
    apart_BD[1] += 1e-7
    torch.testing.assert_close(
        loss.detach(), reference.multi_cluster_ranking(apart_BD, s_BD).detach(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("statistics", ["batch", "anchor"])
def test_two_rows(statistics: str) -> None:
    inputs = _batch(B=2)
    torch.testing.assert_close(
        reference.multi_cluster_ranking(*inputs, statistics=statistics),
        _naive(*inputs, 2, 3.0, 0.2, 10.0, statistics),
    )


def test_float32_far_from_the_origin_keeps_its_precision() -> None:
    z_BD, s_BD = (x.detach().float() for x in _batch(B=10, D=6))
    moved_BD = z_BD + 1000.0
    exact = reference.multi_cluster_ranking(moved_BD.double(), s_BD.double())
    got = reference.multi_cluster_ranking(moved_BD, s_BD)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clusters": 1}, "at least 2.*got 1"),
        ({"floor": 1.5}, "1.5"),
        ({"statistics": "row"}, "'row'.*batch, anchor"),
    ],
)
def test_wrong_options(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reference.multi_cluster_ranking(*_batch(), **options)


def test_wrong_shapes() -> None:
    z_BD, s_BD = _batch()
    with pytest.raises(ValueError, match=r"\(6, 3\) and \(5, 3\)"):
        reference.multi_cluster_ranking(z_BD, s_BD[:5])
    with pytest.raises(ValueError, match="1 row"):
        reference.multi_cluster_ranking(z_BD[:1], s_BD[:1])
    with pytest.raises(ValueError, match="int64"):
        reference.multi_cluster_ranking(z_BD, s_BD.long())
