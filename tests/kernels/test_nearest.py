"""The nearest centres against all squared differences in float64, on blocked PyTorch and on
Triton's kernels."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from op_cases import COMPILED, PATHS, device_of, use_path
from torch import Tensor

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.kernels.cpu import blocks
from namr_dist.kernels.gpu import launch, nearest

# NumPy, which runs the interpreter, warns of what is not finite on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on blocked PyTorch, in many blocks, and on Triton's kernels."""
    use_path(request.param, monkeypatch)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1 << 11)
    return request.param


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _integers(rows: int, width: int, seed: int) -> Tensor:
    """Of {-1, 0, 1}: distances are exact in every type and order of summation, and mostly ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, width), generator=generator).double()


def _wanted(z_ND: Tensor, centres_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By (distance, number), one row after another, in Python's own order of tuples."""
    squared_NM = (z_ND.double()[:, None] - centres_MD.double()).square().sum(2)
    chosen = [
        sorted(range(len(row)), key=lambda m: (-math.inf if math.isnan(row[m]) else row[m], m))[:k]
        for row in squared_NM.tolist()
    ]
    index_NK = torch.tensor(chosen).reshape(-1, k)
    return squared_NM.gather(1, index_NK), index_NK


def _nearest(path: str, z_ND: Tensor, centres_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    device = device_of(path)
    squared, index = kernels.nearest_centres(z_ND.to(device), centres_MD.to(device), k=k)
    assert index.dtype == torch.int64
    return squared.cpu(), index.cpu()


def _agrees(path: str, z_ND: Tensor, centres_MD: Tensor, k: int, *, relative: float = 2e-6) -> None:
    squared, index = _nearest(path, z_ND, centres_MD, k)
    want_squared, want_index = _wanted(z_ND, centres_MD, k)
    assert torch.equal(index, want_index)
    assert squared.dtype == torch.promote_types(
        torch.promote_types(z_ND.dtype, centres_MD.dtype), torch.float32
    )
    torch.testing.assert_close(
        squared.double(), want_squared, rtol=relative, atol=0, equal_nan=True
    )


SIZES = [(1, 1, 3, 1), (1, 70, 24, 5), (33, 5, 8, 5), (70, 130, 40, 1), (33, 70, 100, 7)]


@pytest.mark.parametrize(("N", "M", "D", "k"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_sorted_distances(
    path: str, N: int, M: int, D: int, k: int, dtype: torch.dtype
) -> None:
    z_ND, centres_MD = _normal(N, D, seed=1).to(dtype), _normal(M, D, seed=2).to(dtype)
    _agrees(path, z_ND, centres_MD, k)


@pytest.mark.parametrize("M", [30, 40])
def test_as_many_as_the_kernels_choose(path: str, M: int) -> None:
    _agrees(path, _normal(20, 140, seed=1).float(), _normal(M, 140, seed=2).float(), nearest.MOST)


def test_float64_and_two_types() -> None:
    z_ND, centres_MD = _normal(50, 24, seed=1), _normal(60, 24, seed=2)
    _agrees("cpu", z_ND, centres_MD, 4, relative=1e-14)
    _agrees("cpu", z_ND.bfloat16(), centres_MD.float(), 4)
    _agrees("cpu", z_ND.float(), centres_MD, 4, relative=1e-14)


def test_the_definition_is_that_of_sorted_distances() -> None:
    z_ND, centres_MD = _integers(30, 5, 1), _integers(40, 5, 2)
    squared, index = reference.nearest_centres(z_ND, centres_MD, k=7)
    want_squared, want_index = _wanted(z_ND, centres_MD, 7)
    assert torch.equal(index, want_index) and torch.equal(squared, want_squared)
    assert (squared[:, 1:] == squared[:, :-1]).double().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 6, 14])
def test_ties_go_to_the_lowest_number(path: str, k: int, dtype: torch.dtype) -> None:
    z_ND, centres_MD = _integers(50, 6, 1), _integers(150, 6, 2)
    _agrees(path, z_ND.to(dtype), centres_MD.to(dtype), k, relative=0)


def test_ties_among_parts_of_the_centres(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk over centres is split, and the last part has fewer than a list takes."""
    monkeypatch.setattr(launch, "TARGET_PROGRAMS", 60)
    for M in (65, 130):
        _agrees(path, _integers(40, 6, 1).float(), _integers(M, 6, 2).float(), 5, relative=0)


def test_equal_centres_more_than_are_listed(path: str) -> None:
    centres_MD = _normal(1, 24, seed=2).repeat(70, 1).float()
    _agrees(path, _normal(40, 24, seed=1).float(), centres_MD, 3)
    squared, index = _nearest(path, centres_MD[:5], centres_MD, 3)
    assert not squared.any() and torch.equal(index, torch.arange(3).expand(5, 3))


def test_rows_that_are_centres_are_at_zero(path: str) -> None:
    centres_MD = (1000 + _normal(30, 24, seed=2)).float().repeat(3, 1)
    squared, index = _nearest(path, centres_MD[:30], centres_MD, 4)
    assert not squared[:, :3].any() and (squared[:, 3] > 1).all()
    assert torch.equal(index[:, :3], torch.arange(30)[:, None] + torch.tensor([0, 30, 60]))


def test_distances_below_the_rounding_of_products(path: str) -> None:
    """Two clumps of centres at ±4096: in float32 norms and products have units of 8, distances are
    small integers."""
    far = 4096 * torch.cat([torch.ones(100, 1), -torch.ones(100, 1)])
    z_ND = _integers(60, 6, 1) + far[70:130]
    _agrees(path, z_ND.float(), (_integers(200, 6, 2) + far).float(), 5, relative=0)


def test_near_duplicates_far_from_the_origin(path: str) -> None:
    centres_MD = (1000 + _normal(50, 24, seed=2)).float()
    z_ND = (centres_MD.double() + 1e-2 * _normal(50, 24, seed=3)).float()
    _agrees(path, z_ND, centres_MD, 1)


@pytest.mark.parametrize("where", ["row", "centre"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_comes_out_and_stays_where_it_is(
    path: str, where: str, value: float
) -> None:
    z_ND, centres_MD = _normal(40, 8, seed=1).float(), _normal(70, 8, seed=2).float()
    (z_ND if where == "row" else centres_MD)[17, 3] = value
    squared, index = _nearest(path, z_ND, centres_MD, 3)
    exact_NM = (z_ND[:, None] - centres_MD).square().sum(2)  # float32, as 1e30 squared overflows
    order_NM = exact_NM.masked_fill(exact_NM.isnan(), -math.inf).sort(dim=1, stable=True).indices
    assert torch.equal(index, order_NM[:, :3])
    torch.testing.assert_close(squared, exact_NM.gather(1, index), equal_nan=True)
    assert where == "centre" or squared[:17].isfinite().all()


def test_more_than_the_kernels_choose(path: str) -> None:
    z_ND, centres_MD = _integers(20, 6, 1).float(), _integers(90, 6, 2).float()
    _agrees(path, z_ND, centres_MD, nearest.MOST + 1, relative=0)


def _gradients(z_ND: Tensor, centres_MD: Tensor, index_NK: Tensor, g_NK: Tensor) -> list[Tensor]:
    """2 g (z − c) pair by pair."""
    grads = [torch.zeros_like(z_ND), torch.zeros_like(centres_MD)]
    for i, chosen in enumerate(index_NK.tolist()):
        for s, m in enumerate(chosen):
            pull_D = 2 * g_NK[i, s] * (z_ND[i] - centres_MD[m])
            grads[0][i] += pull_D
            grads[1][m] -= pull_D
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "M", "D", "k"), [*SIZES, (150, 3, 24, 2), (9, 90, 24, 40)])
def test_gradients(path: str, N: int, M: int, D: int, k: int, dtype: torch.dtype) -> None:
    """Every pair has a gradient of its own; a centre may have all rows, or none."""
    given = [_normal(N, D, seed=1).to(dtype), _normal(M, D, seed=2).to(dtype)]
    g_NK = _normal(N, k, seed=3)
    leaves = [tensor.to(device_of(path)).requires_grad_() for tensor in given]
    squared, index = kernels.nearest_centres(*leaves, k=k)
    squared.backward(g_NK.to(squared))
    wanted = _gradients(given[0].double(), given[1].double(), index.cpu(), g_NK.float().double())
    for leaf, want in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        error = (leaf.grad.cpu().double() - want).abs().max()
        assert error <= max(1e-6, torch.finfo(dtype).eps) * want.abs().max()
    unused = sorted(set(range(M)) - set(index.flatten().tolist()))
    assert not leaves[1].grad[unused].any() and (N > 1 or len(unused) == M - k)


@pytest.mark.parametrize("by", [0, 1])
def test_gradient_of_one_argument_alone(path: str, by: int) -> None:
    given = [rows.float().to(device_of(path)) for rows in (_normal(33, 8, seed=1), _normal(9, 8, seed=2))]  # fmt: skip
    leaves = [rows.clone().requires_grad_() for rows in given]
    wanted = torch.autograd.grad(kernels.nearest_centres(*leaves, k=2)[0].sum(), leaves)
    given[by].requires_grad_()
    kernels.nearest_centres(*given, k=2)[0].sum().backward()
    assert torch.equal(given[by].grad, wanted[by]) and given[1 - by].grad is None


def test_a_row_on_its_centre_has_no_gradient(path: str) -> None:
    centres_MD = (1000 + _normal(30, 24, seed=2)).float().to(device_of(path)).requires_grad_()
    z_ND = centres_MD.detach().clone().requires_grad_()
    kernels.nearest_centres(z_ND, centres_MD, k=1)[0].sum().backward()
    assert not z_ND.grad.any() and not centres_MD.grad.any()


def test_gradcheck_of_distances_and_centres() -> None:
    leaves = [_normal(6, 3, seed=1).requires_grad_(), _normal(8, 3, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda z, c: kernels.nearest_centres(z, c, k=3)[0], leaves)
    assert torch.autograd.gradcheck(lambda z, c: reference.nearest_centres(z, c, k=3)[0], leaves)


def test_a_rank_without_rows(path: str) -> None:
    z_ND = torch.empty(0, 8, device=device_of(path), requires_grad=True)
    centres_MD = _normal(9, 8, seed=2).float().to(device_of(path)).requires_grad_()
    squared, index = kernels.nearest_centres(z_ND, centres_MD, k=2)
    assert squared.shape == index.shape == (0, 2)
    squared.sum().backward()
    assert z_ND.grad.shape == (0, 8) and not centres_MD.grad.any()


@pytest.mark.parametrize(
    ("z", "centres", "k", "said"),
    [
        (torch.ones(3, 4), torch.ones(5, 4), 0, r"k must lie in 1..5, .* got 0"),
        (torch.ones(3, 4), torch.ones(5, 4), 6, r"k must lie in 1..5, .* got 6"),
        (torch.ones(3, 4), torch.ones(0, 4), 1, r"k must lie in 1..0"),
        (torch.ones(3, 4), torch.ones(5, 3), 1, r"shape \(M, 4\), as wide as the rows, got \(5, 3\)"),
        (torch.ones(3), torch.ones(5, 3), 1, r"z must have shape \(N, D\)"),
        (torch.ones(3, 4).long(), torch.ones(5, 4), 1, r"z must be floating point"),
        (torch.ones(3, 4), torch.ones(5, 4).long(), 1, r"centres must be floating point"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ops", [kernels, reference])
def test_what_cannot_be_is_refused(ops, z: Tensor, centres: Tensor, k: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ops.nearest_centres(z, centres, k=k)


def test_second_derivatives_are_refused() -> None:
    z_ND = _normal(5, 3, seed=1).requires_grad_()
    squared, _ = kernels.nearest_centres(z_ND, _normal(4, 3, seed=2), k=2)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(squared.sum(), z_ND, create_graph=True)


@pytest.mark.skipif(COMPILED, reason="measures the resident set of the CPU path")
def test_the_matrix_of_distances_is_never_stored() -> None:
    """20,000 rows by 4,000 centres would be 305 MiB in float32; in a process of its own."""
    script = (
        "import torch; from namr_dist import kernels\n"
        "from namr_dist.kernels.bench.memory import resident_peak_mib\n"
        "z, c = torch.randn(20000, 16), torch.randn(4000, 16, requires_grad=True)\n"
        "def call(): kernels.nearest_centres(z, c, k=3)[0].sum().backward()\n"
        "z, rows = z[:100], z; call(); z = rows\n"
        "print(resident_peak_mib(call))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert float(ended.stdout) < 40
