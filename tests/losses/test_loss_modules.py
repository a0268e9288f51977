"""The loss modules: defaults, what they normalise, what they learn, one calling convention,
gradients as autograd's."""

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from namr_dist import kernels
from namr_dist.losses.margin import MarginRows
from namr_dist.losses.multi_cluster import MultiClusterRankingRows
from namr_dist.losses.multi_similarity import MultiSimilarityRows
from namr_dist.losses.proxy_anchor import ProxyAnchorRows
from namr_dist.losses.rows import all_rows, with_gradients
from namr_dist.losses.triplet import TripletRows


def _metric_losses() -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    return {
        "triplet": TripletRows(),
        "margin": MarginRows(),
        "multi_similarity": MultiSimilarityRows(),
        "proxy_anchor": ProxyAnchorRows(classes=4, width=5, generator=generator),
    }


NAMES = list(_metric_losses())


def value_of(loss: nn.Module, z_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
    """The loss of a whole batch on one process, differentiable in z too."""
    value, grad_BD = loss(all_rows(z_BD.detach(), labels_B), seed=seed)
    return with_gradients(value, (z_BD, grad_BD), (value, torch.ones_like(value)))


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    z_BD = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return z_BD.to(dtype), torch.arange(12) % 4


@pytest.mark.parametrize("name", NAMES)
def test_one_calling_convention(name: str) -> None:
    loss = _metric_losses()[name]
    parameters = inspect.signature(loss.forward).parameters
    assert list(parameters) == ["rows", "seed"]
    assert parameters["seed"].kind is inspect.Parameter.KEYWORD_ONLY
    value, grad_BD = loss(all_rows(*_batch()), seed=3)
    assert value.shape == () and value.dtype == torch.float64 and value.isfinite()
    assert grad_BD.shape == (12, 5) and not grad_BD.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_each_module_is_its_op_with_the_published_constants(name: str) -> None:
    loss, (z_BD, labels_B) = _metric_losses()[name], _batch()
    z_BD.requires_grad_()
    x_BD = nn.functional.normalize(z_BD, dim=1)
    want = {
        "triplet": lambda: kernels.triplet_loss(z_BD, labels_B, margin=0.2, mining="semihard"),
        "margin": lambda: kernels.margin_loss(
            x_BD, labels_B, beta=torch.tensor(1.2), alpha=0.2, seed=3
        ),
        "multi_similarity": lambda: kernels.multi_similarity_loss(
            x_BD, labels_B, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1
        ),
        "proxy_anchor": lambda: kernels.proxy_anchor_loss(
            x_BD, labels_B, nn.functional.normalize(loss.proxies, dim=1), alpha=32.0, margin=0.1
        ),
    }[name]()
    # Not float64's tolerance: beta and the proxies are float32, and so is the proxies'
    # normalisation.
    value, grad_BD = loss(all_rows(z_BD.detach(), labels_B), seed=3)
    torch.testing.assert_close(value, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad_BD, *torch.autograd.grad(want, z_BD), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_triplet_loss_sees_the_length_of_rows(name: str) -> None:
    loss, (z_BD, labels_B) = _metric_losses()[name], _batch()
    lengths_B1 = torch.linspace(0.5, 4.0, 12, dtype=torch.float64)[:, None]
    value, stretched = (
        value_of(loss, rows_BD, labels_B, seed=1) for rows_BD in (z_BD, lengths_B1 * z_BD)
    )
    assert torch.isclose(value, stretched, rtol=1e-9, atol=0).item() == (name != "triplet")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_bfloat16_reach_rows_and_parameters(name: str, dtype: torch.dtype) -> None:
    loss, (z_BD, labels_B) = _metric_losses()[name], _batch(dtype)
    z_BD.requires_grad_()
    value = value_of(loss, z_BD, labels_B, seed=0)
    value.backward()
    assert value.dtype == torch.float32
    assert z_BD.grad is not None and z_BD.grad.dtype == dtype and float(z_BD.grad.abs().max()) > 0
    for parameter in loss.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert float(parameter.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("loss", "sampled"),
    [
        (TripletRows(mining="distance_weighted", margin=1.0), True),
        (MarginRows(), True),
        (TripletRows(), False),
        (MultiSimilarityRows(), False),
    ],
    ids=["weighted triplet", "margin", "semihard triplet", "multi-similarity"],
)
def test_the_seed_reaches_what_is_sampled(loss: nn.Module, sampled: bool) -> None:
    values = {value_of(loss, *_batch(), seed=seed).item() for seed in range(6)}
    assert (len(values) > 1) == sampled


def test_learnt_parameters() -> None:
    learnt = {
        name: {n: tuple(p.shape) for n, p in loss.named_parameters()}
        for name, loss in _metric_losses().items()
    }
    assert learnt == {
        "triplet": {},
        "margin": {"beta": (1,)},
        "multi_similarity": {},
        "proxy_anchor": {"proxies": (4, 5)},
    }
    assert float(MarginRows(beta=0.7).beta.detach()) == pytest.approx(0.7)
    assert not list(MultiClusterRankingRows().parameters())


def test_proxies_start_kaiming_normal_from_the_generator_given() -> None:
    one, again, other = (
        ProxyAnchorRows(
            classes=400, width=50, generator=torch.Generator().manual_seed(seed)
        ).proxies
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert float(one.detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.03)
    torch.manual_seed(5)
    first = ProxyAnchorRows(classes=3, width=2).proxies
    torch.manual_seed(5)
    assert torch.equal(first, ProxyAnchorRows(classes=3, width=2).proxies)


def test_training_the_proxies_lowers_the_loss() -> None:
    loss, (z_BD, labels_B) = _metric_losses()["proxy_anchor"], _batch()
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.05)
    first = value_of(loss, z_BD, labels_B, seed=0).item()
    for _ in range(20):
        optimiser.zero_grad()
        value_of(loss, z_BD, labels_B, seed=0).backward()
        optimiser.step()
    assert value_of(loss, z_BD, labels_B, seed=0).item() < 0.9 * first


@pytest.mark.parametrize("statistics", ["batch", "anchor"])
# The spread sets the near centre, then the floor does.
@pytest.mark.parametrize("spread", [0.6, 30.0])
def test_multi_cluster_ranking_passes_all_its_options(statistics: str, spread: float) -> None:
    z_BD, labels_B = _batch()
    s_BD = torch.linspace(0.5, 1.5, 60, dtype=torch.float64).view(12, 5)
    loss = MultiClusterRankingRows(
        clusters=3, spread=spread, floor=0.1, sharpness=7.0, statistics=statistics
    )
    rows = all_rows(z_BD.clone(), labels_B)
    want = kernels.multi_cluster_ranking(
        z_BD.requires_grad_(),
        s_BD.requires_grad_(),
        clusters=3,
        spread=spread,
        floor=0.1,
        sharpness=7.0,
        statistics=statistics,
    )
    value, *gradients = loss(rows, s_BD.detach(), s_BD.detach())
    assert torch.equal(value, want)
    for ours, theirs in zip(gradients, torch.autograd.grad(want, (z_BD, s_BD)), strict=True):
        assert torch.equal(ours, theirs) and float(ours.abs().max()) > 0
    assert torch.equal(
        MultiClusterRankingRows()(rows, s_BD.detach(), s_BD.detach())[0],
        kernels.multi_cluster_ranking(z_BD, s_BD),
    )


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="'random'.*semihard"):
        TripletRows(mining="random")
    with pytest.raises(ValueError, match="got 0 and 8"):
        ProxyAnchorRows(classes=0, width=8)
    with pytest.raises(ValueError, match="got 1"):
        MultiClusterRankingRows(clusters=1)
    z_BD, labels_B = _batch()
    with pytest.raises(ValueError, match=r"label 4 has no proxy.*0\.\.3"):
        ProxyAnchorRows(classes=4, width=5)(all_rows(z_BD, labels_B + 1), seed=0)
    with pytest.raises(TypeError):
        TripletRows(0.2)  # constructor arguments go by name
