"""The four metric losses against pytorch-metric-learning, in value and gradient; and gradcheck of
the three whose other tests stand here (the triplet loss has its own in
test_reference_triplets.py)."""

import math

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor

from namr_dist.kernels import reference
from namr_dist.kernels.reference.mining import (
    distance_weighted_negatives,
    pairs_of,
    semihard_negatives,
)


def _batch(B: int = 20, D: int = 6, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Loose clusters, so that every loss has active and inactive terms; sizes of classes differ."""
    generator = torch.Generator().manual_seed(seed)
    centres_CD = torch.randn(classes, D, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(classes, (B,), generator=generator)
    z_BD = centres_CD[labels_B] + 0.7 * torch.randn(B, D, generator=generator, dtype=torch.float64)
    return z_BD.requires_grad_(), labels_B


def _same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    assert float(theirs.detach()) > 0.0
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ours_grads = torch.autograd.grad(ours, leaves)
    theirs_grads = torch.autograd.grad(theirs, leaves)
    for got, want in zip(ours_grads, theirs_grads, strict=True):
        assert float(want.abs().max()) > 0.0
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)


def _triplets(pairs, negative_BR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    anchor_T, r_T = pairs.valid_BR.nonzero(as_tuple=True)
    return anchor_T, pairs.positive_BR[anchor_T, r_T], negative_BR[anchor_T, r_T]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mining", ["semihard", "hardest", "distance_weighted"])
def test_triplet(mining: str, seed: int) -> None:
    z_BD, labels_B = _batch(seed=seed)
    pairs = pairs_of(labels_B)
    if mining == "hardest":
        triplets = miners.BatchHardMiner(distance=LpDistance(normalize_embeddings=False))(
            z_BD, labels_B
        )
    elif mining == "semihard":
        triplets = _triplets(
            pairs, semihard_negatives(torch.cdist(z_BD, z_BD).detach().square(), pairs)
        )
    else:
        triplets = _triplets(pairs, distance_weighted_negatives(z_BD, pairs, seed=9))
    theirs = losses.TripletMarginLoss(
        margin=0.8, distance=LpDistance(normalize_embeddings=False), reducer=MeanReducer()
    )
    _same(
        reference.triplet_loss(z_BD, labels_B, margin=0.8, mining=mining, seed=9),
        theirs(z_BD, labels_B, triplets),
        [z_BD],
    )


@pytest.mark.parametrize("beta", [0.9, 1.2])
def test_margin(beta: float) -> None:
    z_BD, labels_B = _batch()
    pairs = pairs_of(labels_B)
    theirs = losses.MarginLoss(
        margin=0.2, beta=beta, learn_beta=True, distance=LpDistance(normalize_embeddings=False)
    ).double()
    triplets = _triplets(pairs, distance_weighted_negatives(z_BD, pairs, seed=2))
    _same(
        reference.margin_loss(
            reference.unit_rows(z_BD), labels_B, beta=theirs.beta, alpha=0.2, seed=2
        ),
        theirs(reference.unit_rows(z_BD), labels_B, triplets),
        [z_BD, theirs.beta],
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("alpha", "beta", "base", "epsilon"), [(2.0, 50.0, 0.5, 0.1), (4.0, 10.0, 0.3, 0.02)]
)
def test_multi_similarity(
    alpha: float, beta: float, base: float, epsilon: float, seed: int
) -> None:
    z_BD, labels_B = _batch(seed=seed)
    theirs = losses.MultiSimilarityLoss(alpha=alpha, beta=beta, base=base)
    mined = miners.MultiSimilarityMiner(epsilon=epsilon)(z_BD, labels_B)
    _same(
        reference.multi_similarity_loss(
            reference.unit_rows(z_BD), labels_B, alpha=alpha, beta=beta, base=base, epsilon=epsilon
        ),
        theirs(z_BD, labels_B, mined),
        [z_BD],
    )


def test_multi_similarity_mining_leaves_some_pairs_out() -> None:
    # Else the agreement above would say nothing about the mining.
    z_BD, labels_B = _batch()
    anchor_positive, _, anchor_negative, _ = miners.MultiSimilarityMiner(epsilon=0.1)(
        z_BD, labels_B
    )
    pairs = pairs_of(labels_B)
    assert 0 < len(anchor_positive) < int(pairs.same_BN.sum())
    assert 0 < len(anchor_negative) < int(pairs.differ_BN.sum())


@pytest.mark.parametrize(("alpha", "margin"), [(32.0, 0.1), (8.0, 0.3)])
def test_proxy_anchor(alpha: float, margin: float) -> None:
    z_BD, labels_B = _batch(classes=5)
    theirs = losses.ProxyAnchorLoss(
        num_classes=8, embedding_size=6, margin=margin, alpha=alpha
    ).double()
    _same(
        reference.proxy_anchor_loss(
            reference.unit_rows(z_BD),
            labels_B,
            reference.unit_rows(theirs.proxies),
            alpha=alpha,
            margin=margin,
        ),
        theirs(z_BD, labels_B),
        [z_BD, theirs.proxies],
    )


def test_gradcheck_margin_in_rows_and_beta() -> None:
    z_BD, labels_B = _batch(B=8, D=3, classes=3)
    x_BD = reference.unit_rows(z_BD).detach().requires_grad_()
    beta = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: reference.margin_loss(x, labels_B, beta=b, alpha=0.3, seed=1), [x_BD, beta]
    )


def test_gradcheck_multi_similarity() -> None:
    z_BD, labels_B = _batch(B=8, D=3, classes=3)
    x_BD = reference.unit_rows(z_BD).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.multi_similarity_loss(x, labels_B), [x_BD])


def test_gradcheck_proxy_anchor_in_rows_and_proxies() -> None:
    z_BD, labels_B = _batch(B=6, D=3, classes=3)
    proxies_CD = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x_BD, p_CD = (
        reference.unit_rows(rows).detach().requires_grad_() for rows in (z_BD, proxies_CD)
    )
    assert torch.autograd.gradcheck(
        lambda x, p: reference.proxy_anchor_loss(x, labels_B, p), [x_BD, p_CD]
    )


def test_margin_counts_only_active_terms() -> None:
    # Distances on a line: positive 0.1 (inactive), negatives 0.5 away and beyond (active at beta
    # 1.2).
    x_BD = torch.tensor([[0.0], [0.1], [0.6], [0.7]], dtype=torch.float64)
    labels_B = torch.tensor([0, 0, 1, 1])
    beta = torch.tensor(1.2, dtype=torch.float64)
    negative_B = distance_weighted_negatives(x_BD, pairs_of(labels_B), seed=0)[:, 0]
    active = [1.2 - abs(float(x_BD[a] - x_BD[n])) + 0.2 for a, n in enumerate(negative_B)]
    got = reference.margin_loss(x_BD, labels_B, beta=beta, alpha=0.2, seed=0)
    assert float(got) == pytest.approx(sum(active) / len(active), rel=1e-14)


def test_sums_of_exponentials_do_not_overflow() -> None:
    x_BD, labels_B = torch.ones(4, 2, dtype=torch.float32), torch.tensor([0, 0, 1, 1])
    proxies_CD = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    # exp(1000 · 2) is no float; the largest exponent is what is left of the logarithm.
    got = reference.proxy_anchor_loss(x_BD, labels_B, proxies_CD, alpha=1000.0, margin=0.0)
    assert float(got) == pytest.approx(
        (2000 + math.log(2)) / 2 + (2000 + math.log(2)) / 2, rel=1e-6
    )
    sharp = reference.multi_similarity_loss(x_BD, labels_B, alpha=2.0, beta=1000.0, base=0.5)
    # One positive and two negatives an anchor, all at similarity 2.
    want = math.log1p(math.exp(-2 * 1.5)) / 2 + 1.5 + math.log(2) / 1000
    assert float(sharp) == pytest.approx(want, rel=1e-6)
