"""Learnt centres: their losses as defined, what they do to z, where they begin, dead ones, and the
same on any number of ranks, resumed or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from namr_dist.losses.centres import UNSEEN, LearntCentres
from namr_dist.losses.rows import Rows, all_rows, with_gradients
from namr_dist.parallel.gather import RowGather, for_averaged_gradients
from namr_dist.parallel.pool import Ranks

B, WIDTH, CENTRES = 24, 5, 7
OBJECTIVES = ("soft_k_means", "views", "ranking")
INDEX = torch.arange(B) % (B // 2)


def rows(seed: int = 0, *, count: int = B) -> Tensor:
    # Far from the origin, and at a scale of their own.
    generator = torch.Generator().manual_seed(seed)
    return 3 + 40 * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def made(objective: str, *, unit: bool = True, **more: object) -> LearntCentres:
    settings = {"pull": 1.0, "sharpness": 4.0, "nearest": 3, **more}
    loss = LearntCentres(
        centres=CENTRES, width=WIDTH, unit=unit, objective=objective, **settings
    ).double()
    generator = torch.Generator().manual_seed(5)
    loss.base_MD.copy_(torch.randn(CENTRES, WIDTH, generator=generator) / 3)
    loss.moves.data.copy_(torch.randn(CENTRES, WIDTH, generator=generator) / 5)
    loss.taken.fill_(CENTRES)
    return loss


def value_of(loss: LearntCentres, z_BD: Tensor, index_B: Tensor | None = INDEX) -> Tensor:
    value, grad_BD = loss(all_rows(z_BD.detach(), torch.zeros(len(z_BD))), index_B)
    return with_gradients(value, (z_BD, grad_BD), (value, torch.ones_like(value)))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("soft_k_means", {}),
        ("soft_k_means", {"sharpness": 50.0}),
        ("views", {}),
        ("ranking", {}),
        ("ranking", {"clusters": 4, "spread": 0.4, "floor": 0.1, "rank_sharpness": 3.0}),
        ("ranking", {"nearest": 50}),
    ],
)
def test_loss_and_gradients_are_the_definitions(objective: str, unit: bool, more: dict) -> None:
    loss, z_BD = made(objective, unit=unit, **more), rows().requires_grad_()
    want = loss.definition(z_BD, INDEX)
    # Within a larger loss, and with a factor.
    leaves = [z_BD, loss.moves]
    wanted = torch.autograd.grad(3 * want + z_BD.sum(), leaves)
    got = value_of(loss, z_BD)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(3 * got + z_BD.sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
        assert ours.norm() > 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32_is_near_the_definition(objective: str) -> None:
    loss, z_BD = made(objective), rows()
    want = loss.definition(z_BD, INDEX)
    (wanted,) = torch.autograd.grad(want, [loss.moves])
    got = value_of(loss.float(), z_BD.float())
    (grad,) = torch.autograd.grad(got, [loss.moves])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    assert (grad - wanted).norm() < 1e-5 * wanted.norm()


def test_views_of_three_and_of_one() -> None:
    """Each view with the next of its image; images with one view count for nothing."""
    index_B = torch.tensor([4, 4, 4, 9, 1, 9, 30, 2])
    loss, z_BD = made("views"), rows(count=8)
    want = loss.definition(z_BD, index_B)
    torch.testing.assert_close(value_of(loss, z_BD, index_B), want, rtol=1e-12, atol=0)
    # By hand: of three views, each pair of two once; of two views the one pair twice.
    q_BM = torch.softmax(-loss.sharpness * _squared(loss, z_BD), 1)
    pairs = [(0, 1), (1, 2), (2, 0), (3, 5), (5, 3)]
    by_hand = sum(((q_BM[i] - q_BM[j]) * (q_BM[i] / q_BM[j]).log()).sum() for i, j in pairs) / len(
        pairs
    )
    torch.testing.assert_close(want, by_hand, rtol=1e-12, atol=0)
    alone = value_of(made("views"), z_BD, torch.arange(8))
    assert alone == 0 and torch.autograd.grad(alone, z_BD.requires_grad_(), allow_unused=True)
    with pytest.raises(ValueError, match="index_B is missing"):
        value_of(loss, z_BD, None)


def _squared(loss: LearntCentres, z_BD: Tensor) -> Tensor:
    u_BD = torch.nn.functional.normalize(z_BD, dim=1)
    x_BD = u_BD / torch.pdist(u_BD).mean()
    return torch.cdist(x_BD, loss.centres(loss.moves)).square()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_pull_is_a_share_of_the_gradient_for_z(objective: str) -> None:
    z_BD = rows().requires_grad_()
    whole, none, part = (
        torch.autograd.grad(value_of(made(objective, pull=pull), z_BD), z_BD)[0]
        for pull in (1.0, 0.0, 0.3)
    )
    assert whole.norm() > 0 and not none.any()
    torch.testing.assert_close(part, 0.3 * whole, rtol=1e-12, atol=0)
    # The scale and, at unit length, the length of rows are out of its reach.
    assert (whole * z_BD).sum().abs() < 1e-12


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_rows_become_the_centres(objective: str) -> None:
    """Over several batches; before there are enough, nothing is learnt."""
    loss = LearntCentres(centres=10, width=WIDTH, unit=False, objective=objective).double()
    batches = [rows(seed, count=4) for seed in range(3)]
    index_B = torch.tensor([0, 0, 1, 1])
    values = []
    for z_BD in batches:
        value, grad_BD = loss(all_rows(z_BD, torch.zeros(4)), index_B)
        (grad_moves,) = torch.autograd.grad(value, [loss.moves])
        values.append(float(value.detach()))
        assert not grad_BD.any() and bool(grad_moves.any()) == (values[-1] > 0)
    assert values[:2] == [0, 0] and values[2] > 0
    want_MD = torch.cat([z_BD / torch.pdist(z_BD).mean() for z_BD in batches])[:10]
    torch.testing.assert_close(loss.centres(loss.moves), want_MD, rtol=1e-12, atol=1e-12)
    loss.eval()(all_rows(batches[0], torch.zeros(4)), index_B)
    torch.testing.assert_close(loss.base_MD, want_MD, rtol=1e-12, atol=1e-12)
    assert loss.taken == 12, "only training counts"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dead_centres_go_where_rows_are_far_from_all(objective: str) -> None:
    loss = made(objective, unit=False)
    # Two that no row is near, and one that is soon to be dead.
    with torch.no_grad():
        loss.moves[[1, 4]] += 10
    loss.unseen_M[1], loss.unseen_M[4] = UNSEEN * CENTRES - B, UNSEEN * CENTRES - B - 1
    z_BD = rows()
    x_BD = z_BD / torch.pdist(z_BD).mean()
    before_MD = loss.centres(loss.moves)
    nearest_B = torch.cdist(x_BD, before_MD).min(dim=1)
    want = loss.definition(z_BD, INDEX)
    value = value_of(loss, z_BD)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=0)  # of the centres before
    after_MD = loss.centres(loss.moves)
    kept = [m for m in range(CENTRES) if m != 1]
    assert torch.equal(after_MD[kept], before_MD[kept])
    torch.testing.assert_close(after_MD[1], x_BD[nearest_B.values.argmax()], rtol=1e-9, atol=1e-12)
    seen = set(nearest_B.indices.tolist())
    for m in range(CENTRES):
        assert loss.unseen_M[m] == ({4: UNSEEN * CENTRES - 1, 1: 0}.get(m, 0 if m in seen else B))
    value_of(loss, z_BD)
    second = torch.cdist(x_BD, after_MD).min(dim=1)
    torch.testing.assert_close(
        loss.centres(loss.moves)[4], x_BD[second.values.argmax()], rtol=1e-9, atol=1e-12
    )


def test_more_dead_centres_than_rows() -> None:
    loss = made("soft_k_means", unit=False)
    loss.unseen_M.fill_(UNSEEN * CENTRES)
    before_MD = loss.centres(loss.moves)
    value_of(loss, rows(count=2) + torch.tensor([[0.0], [1e-3]]), torch.arange(2))
    moved = (loss.centres(loss.moves) != before_MD).any(dim=1)
    assert int(moved.sum()) == 2 and int((loss.unseen_M >= UNSEEN * CENTRES).sum()) >= 3


def test_equal_rows_stay_finite() -> None:
    for objective in OBJECTIVES:
        loss = LearntCentres(centres=4, width=WIDTH, unit=True, objective=objective, pull=1.0)
        z_BD = torch.full((B, WIDTH), 0.5, requires_grad=True)
        value = value_of(loss, z_BD)
        value.backward()
        assert value.isfinite() and z_BD.grad.isfinite().all()
        assert loss.moves.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "k_means"}, "'k_means'.*views"),
        ({"centres": 0}, "got 0 and 5"),
        ({"sharpness": 0.0}, "above 0"),
        ({"clusters": 1}, "got 1"),
    ],
)
def test_wrong_arguments(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LearntCentres(**{"centres": 3, "width": 4, "unit": True, **settings})


def steps(
    objective: str,
    counts: tuple[int, ...] = (B,),
    *,
    rank: int = 0,
    begin: dict[str, Tensor] | None = None,
    first: int = 0,
    state_after: int = 3,
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Steps first..7 on this rank's rows, with gradients averaged over ranks: losses and z's
    gradients in order, the state after some steps, and at the end."""
    many = len(counts) > 1
    torch.manual_seed(0)
    # 30 centres: they begin in the first two steps, and in the fifth some die.
    loss = LearntCentres(
        centres=30, width=WIDTH, unit=True, objective=objective, pull=0.5, sharpness=5.0
    ).double()
    if begin is not None:
        loss.load_state_dict(begin)
    gather = RowGather(counts) if many else None
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    found, state = [], {}
    for step in range(first, 8):
        if step == 4:
            loss.unseen_M += UNSEEN * 30
        z_BD = rows(step)
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        batch = all_rows(z_BD, torch.zeros(B))
        if gather is not None:
            batch = Rows(
                z_bD=z_BD[own],
                labels_b=batch.labels_b[own],
                z_ND=z_BD,
                labels_N=batch.labels_N,
                offset=gather.offset,
                gather=gather,
                gather_one=gather.one_each,
                ranks=len(counts),
            )
        value, grad_bD = loss(batch, INDEX)
        optimizer.zero_grad()
        for_averaged_gradients(value).backward()
        if many:
            torch.distributed.all_reduce(loss.moves.grad)
            loss.moves.grad /= len(counts)
        optimizer.step()
        found += [value.detach(), gather(grad_bD) if gather else grad_bD]
        if step + 1 == state_after:
            state = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    return found, state, {name: tensor.clone() for name, tensor in loss.state_dict().items()}


def steps_on_rank(objective: str, counts: tuple[int, ...]) -> tuple:
    return steps(objective, counts, rank=torch.distributed.get_rank())


@pytest.mark.dist
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("counts", [(12, 12), (17, 7), (0, 24)], ids=str)
def test_two_ranks_are_one(two_ranks: Ranks, objective: str, counts: tuple[int, ...]) -> None:
    """Losses, gradients and every centre, over steps in which centres begin, die and are
    replaced."""
    alone, third, end = steps(objective)
    assert alone[0] == 0 and alone[2] > 0
    assert 1 < int((end["base_MD"] != third["base_MD"]).any(dim=1).sum()) < 30
    for found, _, state in two_ranks(steps_on_rank, objective, counts):
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        for name, value in end.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("after", [1, 3])
def test_resumed_is_unbroken(objective: str, after: int) -> None:
    """Before the centres are all there, and after."""
    found, state, end = steps(objective, state_after=after)
    again, _, end_again = steps(objective, begin=state, first=after)
    assert all(map(torch.equal, again, found[2 * after :]))
    assert all(torch.equal(end_again[name], value) for name, value in end.items())
