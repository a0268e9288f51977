"""The GPU's mining and sampling against the reference in float64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from op_cases import KERNEL_DEVICE, KERNEL_MARKS, REPEATS, through_kernels
from torch import Tensor

from namr_dist.kernels import random as reference_random
from namr_dist.kernels.gpu import launch, mining
from namr_dist.kernels.gpu import random as gpu_random
from namr_dist.kernels.reference import mining as reference_mining
from namr_dist.kernels.reference.pairs import pairwise_squared_distance, unit_rows

pytestmark = KERNEL_MARKS
hardest_pairs = through_kernels(mining.hardest_pairs)
semihard_negatives = through_kernels(mining.semihard_negatives)
sampled_negatives = through_kernels(mining.sampled_negatives)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _labels(kind: str, B: int) -> Tensor:
    generator = torch.Generator().manual_seed(B)
    if kind == "one class":
        return torch.full((B,), 3)
    if kind == "all different":
        return torch.randperm(B, generator=generator) - B // 2
    # Classes of 1 to 9 rows, not sorted, some labels negative and some beyond 32 bits.
    size_C = torch.randint(1, 10, (B,), generator=generator)
    name_C = torch.randperm(B, generator=generator) - B // 2
    name_C[::3] += 2**40
    return name_C.repeat_interleave(size_C)[:B][torch.randperm(B, generator=generator)]


def _rows(kind: str, B: int, D: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * B + D)
    if kind == "lattice":  # few values, so many exact ties and duplicates; away from the origin
        varies_D = torch.rand(D, generator=generator) < 0.3
        return (torch.randint(-1, 2, (B, D), generator=generator) * varies_D + 5).to(dtype)
    if kind == "equal":
        return torch.randn(D, generator=generator).to(dtype).expand(B, D)
    return torch.randn(B, D, generator=generator).to(dtype)


def _positives(labels_B: Tensor) -> Tensor:
    pairs = reference_mining.pairs_of(labels_B)
    return pairs.positive_BR.masked_fill(~pairs.valid_BR, -1)


def _halves(B: int) -> list[tuple[slice, int]]:
    """The batch as one set, and uneven parts of it with their offsets."""
    cut = max(1, B // 3)
    return [(slice(0, B), 0), (slice(0, cut), 0), (slice(B - 1, B), B - 1)]


def _squared(z_BD: Tensor) -> Tensor:
    return pairwise_squared_distance(z_BD.double(), z_BD.double())


def _assert_hardest(z_BD: Tensor, labels_B: Tensor, *, exact: bool) -> None:
    """exact: the very rows; otherwise rows at their distance but for rounding."""
    squared_BB, pairs = _squared(z_BD), reference_mining.pairs_of(labels_B)
    far_BB = squared_BB.masked_fill(~pairs.same_BN, -math.inf)
    near_BB = squared_BB.masked_fill(~pairs.differ_BN, math.inf)
    for here, offset in _halves(len(z_BD)):
        positive_b, negative_b = hardest_pairs(
            z_BD[here], z_BD, labels_B[here], labels_B, offset=offset
        )
        for got_b, value_BB, best_B1, mask_BB in (
            (positive_b, far_BB, far_BB.amax(1, keepdim=True), pairs.same_BN),
            (negative_b, near_BB, near_BB.amin(1, keepdim=True), pairs.differ_BN),
        ):
            assert got_b.dtype == torch.int64
            some_b = mask_BB[here].any(1)
            assert torch.equal(got_b >= 0, some_b)
            if exact:
                want_b = (value_BB == best_B1)[here].to(torch.uint8).argmax(1)
                assert torch.equal(got_b[some_b], want_b[some_b])
            else:
                assert mask_BB[here].gather(1, got_b.clamp_min(0)[:, None])[some_b].all()
                value_b1 = value_BB[here].gather(1, got_b.clamp_min(0)[:, None])
                torch.testing.assert_close(
                    value_b1[some_b], best_B1[here][some_b], rtol=1e-5, atol=0
                )


def _semihard(z_BD: Tensor, labels_B: Tensor) -> Tensor:
    """The reference's choice, -1 on padding."""
    pairs = reference_mining.pairs_of(labels_B)
    return reference_mining.semihard_negatives(_squared(z_BD), pairs).masked_fill(
        ~pairs.valid_BR, -1
    )


