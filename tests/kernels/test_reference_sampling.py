"""Counter-based random numbers, and the negatives drawn with them."""

import math

import pytest
import torch
from torch import Tensor

from namr_dist.kernels import reference
from namr_dist.kernels.random import gumbel, hash_counters, uniform
from namr_dist.kernels.reference.mining import distance_weighted_negatives, log_weights, pairs_of


def _hash_in_plain_integers(seed: int, *counters: int) -> int:
    """The recipe of kernels/random.py with Python's unbounded integers."""
    h = 0
    for c in (seed % 2**32, seed // 2**32 % 2**32, *counters):
        x = ((h ^ c) + 0x9E3779B9) % 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        h = x ^ (x >> 16)
    return h


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 + 12345])
def test_hash_equals_the_recipe_bit_for_bit(seed: int) -> None:
    i, p, j = (
        torch.tensor([0, 3, 2**31]),
        torch.tensor([1, 70_000]),
        torch.tensor([0, 2**20, 2**32 - 1]),
    )
    got = hash_counters(seed, i[:, None, None], p[:, None], j)
    for at, a in enumerate(i.tolist()):
        want = [[_hash_in_plain_integers(seed, a, b, c) for c in j.tolist()] for b in p.tolist()]
        assert got[at].tolist() == want


def test_known_hashes_never_change() -> None:
    # Draws of past runs are replayed from these: a new value here is a break of reproducibility.
    got = [int(hash_counters(7, *map(torch.tensor, c))) for c in ((0, 1, 2), (2, 1, 0))]
    assert got == [1674334581, 3721306404]


def test_every_counter_and_both_words_of_the_seed_matter() -> None:
    base = (3, 5, 9)
    hashes = {int(hash_counters(1, *map(torch.tensor, base)))}
    for changed in ((4, 5, 9), (3, 6, 9), (3, 5, 10), (5, 3, 9), (9, 5, 3)):
        hashes.add(int(hash_counters(1, *map(torch.tensor, changed))))
    hashes.add(int(hash_counters(2, *map(torch.tensor, base))))
    hashes.add(int(hash_counters(1 + 2**32, *map(torch.tensor, base))))
    assert len(hashes) == 8


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_uniform_along_each_counter_and_the_seed(axis: int) -> None:
    n, cells = 20_000, 50
    if axis == 3:
        v = torch.stack([uniform(seed, torch.arange(20)) for seed in range(n // 20)]).flatten()
    else:
        counters = [torch.tensor(11), torch.tensor(12), torch.tensor(13)]
        counters[axis] = torch.arange(n)
        v = uniform(5, *counters)
    assert v.dtype == torch.float32
    assert float(v.min()) > 0.0 and float(v.max()) < 1.0
    count = torch.histc(v.double(), cells, 0.0, 1.0)
    chi2 = float(((count - n / cells) ** 2 / (n / cells)).sum())
    assert abs(chi2 - (cells - 1)) < 4 * math.sqrt(2 * (cells - 1))
    neighbours = torch.corrcoef(torch.stack([v[:-1], v[1:]]))[0, 1]
    assert abs(float(neighbours)) < 4 / math.sqrt(n)


def test_gumbel_is_finite_at_both_ends_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0, 1, 2**32 - 1])
    monkeypatch.setattr("namr_dist.kernels.random.hash_counters", lambda *_: ends)
    for dtype in (torch.float32, torch.float64):
        g = gumbel(0, ends, dtype=dtype)
        assert g.isfinite().all() and g.dtype == dtype
        assert g[0] == g[1] > 22 and g[2] < -2.8


def test_gumbel_has_the_mean_and_variance_of_its_law() -> None:
    g = gumbel(1, torch.arange(40_000), dtype=torch.float64)
    assert float(g.mean()) == pytest.approx(0.57721566, abs=4 * 1.2825 / 200)
    assert float(g.var()) == pytest.approx(math.pi**2 / 6, rel=0.06)


def _batch() -> tuple[Tensor, Tensor]:
    """Ten unit rows in 6 dimensions; pairs below 0.5, between, and beyond 1.4 all occur."""
    x_BD = torch.zeros(10, 6, dtype=torch.float64)
    for row, degrees in enumerate([0, 10, 35, 20, 50, 65, 80, 25, 120, 55]):
        x_BD[row, 0], x_BD[row, 1] = (
            math.cos(math.radians(degrees)),
            math.sin(math.radians(degrees)),
        )
    return x_BD, torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 4])


def _chances(x_BD: Tensor, labels_B: Tensor, a: int) -> list[float]:
    D = x_BD.shape[1]
    weights = []
    for n in range(len(labels_B)):
        d = math.dist(x_BD[a].tolist(), x_BD[n].tolist())
        clamped = max(d, 0.5)
        # The density itself, not its logarithm.
        q = clamped ** (D - 2) * max(0.0, 1 - clamped**2 / 4) ** ((D - 3) / 2)
        weights.append(0.0 if labels_B[n] == labels_B[a] or d > 1.4 else 1 / q)
    return [w / sum(weights) for w in weights]


