"""Cluster centres on any number of ranks, ρ by its definition, and the ring of recent rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from namr_dist.structure.centres import Centres, default_centres
from namr_dist.structure.k_means import k_means, starting_rows
from namr_dist.structure.recent import RecentRows


def rows(count: int = 300, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(20, width, generator=generator)
    noise = torch.randn(count, width, generator=generator)
    return means[torch.arange(count) % 20] + noise + 5


def test_k_means_is_that_of_scikit_learn() -> None:
    z_ND = rows()
    start_MD = z_ND[torch.from_numpy(starting_rows(len(z_ND), 40, seed=1))]
    want = KMeans(40, init=start_MD.numpy(), n_init=1, max_iter=300, tol=0).fit(
        z_ND.double().numpy()
    )
    found_MD = k_means(z_ND, start_MD)
    np.testing.assert_allclose(found_MD, want.cluster_centers_, rtol=1e-6)


def fitted(counts: list[int], centres: int) -> tuple[Tensor, Tensor]:
    """Centres from rows that are shared unevenly, and by the module, which shares them itself."""
    import torch.distributed as dist

    rank = dist.get_rank()
    z_ND = rows(sum(counts))
    start_MD = z_ND[torch.from_numpy(starting_rows(len(z_ND), centres, seed=2))]
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    module = Centres(centres=centres, width=z_ND.shape[1], nearest=5, unit=True)
    module.fit(z_ND, seed=2)
    return k_means(z_ND[own], start_MD), module(z_ND)


@pytest.mark.dist
@pytest.mark.parametrize("counts", [[150, 150], [299, 1], [0, 300]], ids=str)
def test_two_ranks_find_the_centres_of_one(two_ranks: Callable, counts: list[int]) -> None:
    _check_same(two_ranks(fitted, counts, 30), sum(counts))


@pytest.mark.dist
def test_four_ranks_find_the_centres_of_one(four_ranks: Callable) -> None:
    _check_same(four_ranks(fitted, [100, 0, 77, 123], 30), 300)


def _check_same(results: list[tuple[Tensor, Tensor]], count: int) -> None:
    z_ND = rows(count)
    start_MD = z_ND[torch.from_numpy(starting_rows(count, 30, seed=2))]
    alone = Centres(centres=30, width=8, nearest=5, unit=True)
    alone.fit(z_ND, seed=2)
    for centres_MD, structure_NC in results:
        torch.testing.assert_close(centres_MD, k_means(z_ND, start_MD), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(structure_NC, alone(z_ND), rtol=1e-6, atol=1e-6)


def test_a_cluster_without_rows_takes_the_farthest() -> None:
    # The second and third centre lie where no row is nearest to them.
    z_ND = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.0], [20.0]])
    found_MD = k_means(z_ND, torch.tensor([[0.0], [-50.0], [-60.0]]))
    assert sorted(found_MD.flatten().tolist()) == pytest.approx([0.1, 9.0, 20.0])


def lost_clusters() -> Tensor:
    import torch.distributed as dist

    z_ND = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.0], [20.0]])
    own = slice(0, 4) if dist.get_rank() == 0 else slice(4, 6)
    return k_means(z_ND[own], torch.tensor([[0.0], [-50.0], [-60.0]]))


@pytest.mark.dist
def test_two_ranks_agree_on_the_farthest(two_ranks: Callable) -> None:
    for found_MD in two_ranks(lost_clusters):
        assert sorted(found_MD.flatten().tolist()) == pytest.approx([0.1, 9.0, 20.0])


def test_equal_rows_have_their_place() -> None:
    found_MD = k_means(torch.ones(6, 3), torch.ones(2, 3))
    assert torch.equal(found_MD, torch.ones(2, 3))


def test_the_start_does_not_depend_on_the_rows() -> None:
    assert starting_rows(100, 10, seed=3).tolist() == starting_rows(100, 10, seed=3).tolist()
    assert len(set(starting_rows(100, 100, seed=3).tolist())) == 100


@pytest.mark.parametrize("unit", [False, True])
def test_rho_is_its_definition(unit: bool) -> None:
    module = Centres(centres=12, width=8, nearest=5, unit=unit)
    z_ND = rows(100)
    module.fit(z_ND, seed=0)
    structure_NC = module(z_ND)
    x_ND = z_ND.double()
    if unit:
        x_ND = x_ND / x_ND.norm(dim=1, keepdim=True)
    squared_NM = (x_ND[:, None] - module.centres_MD.double()).square().sum(2)
    nearest_Nk = squared_NM.sort(dim=1).values[:, :5]
    torch.testing.assert_close(structure_NC[:, :5].double(), nearest_Nk, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(structure_NC[:, 5].double(), nearest_Nk.mean(1), rtol=1e-5, atol=0)


def test_what_the_search_makes_of_rho() -> None:
    module = Centres(centres=3, width=2, nearest=5, unit=False)
    assert module.nearest == 3
    module.settle(gamma=0.25, rho_max=4.0)
    rho_N = np.array([0.0, 1.0, 4.0, 7.0])
    assert module.bonus(rho_N).tolist() == [0.0, 0.25, 1.0, 1.0] and module.clamped(rho_N) == 1


def test_exported_programs_compute_the_same(tmp_path) -> None:
    module = Centres(centres=12, width=8, nearest=5, unit=True).eval()
    module.fit(rows(100), seed=0)
    program = torch.export.export(module, (rows(7),)).module()
    torch.testing.assert_close(program(rows(7)), module(rows(7)), rtol=1e-5, atol=1e-6)


def test_default_number_of_centres() -> None:
    assert [default_centres(count) for count in (1, 8, 1980, 59_551)] == [1, 2, 495, 512]


def test_the_ring_holds_the_latest_rows() -> None:
    ring = RecentRows(rows=5, width=1)
    for first in (0, 3):
        ring.add(torch.arange(first, first + 3.0)[:, None])
    assert ring.full() and sorted(ring.z_RD.flatten().tolist()) == [1, 2, 3, 4, 5]
    ring.add(torch.arange(10.0, 22.0)[:, None])
    assert sorted(ring.z_RD.flatten().tolist()) == [17, 18, 19, 20, 21]
    assert not RecentRows(rows=5, width=1).full()