def _assert_semihard(z_BD: Tensor, labels_B: Tensor, *, exact: bool = True) -> None:
    """exact: the very rows; otherwise rows at their distance but for rounding."""
    squared_BB, want_BR, positive_BR = (
        _squared(z_BD),
        _semihard(z_BD, labels_B),
        _positives(labels_B),
    )
    for here, _ in _halves(len(z_BD)):
        got_bR = semihard_negatives(z_BD[here], z_BD, labels_B[here], labels_B, positive_BR[here])
        assert got_bR.dtype == torch.int64 and torch.equal(got_bR < 0, positive_BR[here] < 0)
        if exact:
            assert torch.equal(got_bR, want_BR[here])
        else:
            got_d_bR, want_d_bR = (
                squared_BB[here].gather(1, x_bR.clamp_min(0)) for x_bR in (got_bR, want_BR[here])
            )
            torch.testing.assert_close(got_d_bR, want_d_bR, rtol=1e-5, atol=0)


@pytest.fixture(params=["a split per tile", "one split"])
def _splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a batch has one tile in each split: with fewer programs one of them walks over
    several tiles."""
    if request.param == "one split":
        monkeypatch.setattr(launch, "TARGET_PROGRAMS", 1)


SHAPES = [(2, 8), (3, 24), (33, 130), (64, 24), (130, 8), (9, 512)]
LABELS = ["mixed", "one class", "all different"]
HALF = [pytest.param(dtype, marks=pytest.mark.whole) for dtype in DTYPES[1:]]


@pytest.mark.parametrize("B, D", SHAPES)
def test_hardest_of_random_rows(B: int, D: int) -> None:
    for dtype in DTYPES:
        _assert_hardest(_rows("random", B, D, dtype=dtype), _labels("mixed", B), exact=False)


@pytest.mark.usefixtures("_splits")
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("rows", ["lattice", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_hardest_with_ties_is_the_lowest_row(dtype: torch.dtype, rows: str, labels: str) -> None:
    for B in (2, 66):
        _assert_hardest(_rows(rows, B, 8, dtype=dtype), _labels(labels, B), exact=True)


@pytest.mark.parametrize("B, D", SHAPES)
def test_semihard_of_random_rows(B: int, D: int) -> None:
    for dtype in DTYPES:
        # Random distances are so far apart that rounding does not change their order.
        _assert_semihard(_rows("random", B, D, dtype=dtype), _labels("mixed", B))


@pytest.mark.usefixtures("_splits")
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("rows", ["lattice", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_semihard_with_ties(dtype: torch.dtype, rows: str, labels: str) -> None:
    # On a lattice many negatives are exactly as far as the positive, and many are equally near
    # beyond it.
    for B in (2, 66):
        _assert_semihard(_rows(rows, B, 8, dtype=dtype), _labels(labels, B))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float16, "lattice"), (torch.bfloat16, "equal")])
def test_ties_of_half_types(dtype: torch.dtype, rows: str) -> None:
    rows_BD, labels_B = _rows(rows, 70, 8, dtype=dtype), _labels("mixed", 70)
    _assert_hardest(rows_BD, labels_B, exact=True)
    _assert_semihard(rows_BD, labels_B)


def test_semihard_more_positives_than_one_program_serves() -> None:
    for B in (40, 66):
        labels_B = (torch.arange(B) * 7 % 5 > 0).to(torch.int64)  # four fifths are one class
        assert _positives(labels_B).shape[1] > mining.SLOTS
        _assert_semihard(_rows("lattice", B, 8), labels_B)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_negative_that_repeats_the_positive_is_not_beyond_it(dtype: torch.dtype) -> None:
    # Every row occurs again in another class. On a grid of eighths all products are exact: in the
    # interpreter the rounding of a product depends on its place in the tile, on a GPU it does not.
    for B in (66, 130):
        half_ND = ((_rows("random", B // 2, 24) * 8).round() / 8).to(dtype)
        half_ND[B // 4] = half_ND[0]
        half_ND[B // 4, 3] += 0.125
        label_N = torch.arange(B // 2) % (B // 4)
        _assert_semihard(torch.cat([half_ND, half_ND]), torch.cat([label_N, label_N + B]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_where_distances_are_taken_again(dtype: torch.dtype) -> None:
    # Two far bundles: within one, distances have cancelled and come from the differences, place or
    # no place.
    half_ND = torch.where(torch.arange(36) % 2 == 0, 8.0, -8.0)[:, None] + 0.2 * _rows(
        "random", 36, 24
    )
    z_BD = torch.cat([half_ND, half_ND]).to(dtype)
    label_N = torch.arange(36) % 6
    labels_B = torch.cat([label_N, label_N + 6])
    positive_BR = _positives(labels_B)
    negative_BR = semihard_negatives(z_BD, z_BD, labels_B, labels_B, positive_BR)
    squared_BB = _squared(z_BD)
    assert (squared_BB.gather(1, negative_BR) > squared_BB.gather(1, positive_BR)).all()


def test_near_duplicates_keep_their_order() -> None:
    # Rows far from the origin, some a thousandth of the spread apart: products alone would lose
    # their distances.
    z_BD = 100 * _rows("random", 40, 24)
    z_BD[20:] = z_BD[:20] + 1e-3 * _rows("random", 20, 24)
    labels_B = torch.arange(40) // 2
    _assert_hardest(z_BD, labels_B, exact=False)
    _assert_semihard(z_BD, labels_B, exact=False)


@triton.jit(do_not_specialize=["low", "high"])
def _uniform_kernel(low, high, first, out, N: tl.constexpr, LOG: tl.constexpr):
    columns = tl.arange(0, N)
    state = gpu_random.absorb(gpu_random.seeded(low, high), columns + first)
    v = gpu_random.uniform(gpu_random.absorb(state[:, None], columns[None, :]))
    if LOG:
        v = gpu_random.exponential(v)
    tl.store(out + columns[:, None] * N + columns[None, :], v)


@pytest.mark.parametrize(
    "seed", [0, 1, 16, 2**31, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1, 2**70 + 5, -1]
)
def test_uniform_numbers_are_the_reference_s_bit_for_bit(seed: int) -> None:
    low, high = gpu_random.seed_words(seed)
    assert -(2**31) <= low < 2**31 and -(2**31) <= high < 2**31
    row_N = torch.arange(64)
    for first in (0, 70_000, 2**31 - 64):
        got_NN, log_NN = torch.empty(2, 64, 64, device=KERNEL_DEVICE)
        _uniform_kernel[(1,)](low, high, first, got_NN, N=64, LOG=False)
        _uniform_kernel[(1,)](low, high, first, log_NN, N=64, LOG=True)
        want_NN = reference_random.uniform(seed, row_N[:, None] + first, row_N[None, :])
        assert torch.equal(got_NN.cpu(), want_NN)
        torch.testing.assert_close(
            log_NN.cpu().double(), -torch.log1p(-want_NN.double()), rtol=5e-7, atol=0
        )


@triton.jit
def _ends_kernel(hashed, out, N: tl.constexpr):
    at = tl.arange(0, N)
    v = gpu_random.uniform(tl.load(hashed + at).to(tl.uint32))
    tl.store(out + at, v)
    tl.store(out + N + at, gpu_random.exponential(v))


def test_smallest_and_largest_hashes() -> None:
    hashed_N = torch.tensor([0, 1, 2, 255, 256, 2**24 + 1, 2**32 - 2**8, 2**32 - 1])
    out_2N = torch.empty(2, 8, device=KERNEL_DEVICE)
    _ends_kernel[(1,)](hashed_N.to(KERNEL_DEVICE), out_2N, N=8)
    out_2N = out_2N.cpu()
    want_N = (hashed_N.clamp_min(1).float() * 2.0**-32).clamp_max(1 - 2.0**-24)
    assert torch.equal(out_2N[0], want_N)
    torch.testing.assert_close(
        out_2N[1].double(), -torch.log1p(-want_N.double()), rtol=5e-7, atol=0
    )


def _keys(z_BD: Tensor, labels_B: Tensor, positive_BR: Tensor, seed: int) -> Tensor:
    """log weight + noise of the reference in float64, (B, R, B)."""
    weight_BB = reference_mining.log_weights(z_BD.double(), reference_mining.pairs_of(labels_B))
    row_B = torch.arange(len(z_BD))
    noise_BRB = reference_random.gumbel(
        seed, row_B[:, None, None], positive_BR[:, :, None], row_B, dtype=torch.float64
    )
    return weight_BB[:, None] + noise_BRB


def _assert_sampled(x_BD: Tensor, labels_B: Tensor, *, seed: int) -> tuple[int, int]:
    """Every draw is the reference's unless the two best keys nearly tie; returns how many do, and
    how many draws."""
    positive_BR = _positives(labels_B)
    valid_BR = positive_BR >= 0
    keys_BRB = _keys(x_BD, labels_B, positive_BR, seed)
    best = keys_BRB.topk(2, dim=2)
    doubtful_BR = best.values[..., 0] - best.values[..., 1] < 1e-4
    for here, offset in _halves(len(x_BD)):
        got_bR = sampled_negatives(
            x_BD[here], x_BD, labels_B[here], labels_B, positive_BR[here], offset=offset, seed=seed
        )
        assert got_bR.dtype == torch.int64 and torch.equal(got_bR >= 0, valid_BR[here])
        wrong_bR = (got_bR != best.indices[here][..., 0]) & valid_BR[here]
        assert not (wrong_bR & ~doubtful_BR[here]).any()
        assert (labels_B[got_bR.clamp_min(0)] != labels_B[here][:, None])[valid_BR[here]].all()
    return int((doubtful_BR & valid_BR).sum()), int(valid_BR.sum())


@pytest.mark.usefixtures("_splits")
@pytest.mark.parametrize("B, D", [(3, 8), (33, 130), (70, 24), (20, 512)])
def test_draws_are_the_reference_s(B: int, D: int) -> None:
    doubtful = draws = 0
    for seed, dtype in enumerate(DTYPES):
        x_BD = unit_rows(_rows("random", B, D)).to(dtype)
        few, all_of_them = _assert_sampled(x_BD, _labels("mixed", B), seed=seed + 2**40)
        doubtful, draws = doubtful + few, draws + all_of_them
    assert doubtful <= 1 + draws // 500
    assert draws > 0 or B == 3


def test_draws_of_float32_rows_agree_with_the_reference_function() -> None:
    x_BD, labels_B = unit_rows(_rows("random", 60, 24)), _labels("mixed", 60)
    pairs = reference_mining.pairs_of(labels_B)
    want_BR = reference_mining.distance_weighted_negatives(x_BD.double(), pairs, seed=7)
    want_BR = want_BR.masked_fill(~pairs.valid_BR, -1)
    got_BR = sampled_negatives(
        x_BD, x_BD, labels_B, labels_B, _positives(labels_B), offset=0, seed=7
    )
    assert (got_BR != want_BR).sum() <= 1 and (want_BR >= 0).sum() > 100


@pytest.mark.parametrize("labels", LABELS)
def test_draws_among_equal_rows(labels: str) -> None:
    x_BD = unit_rows(torch.ones(70, 16))
    _assert_sampled(x_BD, _labels(labels, 70), seed=3)


def test_draws_of_anchors_with_all_negatives_out_of_reach() -> None:
    # Two opposite bundles of rows: one class each but for a few rows, whose anchors have negatives
    # within reach.
    sign_B = torch.where(torch.arange(44) % 2 == 0, 1.0, -1.0)
    x_BD = unit_rows(sign_B[:, None] * torch.ones(44, 24) + 0.1 * _rows("random", 44, 24))
    labels_B = torch.arange(44) % 2
    assert mining.SLOTS < 21
    assert float(_squared(x_BD)[0, 1::2].min()) > 1.96
    _assert_sampled(x_BD, labels_B, seed=11)
    labels_B[:4] = 5  # two of each bundle: the others now have exactly two negatives within reach
    _assert_sampled(x_BD, labels_B, seed=11)


def test_draws_depend_on_the_seed() -> None:
    x_BD, labels_B = unit_rows(_rows("random", 30, 8)), torch.arange(30) // 3
    positive_BR = _positives(labels_B)
    drawn = [
        sampled_negatives(x_BD, x_BD, labels_B, labels_B, positive_BR, offset=0, seed=seed)
        for seed in (4, 4, 5, 4 + 2**32)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


def test_without_positives() -> None:
    z_BD, labels_B = unit_rows(_rows("random", 10, 8)), torch.arange(10)
    positive_BR = torch.empty(10, 0, dtype=torch.int64)
    assert semihard_negatives(z_BD, z_BD, labels_B, labels_B, positive_BR).shape == (10, 0)
    assert sampled_negatives(
        z_BD, z_BD, labels_B, labels_B, positive_BR, offset=0, seed=1
    ).shape == (10, 0)
    padding_BR = torch.full((10, 3), -1)
    for negative_BR in (
        semihard_negatives(z_BD, z_BD, labels_B, labels_B, padding_BR),
        sampled_negatives(z_BD, z_BD, labels_B, labels_B, padding_BR, offset=0, seed=1),
    ):
        assert torch.equal(negative_BR, padding_BR)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_nan_is_found(dtype: torch.dtype) -> None:
    # Were it passed over, the loss would be finite.
    z_BD, labels_B = _rows("random", 70, 24, dtype=dtype), torch.arange(70) // 2
    z_BD[67] = torch.nan
    _, negative_B = hardest_pairs(z_BD, z_BD, labels_B, labels_B, offset=0)
    semihard_BR = semihard_negatives(z_BD, z_BD, labels_B, labels_B, _positives(labels_B))
    positive_B, _ = hardest_pairs(z_BD[66:], z_BD, labels_B[66:], labels_B, offset=66)
    assert positive_B.tolist() == [67, 66, 69, 68]
    for chosen_B in (negative_B, semihard_BR[:, 0]):
        assert ((chosen_B >= 0) & (chosen_B < 70)).all()
        assert (labels_B[chosen_B] != labels_B).all()
        # Centring spreads NaN over all float32 rows: then any row may be found.
        if dtype != torch.float32:
            assert (chosen_B[:66] == 67).all()
    drawn_BR = sampled_negatives(
        z_BD, z_BD, labels_B, labels_B, _positives(labels_B), offset=0, seed=1
    )
    assert ((drawn_BR >= 0) & (drawn_BR < 70)).all()


def test_larger_batch() -> None:
    z_BD, labels_B = _rows("random", 300, 8), torch.arange(300) % 100
    _assert_semihard(z_BD, labels_B)
    _assert_hardest(z_BD, labels_B, exact=False)


def test_equal_calls_give_equal_bits() -> None:
    z_BD, labels_B = unit_rows(_rows("random", 40, 8)), torch.arange(40) // 4
    positive_BR = _positives(labels_B)

    def mined() -> Tensor:
        positive_B, negative_B = hardest_pairs(z_BD, z_BD, labels_B, labels_B, offset=0)
        semihard_BR = semihard_negatives(z_BD, z_BD, labels_B, labels_B, positive_BR)
        drawn_BR = sampled_negatives(z_BD, z_BD, labels_B, labels_B, positive_BR, offset=0, seed=3)
        return torch.cat([positive_B[:, None], negative_B[:, None], semihard_BR, drawn_BR], 1)

    first = mined()
    for _ in range(1, REPEATS):
        assert torch.equal(mined(), first)