def test_log_weights_are_the_published_density() -> None:
    x_BD, labels_B = _batch()
    got_BB = torch.softmax(log_weights(3.0 * x_BD, pairs_of(labels_B)), dim=1)  # any length will do
    want_BB = torch.tensor([_chances(x_BD, labels_B, a) for a in range(10)], dtype=torch.float64)
    torch.testing.assert_close(got_BB, want_BB)


def test_frequencies_of_draws_match_the_chances() -> None:
    x_BD, labels_B = _batch()
    pairs, seeds = pairs_of(labels_B), 1000
    draws_SBR = torch.stack(
        [distance_weighted_negatives(x_BD, pairs, seed=seed) for seed in range(seeds)]
    )
    chi2, freedom = 0.0, 0
    for a, r in pairs.valid_BR.nonzero().tolist():
        count = torch.bincount(draws_SBR[:, a, r], minlength=10).tolist()
        for n, chance in enumerate(_chances(x_BD, labels_B, a)):
            if chance == 0.0:
                assert count[n] == 0
            else:
                chi2 += (count[n] - seeds * chance) ** 2 / (seeds * chance)
                freedom += 1
        freedom -= 1
    assert freedom > 40
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)
    # The two positives of one anchor draw independently: the joint table is the product of its
    # sides.
    first_S, second_S = draws_SBR[:, 1, 0], draws_SBR[:, 1, 1]
    agree = float((first_S == second_S).double().mean())
    expected = sum(c * c for c in _chances(x_BD, labels_B, 1))
    assert abs(agree - expected) < 4 * math.sqrt(expected * (1 - expected) / seeds)


def test_without_a_negative_in_reach_all_are_equally_likely() -> None:
    x_BD = torch.tensor([[1.0, 0], [1, 0.01], [-1, 0], [-1, 0.3], [-1, -0.3]], dtype=torch.float64)
    labels_B = torch.tensor([0, 0, 1, 2, 3])
    pairs, seeds = pairs_of(labels_B), 600
    drawn_S = torch.stack(
        [distance_weighted_negatives(x_BD, pairs, seed=seed)[0, 0] for seed in range(seeds)]
    )
    count = torch.bincount(drawn_S, minlength=5).tolist()
    assert count[:2] == [0, 0]
    assert all(abs(c - seeds / 3) < 4 * math.sqrt(seeds * 2 / 9) for c in count[2:])


def test_same_seed_same_draw_other_seed_other_draw() -> None:
    z_BD = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels_B = torch.arange(20) // 4
    pairs = pairs_of(labels_B)
    one, again, other = (distance_weighted_negatives(z_BD, pairs, seed=s) for s in (4, 4, 5))
    assert torch.equal(one, again) and not torch.equal(one, other)
    losses = [
        float(reference.triplet_loss(z_BD, labels_B, mining="distance_weighted", seed=s))
        for s in (4, 4, 5)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_global_generator_is_neither_read_nor_moved() -> None:
    z_BD, labels_B = _batch()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = reference.triplet_loss(z_BD, labels_B, mining="distance_weighted", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert first == reference.triplet_loss(z_BD, labels_B, mining="distance_weighted", seed=1)


def test_rows_appended_out_of_reach_leave_earlier_draws_alone() -> None:
    # The counters are row numbers, so noise for (i, p, j) does not know how many rows there are.
    x_BD, labels_B = _batch()
    far_BD = torch.cat([x_BD, -x_BD[:1]])  # beyond 1.4 of most rows
    unreached = [a for a in range(10) if math.dist(x_BD[a].tolist(), far_BD[10].tolist()) > 1.4]
    short_BR = distance_weighted_negatives(x_BD, pairs_of(labels_B), seed=3)
    long_BR = distance_weighted_negatives(
        far_BD, pairs_of(torch.cat([labels_B, torch.tensor([9])])), seed=3
    )
    assert len(unreached) >= 5
    valid_BR = pairs_of(labels_B).valid_BR
    for a in unreached:
        assert torch.equal(short_BR[a][valid_BR[a]], long_BR[a][valid_BR[a]])


@pytest.mark.parametrize("D", [1, 2, 3, 512])
def test_any_width(D: int) -> None:
    z_BD = torch.randn(12, D, generator=torch.Generator().manual_seed(D))
    labels_B = torch.arange(12) // 3
    pairs = pairs_of(labels_B)
    chosen_BR = distance_weighted_negatives(z_BD, pairs, seed=0)
    assert pairs.differ_BN.gather(1, chosen_BR)[pairs.valid_BR].all()
