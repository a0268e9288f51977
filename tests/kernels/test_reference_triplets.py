"""Mining of triplets against naive loops; ties; batches that lack positives or negatives."""

import pytest
import torch
from torch import Tensor

from namr_dist.kernels import reference
from namr_dist.kernels.reference.mining import pairs_of, semihard_negatives


def _batch(B: int = 14, D: int = 3, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_BD = torch.randn(B, D, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(classes, (B,), generator=generator)
    return z_BD, labels_B


def _squares(z_BD: Tensor) -> list[list[float]]:
    rows = z_BD.tolist()
    return [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]


def _naive_triplets(z_BD: Tensor, labels_B: Tensor, mining: str) -> list[tuple[int, int, int]]:
    d, labels, triplets = _squares(z_BD), labels_B.tolist(), []
    rows = range(len(labels))
    for a in rows:
        positives = [p for p in rows if p != a and labels[p] == labels[a]]
        negatives = [n for n in rows if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        nearest = min(negatives, key=lambda n: (d[a][n], n))
        if mining == "hardest":
            triplets.append((a, min(positives, key=lambda p: (-d[a][p], p)), nearest))
            continue
        for p in positives:
            farther = [n for n in negatives if d[a][n] > d[a][p]]
            triplets.append(
                (a, p, min(farther, key=lambda n: (d[a][n], n)) if farther else nearest)
            )
    return triplets


def _naive_loss(z_BD: Tensor, triplets: list[tuple[int, int, int]], margin: float) -> Tensor:
    terms = [
        torch.relu((z_BD[a] - z_BD[p]).norm() - (z_BD[a] - z_BD[n]).norm() + margin)
        for a, p, n in triplets
    ]
    return torch.stack(terms).sum() / len(terms)


@pytest.mark.parametrize("mining", ["semihard", "hardest"])
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_against_naive_loops(mining: str, seed: int) -> None:
    z_BD, labels_B = _batch(seed=seed)
    z_BD.requires_grad_()
    ours = reference.triplet_loss(z_BD, labels_B, margin=0.3, mining=mining)
    naive = _naive_loss(z_BD, _naive_triplets(z_BD, labels_B, mining), 0.3)
    torch.testing.assert_close(ours, naive, rtol=1e-13, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(f, z_BD)[0] for f in (ours, naive)))


def test_semihard_meets_both_of_its_cases() -> None:
    z_BD, labels_B = _batch()
    d = _squares(z_BD)
    kinds = {d[a][n] > d[a][p] for a, p, n in _naive_triplets(z_BD, labels_B, "semihard")}
    assert kinds == {True, False}


@pytest.mark.parametrize("mining", ["semihard", "hardest", "distance_weighted"])
def test_gradcheck(mining: str) -> None:
    z_BD, labels_B = _batch(B=7, classes=3, seed=1)
    assert torch.autograd.gradcheck(
        lambda z: reference.triplet_loss(z, labels_B, margin=0.9, mining=mining, seed=3),
        [z_BD.requires_grad_()],
    )


def test_every_tie_goes_to_the_lowest_row() -> None:
    # Integer coordinates: all squared distances are exact, many are equal.
    generator = torch.Generator().manual_seed(2)
    z_BD = torch.randint(0, 3, (24, 2), generator=generator).double()
    labels_B = torch.randint(4, (24,), generator=generator)
    pairs = pairs_of(labels_B)
    chosen_BR = semihard_negatives(reference.pairwise_squared_distance(z_BD, z_BD), pairs)
    got = [
        (a, int(pairs.positive_BR[a, r]), int(chosen_BR[a, r]))
        for a, r in pairs.valid_BR.nonzero().tolist()
    ]
    assert got == _naive_triplets(z_BD, labels_B, "semihard")


@pytest.mark.parametrize("mining", ["semihard", "hardest"])
def test_gradient_goes_to_the_lowest_of_tied_rows(mining: str) -> None:
    # Anchor 0 sees positives 1, 2 at distance 3 and negatives 3, 4 at distance 4.
    z_BD = torch.tensor([[0.0, 0], [3, 0], [-3, 0], [0, 4], [0, -4]], dtype=torch.float64)
    z_BD.requires_grad_()
    labels_B = torch.tensor([0, 0, 0, 1, 2])
    loss = reference.triplet_loss(z_BD, labels_B, margin=9.0, mining=mining)
    naive = _naive_loss(z_BD, _naive_triplets(z_BD, labels_B, mining), 9.0)
    torch.testing.assert_close(*(torch.autograd.grad(f, z_BD)[0] for f in (loss, naive)))


def test_a_negative_as_far_as_the_positive_is_not_semihard() -> None:
    z_BD = torch.tensor([[0.0], [2.0], [-2.0], [3.0]], dtype=torch.float64)
    labels_B = torch.tensor([0, 0, 1, 1])
    # Anchor 0, positive at 2: the negative at 2 is skipped for the one at 3.
    chosen_BR = semihard_negatives(
        reference.pairwise_squared_distance(z_BD, z_BD), pairs_of(labels_B)
    )
    assert int(chosen_BR[0, 0]) == 3


def test_positives_are_listed_in_ascending_order_and_padded() -> None:
    pairs = pairs_of(torch.tensor([5, 7, 5, 5, 9]))
    listed = [
        row[valid].tolist() for row, valid in zip(pairs.positive_BR, pairs.valid_BR, strict=True)
    ]
    assert listed == [[2, 3], [], [0, 3], [0, 2], []]
    assert pairs.positive_BR.shape == (5, 2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_any_integer_labels(dtype: torch.dtype) -> None:
    z_BD, labels_B = _batch()
    assert reference.triplet_loss(z_BD, labels_B.to(dtype)) == reference.triplet_loss(
        z_BD, 3 * labels_B - 50
    )


def test_moving_rows_far_from_the_origin_keeps_the_float32_value() -> None:
    z_BD, labels_B = _batch(D=8)
    moved_BD = (z_BD + 1000.0).float()
    exact = reference.triplet_loss(moved_BD.double(), labels_B, margin=0.5)
    torch.testing.assert_close(
        reference.triplet_loss(moved_BD, labels_B, margin=0.5).double(), exact, rtol=1e-5, atol=0
    )


def test_unknown_mining() -> None:
    with pytest.raises(ValueError, match="'softest'.*semihard, hardest, distance_weighted"):
        reference.triplet_loss(*_batch(), mining="softest")
