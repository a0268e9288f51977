"""Global batch norm: one process as torch's own, many as one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from namr_dist.parallel.batchnorm import GlobalBatchNorm, use_global_batchnorm
from namr_dist.parallel.pool import Ranks

SHAPES = [(9, 5), (9, 5, 4, 3)]


def case(shape: tuple[int, ...], layer: type) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    norm = layer(5).double()
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    # Far from zero mean: a variance by E[x²] − E[x]² would lose digits here.
    return (
        norm,
        torch.randn(shape, dtype=torch.float64) * 3 + 100,
        torch.randn(shape, dtype=torch.float64),
    )


def step(norm: nn.Module, rows: Tensor, weight: Tensor) -> dict[str, Tensor]:
    rows = rows.clone().requires_grad_()
    out = norm(rows)
    (out * weight).sum().backward()
    assert rows.grad is not None
    return {
        "out": out.detach(),
        "rows": rows.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_one_process_is_torch(shape: tuple[int, ...], training: bool) -> None:
    torch_layer = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    ours, theirs = (
        step(norm.train(training), rows, weight)
        for norm, rows, weight in (case(shape, GlobalBatchNorm), case(shape, torch_layer))
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


def on_rank(shape: tuple[int, ...], cut: int) -> dict[str, Tensor]:
    import torch.distributed as dist

    norm, rows, weight = case(shape, GlobalBatchNorm)
    own = slice(0, cut) if dist.get_rank() == 0 else slice(cut, None)
    return step(norm, rows[own], weight[own])


@pytest.mark.dist
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cut", [4, 1, 0])
def test_two_processes_are_one(two_ranks: Ranks, shape: tuple[int, ...], cut: int) -> None:
    """Also with uneven shares, and with a rank that has no row at all."""
    one = step(*case(shape, GlobalBatchNorm))
    first, second = two_ranks(on_rank, shape, cut)
    for name in ("out", "rows"):
        torch.testing.assert_close(
            torch.cat([first[name], second[name]]), one[name], rtol=1e-10, atol=1e-10
        )
    for name in ("weight", "bias"):  # each rank has its own rows' part; the optimizer adds them up
        torch.testing.assert_close(first[name] + second[name], one[name], rtol=1e-10, atol=1e-10)
    for name in ("mean", "var"):
        torch.testing.assert_close(first[name], one[name], rtol=1e-12, atol=1e-12)
        assert torch.equal(first[name], second[name])


def test_conversion_keeps_the_state() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16))
    )
    network(torch.randn(5, 3, 4, 4))
    network.eval()
    images = torch.randn(2, 3, 4, 4)
    before = network(images)
    use_global_batchnorm(network)
    assert sum(isinstance(layer, GlobalBatchNorm) for layer in network.modules()) == 2
    assert torch.equal(network(images), before)
