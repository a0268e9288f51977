"""The GPU's pair distances and their gradient against float64 on the differences."""

import pytest
import torch
from op_cases import KERNEL_MARKS, REPEATS, through_kernels
from torch import Tensor

from namr_dist.kernels.gpu import pairs

pytestmark = KERNEL_MARKS
pair_distance, pair_gradient = (
    through_kernels(pairs.pair_distance),
    through_kernels(pairs.pair_gradient),
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _batch(
    B: int, D: int, S: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows, and for each the numbers of S others, a fifth of them -1."""
    generator = torch.Generator().manual_seed(seed)
    z_BD = torch.randn(B, D, generator=generator).to(dtype)
    index_BS = torch.randint(B, (B, S), generator=generator)
    return z_BD, index_BS.masked_fill_(torch.rand(B, S, generator=generator) < 0.2, -1)


def _distances(z_bD: Tensor, z_BD: Tensor, index_bS: Tensor) -> Tensor:
    """By differences in float64; autograd gives a pair at distance 0 a gradient of 0."""
    difference_bSD = z_bD[:, None] - z_BD[index_bS.clamp_min(0)]
    return torch.linalg.vector_norm(
        difference_bSD.masked_fill((index_bS < 0)[..., None], 0.0), dim=2
    )


def _gradient(z_BD: Tensor, index_BS: Tensor, weight_BS: Tensor) -> Tensor:
    z_BD = z_BD.double().requires_grad_()
    (_distances(z_BD, z_BD, index_BS) * weight_BS.double()).sum().backward()
    assert z_BD.grad is not None
    return z_BD.grad


def _assert_gradient(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = (got.double() - want).abs().max()
    assert float(error) <= 1e-5 * float(want.abs().max()), float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, D, S", [(2, 8, 1), (7, 24, 3), (50, 130, 20), (130, 100, 2), (9, 512, 5)]
)
def test_distances(B: int, D: int, S: int, dtype: torch.dtype) -> None:
    z_BD, index_BS = _batch(B, D, S, dtype=dtype)
    here = slice(B // 3, B)
    got_bS = pair_distance(z_BD[here], z_BD, index_BS[here])
    want_bS = _distances(z_BD[here].double(), z_BD.double(), index_BS[here])
    assert got_bS.dtype == torch.float32
    assert torch.equal(got_bS == 0, want_bS == 0)
    torch.testing.assert_close(got_bS.double(), want_bS, rtol=1e-6, atol=0)


def test_distances_of_near_duplicates_far_from_the_origin() -> None:
    z_BD, index_BS = _batch(20, 24, 4)
    z_BD = 1000 + z_BD * 2.0**-12
    want_BS = _distances(z_BD.double(), z_BD.double(), index_BS)
    torch.testing.assert_close(
        pair_distance(z_BD, z_BD, index_BS).double(), want_BS, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "B, D, S", [(2, 8, 1), (7, 24, 3), (24, 130, 20), (50, 100, 2), (5, 512, 3)]
)
def test_gradient(B: int, D: int, S: int, dtype: torch.dtype) -> None:
    z_BD, index_BS = _batch(B, D, S, dtype=dtype)
    weight_BS = torch.randn(B, S, generator=torch.Generator().manual_seed(1))
    got_BD = pair_gradient(z_BD, index_BS, weight_BS, first=0, rows=B)
    _assert_gradient(got_BD, _gradient(z_BD, index_BS, weight_BS))


@pytest.mark.parametrize("first, rows", [(0, 1), (0, 13), (13, 17), (29, 1), (5, 0)])
def test_some_rows_of_the_gradient(first: int, rows: int) -> None:
    z_BD, index_BS = _batch(30, 24, 3)
    weight_BS = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    whole_BD = pair_gradient(z_BD, index_BS, weight_BS, first=0, rows=30)
    got_rD = pair_gradient(z_BD, index_BS, weight_BS, first=first, rows=rows)
    assert torch.equal(got_rD, whole_BD[first : first + rows])


@pytest.mark.parametrize("hub", [0, 69])
def test_a_row_that_all_choose(hub: int) -> None:
    z_BD, index_BS = _batch(70, 24, 3)
    index_BS[:, 1] = hub
    weight_BS = torch.rand(70, 3, generator=torch.Generator().manual_seed(1))
    got_BD = pair_gradient(z_BD, index_BS, weight_BS, first=0, rows=70)
    _assert_gradient(got_BD, _gradient(z_BD, index_BS, weight_BS))


def test_pairs_at_distance_zero_and_listed_twice() -> None:
    z_BD, index_BS = _batch(24, 8, 3)
    z_BD[5:15] = z_BD[5]  # equal rows
    index_BS[3] = 9  # one pair three times
    index_BS[:, 0] = torch.arange(24)  # and every row with itself
    weight_BS = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    got_BD = pair_gradient(z_BD, index_BS, weight_BS, first=0, rows=24)
    _assert_gradient(got_BD, _gradient(z_BD, index_BS, weight_BS))
    one_BD = torch.ones(24, 8)
    assert not pair_gradient(one_BD, index_BS, weight_BS, first=0, rows=24).any()


@pytest.mark.parametrize("S", [0, 2])
def test_without_any_pair(S: int) -> None:
    z_BD = torch.ones(6, 8)
    index_BS = torch.full((6, S), -1)
    assert torch.equal(pair_distance(z_BD, z_BD, index_BS), torch.zeros(6, S))
    gradient_BD = pair_gradient(z_BD, index_BS, torch.full((6, S), torch.nan), first=0, rows=6)
    assert torch.equal(gradient_BD, torch.zeros(6, 8))


def test_nan_reaches_its_pairs_and_no_others() -> None:
    z_BD, _ = _batch(6, 8, 1)
    z_BD[2, 3] = torch.nan
    index_BS = torch.tensor([[1], [0], [3], [-1], [5], [4]])
    assert (
        pair_distance(z_BD, z_BD, index_BS).isnan().squeeze(1).tolist()
        == [False, False, True] + [False] * 3
    )
    gradient_BD = pair_gradient(z_BD, index_BS, torch.ones(6, 1), first=0, rows=6)
    assert gradient_BD.isnan().any(1).tolist() == [False, False, True, True, False, False]


def test_equal_calls_give_equal_bits() -> None:
    z_BD, index_BS = _batch(12, 8, 5)
    index_BS[:, 1] = 8
    weight_BS = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    first_BD = pair_gradient(z_BD, index_BS, weight_BS, first=0, rows=12)
    for _ in range(1, REPEATS):
        assert torch.equal(pair_gradient(z_BD, index_BS, weight_BS, first=0, rows=12), first_BD)
