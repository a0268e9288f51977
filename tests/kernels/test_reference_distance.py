"""Pairwise distances: values, gradients, and the places where the matrix-product form would
fail."""

import pytest
import torch

from namr_dist.kernels import reference
from namr_dist.kernels.reference.pairs import safe_sqrt


def _rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def _weights(*shape: int, seed: int = 1) -> torch.Tensor:
    return 0.5 + torch.rand(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_values_are_weighted_sums_of_squares_with_the_anchors_weights() -> None:
    a_BD, c_ND, s_BD = _rows(4, 3), _rows(5, 3, seed=2), _weights(4, 3)
    got_BN = reference.pairwise_squared_distance(a_BD, c_ND, s_BD)
    for i in range(4):
        for j in range(5):
            want = sum(float(s_BD[i, k]) * float(a_BD[i, k] - c_ND[j, k]) ** 2 for k in range(3))
            assert float(got_BN[i, j]) == pytest.approx(want, rel=1e-14)
    plain_BN = reference.pairwise_squared_distance(a_BD, c_ND)
    torch.testing.assert_close(plain_BN, torch.cdist(a_BD, c_ND).square())


@pytest.mark.parametrize("op", [reference.pairwise_squared_distance, reference.pairwise_distance])
def test_gradcheck_all_three_arguments(op) -> None:
    inputs = [_rows(4, 3), _rows(5, 3, seed=2), _weights(4, 3)]
    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs])
    assert torch.autograd.gradcheck(op, inputs[:2])


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_a_gradient_asked_alone_equals_the_one_asked_with_the_others(needed: int) -> None:
    inputs = [_rows(4, 3), _rows(5, 3, seed=2), _weights(4, 3)]
    g_BN = _rows(4, 5, seed=3)
    every = [x.clone().requires_grad_() for x in inputs]
    all_grads = torch.autograd.grad(reference.pairwise_distance(*every), every, g_BN)
    alone = [x.clone().requires_grad_(at == needed) for at, x in enumerate(inputs)]
    (grad,) = torch.autograd.grad(reference.pairwise_distance(*alone), alone[needed], g_BN)
    torch.testing.assert_close(grad, all_grads[needed], rtol=0, atol=0)


def test_one_set_against_itself_sums_both_roles() -> None:
    assert torch.autograd.gradcheck(
        lambda z, s: reference.pairwise_squared_distance(z, z, s),
        [_rows(5, 3).requires_grad_(), _weights(5, 3).requires_grad_()],
    )


def test_distance_is_bitwise_symmetric_with_a_zero_diagonal() -> None:
    z_BD = _rows(9, 17, dtype=torch.float32)
    d_BB = reference.pairwise_distance(z_BD, z_BD)
    assert torch.equal(d_BB, d_BB.T)
    assert torch.equal(d_BB.diagonal(), torch.zeros(9))


def test_duplicates_have_distance_zero_and_gradient_zero() -> None:
    z_BD = _rows(1, 4).expand(3, 4).clone().requires_grad_()
    s_BD = _weights(3, 4).requires_grad_()
    d_BB = reference.pairwise_distance(z_BD, z_BD, s_BD)
    assert torch.equal(d_BB, torch.zeros_like(d_BB))
    d_BB.sum().backward()
    assert torch.equal(z_BD.grad, torch.zeros_like(z_BD))
    assert torch.equal(s_BD.grad, torch.zeros_like(s_BD))


def test_rows_1e_9_apart_keep_full_relative_precision() -> None:
    # The expansion z² - 2zz' + z'² leaves about 1e-8 of noise here, ten times the distance itself.
    step_D = torch.tensor([1e-9, -2e-9, 2e-9], dtype=torch.float64)
    near_D = 1.0 + step_D
    z_BD = torch.stack([torch.ones_like(near_D), near_D]).requires_grad_()
    real_step_D = (near_D - 1.0).detach()
    d_BB = reference.pairwise_distance(z_BD, z_BD)
    want = real_step_D.norm()
    assert float(d_BB[0, 1].detach()) == pytest.approx(float(want), rel=1e-14)
    d_BB[0, 1].backward()
    torch.testing.assert_close(z_BD.grad[1], real_step_D / want)


def test_float32_far_from_the_origin() -> None:
    z_BD = _rows(12, 8, dtype=torch.float32) + 1000.0  # rounded here; both sides see the same rows
    exact_BB = torch.cdist(
        z_BD.double(), z_BD.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    got_BB = reference.pairwise_distance(z_BD, z_BD)
    assert got_BB.dtype == torch.float32
    torch.testing.assert_close(got_BB.double(), exact_BB, rtol=1e-6, atol=0)


def test_safe_sqrt_at_zero_below_and_nan() -> None:
    x = torch.tensor([0.0, 4.0, -1e-12, float("nan")], dtype=torch.float64, requires_grad=True)
    y = safe_sqrt(x)
    y[:3].sum().backward()
    assert y[:3].tolist() == [0.0, 2.0, 0.0]
    assert y[3].isnan()
    assert x.grad[:3].tolist() == [0.0, 0.25, 0.0]


def test_nan_in_a_row_is_not_hidden() -> None:
    z_BD = _rows(3, 2)
    z_BD[1, 0] = float("nan")
    assert reference.mean_pairwise_distance(z_BD).isnan()


def test_mean_pairwise_distance_equals_pdist_in_value_and_gradient() -> None:
    z_BD = _rows(7, 5).requires_grad_()
    ours = reference.mean_pairwise_distance(z_BD)
    theirs = torch.pdist(z_BD).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(f, z_BD)[0] for f in (ours, theirs)))
    assert torch.autograd.gradcheck(reference.mean_pairwise_distance, [z_BD])


def test_dividing_by_the_mean_distance_makes_it_one() -> None:
    z_BD = 37.0 * _rows(6, 4)
    scaled_BD = z_BD / reference.mean_pairwise_distance(z_BD)
    assert float(reference.mean_pairwise_distance(scaled_BD)) == pytest.approx(1.0, rel=1e-14)


def test_unit_rows_and_a_zero_row() -> None:
    z_BD = _rows(4, 3)
    z_BD[2] = 0.0
    z_BD.requires_grad_()
    unit_BD = reference.unit_rows(z_BD)
    torch.testing.assert_close(unit_BD, torch.nn.functional.normalize(z_BD, dim=1))
    unit_BD.sum().backward()
    assert z_BD.grad.isfinite().all() and float(z_BD.grad.abs().max()) < 10.0
    keep = [0, 1, 3]
    assert torch.autograd.gradcheck(reference.unit_rows, [z_BD.detach()[keep].requires_grad_()])
    assert reference.unit_rows(z_BD.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((3, 2), (4, 5)), r"\(3, 2\) and \(4, 5\)"),
        (((3,), (3,)), r"\(3,\)"),
        (((3, 2), (4, 2), (4, 2)), "weights"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reference.pairwise_distance(*(torch.zeros(shape) for shape in shapes))
