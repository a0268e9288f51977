"""The blocked CPU mining against the float64 definition.

Small integers make every distance exact in any order of summation, so there ties must go the same
way; among other rows float32 may prefer a pair that is farther by a rounding.
"""

import math

import pytest
import torch
from torch import Tensor

from namr_dist.kernels import cpu
from namr_dist.kernels.cpu import blocks
from namr_dist.kernels.random import exponential, gumbel
from namr_dist.kernels.reference.mining import (
    Pairs,
    distance_weighted_negatives,
    log_weights,
    pairs_of,
    semihard_negatives,
)
from namr_dist.kernels.reference.pairs import pairwise_squared_distance, unit_rows

SHAPES = [(2, 8), (3, 24), (17, 130), (100, 24), (300, 100)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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


def _labels(B: int, kind: str) -> Tensor:
    """Unsorted labels with gaps between their values; sizes of classes differ."""
    generator = torch.Generator().manual_seed(B)
    some_B = torch.randint(max(2, B // 4), (B,), generator=generator) * 5 - 3
    return {
        "some": some_B,
        "one": torch.full((B,), 9),
        "all": torch.randperm(B, generator=generator),
    }[kind]


def _integers(B: int, D: int) -> Tensor:
    """Many ties between distances, and equal rows."""
    return torch.randint(-1, 2, (B, D), generator=torch.Generator().manual_seed(D)).double()


def _floats(B: int, D: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(D), dtype=torch.float64) + 1.0


def _padded(pairs: Pairs) -> Tensor:
    """The reference's positives with -1 on the padding."""
    return pairs.positive_BR.masked_fill(~pairs.valid_BR, -1)


def _reference_hardest(z_BD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    squared_BB = pairwise_squared_distance(z_BD.double(), z_BD.double())
    positive_B = squared_BB.masked_fill(~pairs.same_BN, -1.0).argmax(1)
    negative_B = squared_BB.masked_fill(~pairs.differ_BN, math.inf).argmin(1)
    return (
        positive_B.masked_fill(~pairs.same_BN.any(1), -1),
        negative_B.masked_fill(~pairs.differ_BN.any(1), -1),
    )


def _hardest(z_BD: Tensor, labels_B: Tensor, pieces: list[slice]) -> list[Tensor]:
    parts = [
        cpu.hardest_pairs(z_BD[p], z_BD, labels_B[p], labels_B, offset=p.start) for p in pieces
    ]
    return [torch.cat(side) for side in zip(*parts, strict=True)]


def _semihard(z_BD: Tensor, labels_B: Tensor, positive_BR: Tensor, pieces: list[slice]) -> Tensor:
    return torch.cat(
        [
            cpu.semihard_negatives(z_BD[p], z_BD, labels_B[p], labels_B, positive_BR[p])
            for p in pieces
        ]
    )


def _sampled(
    x_BD: Tensor, labels_B: Tensor, positive_BR: Tensor, pieces: list[slice], seed: int
) -> Tensor:
    return torch.cat(
        [
            cpu.sampled_negatives(
                x_BD[p], x_BD, labels_B[p], labels_B, positive_BR[p], offset=p.start, seed=seed
            )
            for p in pieces
        ]
    )


@pytest.mark.parametrize("kind", ["some", "one", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_ties_go_to_the_lowest_row(B: int, D: int, dtype: torch.dtype, kind: str) -> None:
    z_BD, labels_B = _integers(B, min(D, 24)), _labels(B, kind)
    pairs = pairs_of(labels_B)
    positive_BR = _padded(pairs)
    semihard_BR = semihard_negatives(pairwise_squared_distance(z_BD, z_BD), pairs)
    for pieces in ([slice(0, B)], _pieces(B)):
        got = _hardest(z_BD.to(dtype), labels_B, pieces)
        for ours, theirs in zip(got, _reference_hardest(z_BD, pairs), strict=True):
            assert torch.equal(ours, theirs)
        got_BR = _semihard(z_BD.to(dtype), labels_B, positive_BR, pieces)
        assert torch.equal(got_BR, semihard_BR.masked_fill(positive_BR < 0, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_mined_distances_are_those_of_the_definition(B: int, D: int, dtype: torch.dtype) -> None:
    z_BD, labels_B = _floats(B, D).to(dtype), _labels(B, "some")
    pairs = pairs_of(labels_B)
    positive_BR = _padded(pairs)
    squared_BB = pairwise_squared_distance(z_BD.double(), z_BD.double())
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    # A negative just as far as the positive, to float32, may count as farther or not.
    reach_BR = squared_BB.gather(1, pairs.positive_BR)
    gap_BRB = (
        (squared_BB[:, None] - reach_BR[:, :, None])
        .abs()
        .masked_fill(~pairs.differ_BN[:, None], math.inf)
    )
    clear_BR = (gap_BRB.amin(2) > rtol * reach_BR) | ~pairs.valid_BR
    assert clear_BR.numel() == 0 or clear_BR.double().mean() > 0.95

    def same(got: Tensor, want: Tensor) -> None:
        assert torch.equal(got < 0, want < 0)
        got, want = (
            squared_BB.gather(1, index.clamp_min(0)).where(want >= 0, 0.0) for index in (got, want)
        )
        torch.testing.assert_close(got, want, rtol=rtol, atol=0)

    for pieces in ([slice(0, B)], _pieces(B)):
        for ours, theirs in zip(
            _hardest(z_BD, labels_B, pieces), _reference_hardest(z_BD, pairs), strict=True
        ):
            same(ours[:, None], theirs[:, None])
        theirs_BR = semihard_negatives(squared_BB, pairs).masked_fill(positive_BR < 0, -1)
        got_BR = _semihard(z_BD, labels_B, positive_BR, pieces)
        same(got_BR.where(clear_BR, -1), theirs_BR.where(clear_BR, -1))


def test_nearest_among_near_duplicates() -> None:
    # Distances that a product on these rows cannot tell apart: 1e-4, 2e-4, ... beside norms of 10.
    z_BD = torch.zeros(12, 3)
    z_BD[:6, 0], z_BD[6:, 0] = 10.0, -10.0
    z_BD[:6, 1] = 1e-4 * torch.tensor([0.0, 5.0, 2.0, 3.0, 1.0, 4.0])
    labels_B = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    pairs = pairs_of(labels_B)
    squared_BB = pairwise_squared_distance(z_BD.double(), z_BD.double())
    positive_B, negative_B = cpu.hardest_pairs(z_BD, z_BD, labels_B, labels_B, offset=0)
    want_positive_B, want_negative_B = _reference_hardest(z_BD, pairs)
    assert torch.equal(positive_B[:6], want_positive_B[:6]) and torch.equal(
        negative_B[:6], want_negative_B[:6]
    )
    got_BR = cpu.semihard_negatives(z_BD, z_BD, labels_B, labels_B, pairs.positive_BR)
    assert torch.equal(got_BR[:6], semihard_negatives(squared_BB, pairs)[:6])


@pytest.mark.parametrize("labels", ["one", "all", "some"])
def test_all_rows_equal(labels: str) -> None:
    z_BD, labels_B = torch.full((21, 5), 0.1), _labels(21, labels)
    pairs = pairs_of(labels_B)
    for ours, theirs in zip(
        _hardest(z_BD, labels_B, [slice(0, 21)]), _reference_hardest(z_BD, pairs), strict=True
    ):
        assert torch.equal(ours, theirs)
    want_BR = semihard_negatives(torch.zeros(21, 21), pairs).masked_fill(_padded(pairs) < 0, -1)
    assert torch.equal(_semihard(z_BD, labels_B, _padded(pairs), [slice(0, 21)]), want_BR)


def _clear(x_BD: Tensor, pairs: Pairs, seed: int) -> Tensor:
    """(B, R): draws whose two best keys are apart by more than float32's error."""
    row_B = torch.arange(len(x_BD))
    log_weight_BB = log_weights(x_BD.double(), pairs)
    clear = []
    for r in range(pairs.positive_BR.shape[1]):
        noise_BB = gumbel(
            seed, row_B[:, None], pairs.positive_BR[:, r, None], row_B, dtype=torch.float64
        )
        best = (log_weight_BB + noise_BB).topk(2, 1).values
        clear.append(best[:, 0] - best[:, 1] > 1e-3)
    return torch.stack(clear, 1) if clear else torch.zeros(len(x_BD), 0, dtype=torch.bool)


@pytest.mark.parametrize("kind", ["some", "one", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), [(2, 8), (3, 24), (17, 2), (17, 130), (100, 3), (300, 100)])
def test_draws_are_the_references(B: int, D: int, dtype: torch.dtype, kind: str) -> None:
    x_BD, labels_B = unit_rows(_floats(B, D)).to(dtype), _labels(B, kind)
    pairs = pairs_of(labels_B)
    positive_BR = _padded(pairs)
    for seed in (0, 2**40 + 3):
        want_BR = distance_weighted_negatives(x_BD.double(), pairs, seed=seed).masked_fill(
            positive_BR < 0, -1
        )
        clear_BR = _clear(x_BD, pairs, seed) | (positive_BR < 0)
        assert clear_BR.numel() == 0 or float(clear_BR.double().mean()) > 0.95
        for pieces in ([slice(0, B)], _pieces(B)):
            got_BR = _sampled(x_BD, labels_B, positive_BR, pieces, seed)
            # Rows of half types are of unit length to their own precision only; the definition
            # rescales them.
            if dtype in (torch.float64, torch.float32):
                assert torch.equal(got_BR[clear_BR], want_BR[clear_BR])
            assert torch.equal(got_BR < 0, want_BR < 0)
            valid_BR = got_BR >= 0
            assert pairs.differ_BN.gather(1, got_BR.clamp_min(0))[valid_BR].all()


def test_draws_where_no_negative_is_in_reach_and_from_rows_of_zeros() -> None:
    x_BD = torch.zeros(40, 4)
    x_BD[:10, 0], x_BD[10:20, 0], x_BD[20:30, 1] = 1.0, -1.0, 1.0
    labels_B = torch.arange(40) // 10
    pairs = pairs_of(labels_B)
    two = torch.cat([torch.arange(10), torch.arange(10, 20)])
    for rows in (two, torch.arange(40)):
        some = pairs_of(labels_B[rows])
        want_BR = distance_weighted_negatives(x_BD[rows].double(), some, seed=5)
        clear_BR = _clear(x_BD[rows], some, 5)
        got_BR = _sampled(x_BD[rows], labels_B[rows], _padded(some), [slice(0, len(rows))], 5)
        assert (
            torch.equal(got_BR[clear_BR], want_BR[clear_BR])
            and float(clear_BR.double().mean()) > 0.9
        )
    assert pairs.valid_BR.all()


def test_the_exponential_is_the_gumbels() -> None:
    i, p, j = torch.arange(40)[:, None, None], torch.arange(30)[:, None], torch.arange(50)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            -torch.log(exponential(3, i, p, j, dtype=dtype)), gumbel(3, i, p, j, dtype=dtype)
        )


def test_nan_does_not_crash() -> None:
    z_BD, labels_B = _floats(20, 4).float(), _labels(20, "some")
    z_BD[3, 1], z_BD[7] = math.nan, math.inf
    positive_BR = _padded(pairs_of(labels_B))
    got = [
        *cpu.hardest_pairs(z_BD, z_BD, labels_B, labels_B, offset=0),
        cpu.semihard_negatives(z_BD, z_BD, labels_B, labels_B, positive_BR),
        cpu.sampled_negatives(z_BD, z_BD, labels_B, labels_B, positive_BR, offset=0, seed=0),
    ]
    assert all(int(index.min()) >= -1 and int(index.max()) < 20 for index in got)


def test_equal_calls_give_equal_results() -> None:
    x_BD, labels_B = unit_rows(_floats(60, 16)).float(), _labels(60, "some")
    positive_BR = _padded(pairs_of(labels_B))

    def once() -> list[Tensor]:
        whole = [slice(0, 60)]
        return [
            *_hardest(x_BD, labels_B, whole),
            _semihard(x_BD, labels_B, positive_BR, whole),
            _sampled(x_BD, labels_B, positive_BR, whole, 1),
        ]

    first = once()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
