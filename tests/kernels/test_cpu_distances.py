"""The blocked CPU distances and multi-cluster ranking against the float64 definition and its
autograd."""

import math

import pytest
import torch
from torch import Tensor

from namr_dist.kernels import cpu, reference
from namr_dist.kernels.centre import centre_of
from namr_dist.kernels.cpu import blocks

SHAPES = [(2, 8), (3, 24), (17, 130), (100, 24), (300, 100)]


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


def _rows(
    B: int, D: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """z far from the origin, and positive weights s, as the given type holds them."""
    generator = torch.Generator().manual_seed(seed)
    z_BD = torch.randn(B, D, generator=generator, dtype=torch.float64) + 1.5
    s_BD = 0.5 + torch.rand(B, D, generator=generator, dtype=torch.float64)
    return z_BD.to(dtype), s_BD.to(dtype)


def _close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Norm-wise, and entry by entry relative to the largest."""
    assert got.shape == want.shape and got.isfinite().all()
    error = got.double() - want
    assert float(error.abs().max()) <= tolerance * max(float(want.abs().max()), 1e-300)
    assert float(error.norm()) <= tolerance * max(float(want.norm()), 1e-300)


def _distances(z_BD: Tensor) -> Tensor:
    return reference.pairwise_distance(z_BD.double(), z_BD.double())


def _moments(z_BD: Tensor) -> tuple[Tensor, Tensor]:
    d_BB = _distances(z_BD)
    return d_BB.mean(1), (d_BB - d_BB.mean(1, keepdim=True)).square().sum(1)


def _distance_sum_gradient(z_BD: Tensor) -> Tensor:
    with torch.enable_grad():
        z_BD = z_BD.double().requires_grad_()
        return torch.autograd.grad(_distances(z_BD).sum(), z_BD)[0]


def _centres(z_BD: Tensor, s_BD: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """far and step, different for every anchor, with no distance right at a centre.

    There the slope jumps, and float32 rounds a distance to the other side of the centre now and
    then.
    """
    D_BB = reference.pairwise_distance(z_BD.double(), z_BD.double(), s_BD.double())
    mean_B = _distances(z_BD).mean(1)
    step_B = mean_B * torch.linspace(0.1, 0.6, len(mean_B), dtype=mean_B.dtype) / (clusters - 1)
    far_BT = mean_B[:, None] * torch.linspace(1.0, 1.01, 8, dtype=mean_B.dtype)
    gaps = [
        (D_BB[:, :, None] - (far_BT - m * step_B[:, None])[:, None]).abs().amin(1)
        for m in range(clusters)
    ]
    best_B = torch.stack(gaps).amin(0).argmax(1)
    return far_BT.gather(1, best_B[:, None]).squeeze(1), step_B


def _ranking(
    z_BD: Tensor, s_BD: Tensor, far_B: Tensor, step_B: Tensor, clusters: int, sharpness: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        z_BD, s_BD = z_BD.double().requires_grad_(), s_BD.double().requires_grad_()
        D_BB = reference.pairwise_distance(z_BD, z_BD, s_BD)
        r_MBB = torch.stack(
            [(D_BB - (far_B - m * step_B).double()[:, None]).abs() for m in range(clusters)]
        )
        loss_BB = (torch.softmax(-sharpness * (clusters - 1) * r_MBB, 0) * r_MBB).sum(0)
        loss_B = loss_BB.masked_fill(torch.eye(len(z_BD), dtype=torch.bool), 0.0).sum(1)
        return (loss_B.detach(), *torch.autograd.grad(loss_B.sum(), (z_BD, s_BD)))


def _check_ranking(
    z_BD: Tensor,
    s_BD: Tensor,
    *,
    clusters: int = 2,
    sharpness: float = 10.0,
    tolerances: tuple[float, float] = (1e-5, 1e-4),
) -> None:
    far_B, step_B = _centres(z_BD, s_BD, clusters)
    want = _ranking(z_BD, s_BD, far_B, step_B, clusters, sharpness)
    options = {"clusters": clusters, "sharpness": sharpness}
    whole = cpu.ranking(z_BD, s_BD, z_BD, s_BD, far_B, step_B, offset=0, with_grad=True, **options)
    pieces = [
        cpu.ranking(
            z_BD[p], s_BD[p], z_BD, s_BD, far_B, step_B, offset=p.start, with_grad=True, **options
        )
        for p in _pieces(len(z_BD))
    ]
    joined = [torch.cat(part) for part in zip(*pieces, strict=True)]
    for got in (whole, joined):
        _close(got[0], want[0], tolerances[0])
        _close(got[1], want[1], tolerances[1])
        _close(got[2], want[2], tolerances[1])
    value, *none = cpu.ranking(
        z_BD, s_BD, z_BD, s_BD, far_B, step_B, offset=0, with_grad=False, **options
    )
    assert torch.equal(value, whole[0]) and none == [None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_moments_and_the_gradient_of_all_distances(B: int, D: int, dtype: torch.dtype) -> None:
    z_BD, _ = _rows(B, D, dtype)
    value, slope = (1e-12, 1e-11) if dtype == torch.float64 else (1e-5, 1e-4)
    for pieces in ([slice(0, B)], _pieces(B)):
        got = [cpu.row_moments(z_BD[p], z_BD, offset=p.start) for p in pieces]
        for side, want in zip(zip(*got, strict=True), _moments(z_BD), strict=True):
            assert side[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            _close(torch.cat(side), want, value)
        grads = [cpu.distance_sum_gradient(z_BD[p], z_BD, offset=p.start) for p in pieces]
        _close(torch.cat(grads), _distance_sum_gradient(z_BD), slope)


@pytest.mark.parametrize("clusters", [2, 3, 5])
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_ranking_in_float64(B: int, D: int, clusters: int) -> None:
    _check_ranking(*_rows(B, D), clusters=clusters, tolerances=(1e-11, 1e-10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_ranking_in_float32(B: int, D: int, dtype: torch.dtype) -> None:
    _check_ranking(*_rows(B, D, dtype))


@pytest.mark.parametrize("clusters", [2, 4])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 300.0])
def test_ranking_soft_and_sharp(clusters: int, sharpness: float) -> None:
    _check_ranking(*_rows(17, 8), clusters=clusters, sharpness=sharpness, tolerances=(1e-11, 1e-9))


def test_near_centres_beyond_the_far_one() -> None:
    # Nothing forbids a negative spread; the two forms agree on it.
    z_BD, s_BD = _rows(20, 6)
    far_B, step_B = _centres(z_BD, s_BD, 2)
    want = _ranking(z_BD, s_BD, far_B, -step_B, 2, 10.0)
    got = cpu.ranking(
        z_BD, s_BD, z_BD, s_BD, far_B, -step_B, offset=0, clusters=2, sharpness=10.0, with_grad=True
    )
    for ours, theirs in zip(got, want, strict=True):
        _close(ours, theirs, 1e-10)


def _near_duplicates(share: float) -> Tensor:
    """Rows of which that share lies within 1e-4 of a few points far from the origin; some are
    equal."""
    generator = torch.Generator().manual_seed(1)
    z_BD = torch.randn(60, 16, generator=generator) + 20.0
    count = int(60 * share)
    z_BD[:count] = z_BD[torch.arange(count) % 4] + 1e-4 * torch.randn(
        count, 16, generator=generator
    )
    z_BD[count - 1] = z_BD[0]
    return z_BD


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("clusters", [2, 3])
def test_near_duplicates_and_equal_rows(share: float, clusters: int) -> None:
    z_BD = _near_duplicates(share)
    s_BD = _rows(60, 16)[1].float()
    for pieces in ([slice(0, 60)], _pieces(60)):
        got = [cpu.row_moments(z_BD[p], z_BD, offset=p.start) for p in pieces]
        for side, want in zip(zip(*got, strict=True), _moments(z_BD), strict=True):
            _close(torch.cat(side), want, 1e-5)
        grads = [cpu.distance_sum_gradient(z_BD[p], z_BD, offset=p.start) for p in pieces]
        _close(torch.cat(grads), _distance_sum_gradient(z_BD), 1e-4)
    _check_ranking(z_BD, s_BD, clusters=clusters)


def test_small_distances_themselves_are_exact() -> None:
    # Two rows 1e-3 apart among rows 10 apart: the mean over two rows' distances would hide an
    # error.
    z_BD = torch.zeros(3, 2)
    z_BD[1, 0], z_BD[2, 1] = 1e-3, 10.0
    distances = blocks.SquaredDistances(z_BD, z_BD, None, centre_D=centre_of(z_BD))
    squared = torch.stack(
        [distances.squared(rows, offset=0)[0][0, 1].clone() for rows in distances.blocks()]
    )
    assert float(squared[0]) == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e-30, 1e18])
@pytest.mark.parametrize("clusters", [2, 3])
def test_all_rows_equal(value: float, clusters: int) -> None:
    z_BD, s_BD = torch.full((23, 5), value), torch.full((23, 5), 1.2)
    mean_B, scatter_B = cpu.row_moments(z_BD, z_BD, offset=0)
    assert not mean_B.any() and not scatter_B.any()
    assert not cpu.distance_sum_gradient(z_BD, z_BD, offset=0).any()
    got = cpu.ranking(
        z_BD,
        s_BD,
        z_BD,
        s_BD,
        mean_B,
        mean_B,
        offset=0,
        clusters=clusters,
        sharpness=10.0,
        with_grad=True,
    )
    assert all(torch.equal(part, torch.zeros_like(part)) for part in got)


def test_pairs_of_equal_rows_and_rows_of_zeros() -> None:
    generator = torch.Generator().manual_seed(2)
    z_BD = torch.randint(-2, 3, (30, 4), generator=generator).float()
    z_BD[::5] = 0.0
    s_BD = _rows(30, 4)[1].float()
    assert int((_distances(z_BD) == 0).sum()) > 40
    got_mean, got_scatter = cpu.row_moments(z_BD, z_BD, offset=0)
    _close(got_mean, _moments(z_BD)[0], 1e-6)
    _close(got_scatter, _moments(z_BD)[1], 1e-5)
    _close(cpu.distance_sum_gradient(z_BD, z_BD, offset=0), _distance_sum_gradient(z_BD), 1e-5)
    _check_ranking(z_BD, s_BD)
    _check_ranking(z_BD, s_BD, clusters=4)


def test_one_row_far_from_all_others() -> None:
    z_BD, s_BD = (rows.float() for rows in _rows(40, 8))
    z_BD[7] *= 1000.0
    _close(cpu.row_moments(z_BD, z_BD, offset=0)[0], _moments(z_BD)[0], 1e-5)
    _close(cpu.distance_sum_gradient(z_BD, z_BD, offset=0), _distance_sum_gradient(z_BD), 1e-4)
    _check_ranking(z_BD, s_BD)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_come_out_as_nan(bad: float) -> None:
    z_BD, s_BD = (rows.float() for rows in _rows(20, 4))
    z_BD[3, 1] = bad
    mean_B, scatter_B = cpu.row_moments(z_BD, z_BD, offset=0)
    assert mean_B.isnan().any() and scatter_B.isnan().any()
    assert cpu.distance_sum_gradient(z_BD, z_BD, offset=0).isnan().any()
    got = cpu.ranking(
        z_BD,
        s_BD,
        z_BD,
        s_BD,
        mean_B,
        mean_B / 2,
        offset=0,
        clusters=2,
        sharpness=10.0,
        with_grad=True,
    )
    assert all(part.isnan().any() for part in got)


def test_equal_calls_give_equal_bits() -> None:
    z_BD = _near_duplicates(0.5)
    s_BD = _rows(60, 16)[1].float()
    far_B, step_B = _centres(z_BD, s_BD, 2)

    def once() -> list[Tensor]:
        ranked = cpu.ranking(
            z_BD,
            s_BD,
            z_BD,
            s_BD,
            far_B,
            step_B,
            offset=0,
            clusters=2,
            sharpness=10.0,
            with_grad=True,
        )
        return [
            *ranked,
            *cpu.row_moments(z_BD, z_BD, offset=0),
            cpu.distance_sum_gradient(z_BD, z_BD, offset=0),
        ]

    first = once()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
