"""The multi-similarity kernels against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import COMPILED, KERNEL_MARKS, REPEATS, through_kernels
from torch import Tensor

from namr_dist.kernels import reference
from namr_dist.kernels.gpu import gradient_sums, multi_similarity
from namr_dist.kernels.gpu.launch import recording

# NumPy, which runs the interpreter, warns of pairs that are not mined.
pytestmark = [*KERNEL_MARKS, pytest.mark.filterwarnings("ignore:overflow encountered in exp")]
similarity_statistics = through_kernels(multi_similarity.similarity_statistics)
similarity_gradient = through_kernels(multi_similarity.similarity_gradient)

DEFAULTS = {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1}
# Pair weights are rounded to the rows' own type for the matrix units, and where they are kept in
# memory, for an embedding too wide for registers. The interpreter multiplies in float32.
ROUNDED_GRADIENT = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# Rows whose inner products are exact in any order of summation: ties are ties in float64 too.
HALVES = torch.cartesian_prod(*[torch.tensor([0.5, -0.5])] * 4)


def _batch(
    B: int, D: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit rows, four a class, in mixed order; the labels need all their 64 bits.

    Similarities are near `base` and classes overlap at every D, so that both kinds of pairs are
    mined and weigh.
    """
    generator = torch.Generator().manual_seed(seed)
    number_B = torch.randperm(B, generator=generator) // 4
    centre_CD = torch.randn(B // 4 + 1, D, generator=generator, dtype=torch.float64)
    noise = 0.6 * D**0.25
    common = (1 + noise**2) ** 0.5 * torch.randn(D, generator=generator, dtype=torch.float64)
    x_BD = (
        common
        + centre_CD[number_B]
        + noise * torch.randn(B, D, generator=generator, dtype=torch.float64)
    )
    return reference.unit_rows(x_BD).to(dtype), number_B * 2**32 - 7


def _run(
    x_BD: Tensor, labels_B: Tensor, sizes: list[int] | None = None, **constants: float
) -> tuple[Tensor, Tensor]:
    """Statistics (B, 4) and the gradient of the summed loss, put together from local parts of these
    sizes."""
    constants = DEFAULTS | constants
    parts = list(
        zip(x_BD.split(sizes or len(x_BD)), labels_B.split(sizes or len(x_BD)), strict=True)
    )
    offsets = [sum(len(x_bD) for x_bD, _ in parts[:n]) for n in range(len(parts))]
    statistics = [
        similarity_statistics(x_bD, x_BD, labels_b, labels_B, offset=offset, **constants)
        for offset, (x_bD, labels_b) in zip(offsets, parts, strict=True)
    ]
    statistics_B4 = torch.cat(statistics)
    gradients = [
        similarity_gradient(
            x_bD, x_BD, labels_b, labels_B, own, statistics_B4, offset=offset, **constants
        )
        for offset, (x_bD, labels_b), own in zip(offsets, parts, statistics, strict=True)
    ]
    return statistics_B4, torch.cat(gradients)


def _mean_loss(
    statistics_B4: Tensor, *, alpha: float = 2.0, beta: float = 50.0, **_: float
) -> float:
    return float((statistics_B4[:, 2] / alpha + statistics_B4[:, 3] / beta).double().mean())


def _reference(x_BD: Tensor, labels_B: Tensor, **constants: float) -> tuple[float, Tensor]:
    """The mean loss, and the gradient of the summed one."""
    exact_BD = x_BD.double().requires_grad_()
    loss = reference.multi_similarity_loss(exact_BD, labels_B, **DEFAULTS | constants)
    (gradient_BD,) = torch.autograd.grad(loss, exact_BD)
    return loss.item(), gradient_BD * len(x_BD)


def _error(got: Tensor, want: Tensor) -> float:
    """Relative, the worse of norm-wise and over the largest entry."""
    difference = got.double() - want
    return max(
        float(difference.norm() / want.norm()), float(difference.abs().max() / want.abs().max())
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize(("B", "D"), [(2, 24), (5, 8), (31, 100), (64, 130), (65, 512), (130, 24)])
def test_agrees_with_the_reference(B: int, D: int, dtype: torch.dtype) -> None:
    x_BD, labels_B = _batch(B, D, dtype, seed=B)
    statistics_B4, gradient_BD = _run(x_BD, labels_B)
    loss, want_BD = _reference(x_BD, labels_B)
    assert statistics_B4.dtype == gradient_BD.dtype == torch.float32
    if B == 2:  # one class: no negative, nothing mined
        assert _mean_loss(statistics_B4) == loss == 0 and not gradient_BD.any()
        return
    assert loss > 0.1 and want_BD.abs().max() > 0.1
    assert _mean_loss(statistics_B4) == pytest.approx(loss, rel=1e-5)
    rounded = COMPILED or gradient_sums.widest_gather(1, dtype) < D
    assert _error(gradient_BD, want_BD) < (ROUNDED_GRADIENT[dtype] if rounded else 1e-4)


@pytest.mark.parametrize("programs", [1, 30], ids=["one split", "three splits"])
def test_agrees_over_many_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("namr_dist.kernels.gpu.launch.TARGET_PROGRAMS", programs)
    x_BD, labels_B = _batch(300, 24)
    statistics_B4, gradient_BD = _run(x_BD, labels_B)
    loss, want_BD = _reference(x_BD, labels_B)
    assert _mean_loss(statistics_B4) == pytest.approx(loss, rel=1e-5)
    assert _error(gradient_BD, want_BD) < 1e-4


@pytest.mark.parametrize(
    "constants",
    [
        {"epsilon": 0.0},
        {"epsilon": 2.5},  # everything is mined
        {"epsilon": -0.05},  # little is
        {"base": -1.0},
        {"alpha": 200.0, "beta": 200.0},
        {"alpha": 200.0, "beta": 200.0, "base": -1.0},  # exponents up to 400
        {"alpha": 200.0, "beta": 200.0, "base": 1.0, "epsilon": 2.5},
        {"alpha": 0.3, "beta": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("D", [24, 160])
def test_agrees_for_other_constants(constants: dict[str, float], D: int) -> None:
    x_BD, labels_B = _batch(70, D, seed=3)
    statistics_B4, gradient_BD = _run(x_BD, labels_B, **constants)
    loss, want_BD = _reference(x_BD, labels_B, **constants)
    assert want_BD.abs().max() > 0.05
    assert _mean_loss(statistics_B4, **constants) == pytest.approx(loss, rel=1e-5)
    assert _error(gradient_BD, want_BD) < 1e-4


def test_a_small_loss_keeps_its_digits() -> None:
    x_BD, labels_B = HALVES[[0, 0, 15, 15, 3, 3]], torch.tensor([0, 0, 1, 1, 2, 2])
    # Positives weigh exp(-10), negatives less.
    constants = {
        "alpha": 20.0,
        "beta": 20.0,
        "epsilon": 2.5,
    }
    statistics_B4, gradient_BD = _run(x_BD, labels_B, **constants)
    loss, want_BD = _reference(x_BD, labels_B, **constants)
    assert 0 < loss < 1e-4
    assert _mean_loss(statistics_B4, **constants) == pytest.approx(loss, rel=1e-5, abs=0)
    assert _error(gradient_BD, want_BD) < 1e-4


def test_statistics_are_the_extremes_and_the_log_sums() -> None:
    x_BD, labels_B = _batch(37, 24)
    statistics_B4, _ = _run(x_BD, labels_B)
    S = (x_BD.double() @ x_BD.double().T).tolist()
    labels, a, b = labels_B.tolist(), DEFAULTS["alpha"], DEFAULTS["beta"]
    for i in range(37):
        positives = [S[i][j] for j in range(37) if labels[j] == labels[i] and j != i]
        negatives = [S[i][j] for j in range(37) if labels[j] != labels[i]]
        far, near = min(positives, default=math.inf), max(negatives)
        attract = math.log(1 + sum(math.exp(-a * (s - 0.5)) for s in positives if s - 0.1 < near))
        repel = math.log(1 + sum(math.exp(b * (s - 0.5)) for s in negatives if s + 0.1 > far))
        assert statistics_B4[i].tolist() == pytest.approx(
            [far, near, attract, repel], rel=1e-5, abs=1e-7
        )


@pytest.mark.parametrize("D", [24, 160])
def test_local_parts_make_up_the_batch(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_BD, labels_B = _batch(101, D, seed=5)
    whole = _run(x_BD, labels_B)
    monkeypatch.setattr(gradient_sums, "CHUNK_BYTES", 8 * 48**2)  # 32 rows by 64 columns at a time
    for sizes in ([1, 37, 63], [70, 31]):
        for got, want in zip(_run(x_BD, labels_B, sizes), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert _error(_run(x_BD, labels_B, [1, 37, 63])[1], _reference(x_BD, labels_B)[1]) < 1e-4


@pytest.mark.parametrize("epsilon", [0.0, 0.125, 1.0])
@pytest.mark.parametrize(
    ("x_BD", "labels"),
    [
        (HALVES[:1].repeat(40, 1), [0, 1, 1, 2] * 10),
        (HALVES[:1].repeat(40, 1), [5] * 40),
        (HALVES[[0, 0, 1, 1, 2, 2, 3, 3]], [0, 1, 0, 1, 2, 2, 3, 3]),
        (HALVES[[0, 0, 1, 1, 2, 2, 3, 3]], [0, 0, 1, 1, 2, 2, 3, 3]),
        (HALVES, [0] * 16),
        (HALVES, list(range(16))),
        (HALVES, [3, 1, 0, 2] * 4),
        (HALVES[[0, 15]], [0, 0]),
        (HALVES[[0, 15]], [0, 1]),
        (HALVES[[0, 15, 0, 15]], [0, 0, 1, 1]),
        (torch.zeros(6, 4), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["all equal", "all equal, one class", "duplicates across classes", "duplicates within classes", "one class",
         "every row its own class", "many ties", "B=2 alike", "B=2 unlike", "opposite", "zero rows"],
)  # fmt: skip
def test_ties_and_batches_without_pairs(x_BD: Tensor, labels: list[int], epsilon: float) -> None:
    labels_B = torch.tensor(labels)
    statistics_B4, gradient_BD = _run(x_BD, labels_B, epsilon=epsilon)
    loss, want_BD = _reference(x_BD, labels_B, epsilon=epsilon)
    assert _mean_loss(statistics_B4) == pytest.approx(loss, rel=1e-5, abs=0)
    torch.testing.assert_close(gradient_BD.double(), want_BD, rtol=1e-4, atol=1e-6)
    same_BB = (labels_B[:, None] == labels_B) & ~torch.eye(len(labels), dtype=torch.bool)
    assert torch.equal(statistics_B4[:, 0] == math.inf, ~same_BB.any(1))
    assert torch.equal(statistics_B4[:, 1] == -math.inf, (labels_B[:, None] == labels_B).all(1))
    if loss == 0:
        assert not gradient_BD.any() and not statistics_B4[:, 2:].any()


def test_random_near_duplicates() -> None:
    x_BD, labels_B = _batch(50, 24, seed=2)
    x_BD[25:] = reference.unit_rows(
        x_BD[:25] + 1e-4 * torch.randn(25, 24, generator=torch.Generator().manual_seed(1))
    )
    statistics_B4, gradient_BD = _run(x_BD, labels_B)
    loss, want_BD = _reference(x_BD, labels_B)
    assert _mean_loss(statistics_B4) == pytest.approx(loss, rel=1e-5)
    assert _error(gradient_BD, want_BD) < 1e-4


@pytest.mark.parametrize("D", [4, 160])
def test_a_pair_that_is_only_mined_in_the_gradient_has_no_weight(D: int) -> None:
    # Three equal rows and ε = 0: every pair is exactly at its threshold and nothing is mined. An S
    # that the gradient rounds one bit away must not meet log-sums of 0: a negative's weight would
    # be exp(25).
    x_BD, labels_B = torch.zeros(3, D), torch.tensor([0, 0, 1])
    x_BD[:, 0] = 1
    constants = DEFAULTS | {"epsilon": 0.0}
    statistics_B4, _ = _run(x_BD, labels_B, epsilon=0.0)
    assert not statistics_B4[:, 2:].any()
    for direction in (-math.inf, math.inf):
        moved_B4 = statistics_B4.clone()
        moved_B4[:, :2] = moved_B4[:, :2].nextafter(torch.tensor(direction))
        got_BD = similarity_gradient(
            x_BD, x_BD, labels_B, labels_B, moved_B4, moved_B4, offset=0, **constants
        )
        assert not got_BD.any()


@pytest.mark.parametrize(("B", "D"), [(66, 8), (20, 160)])
def test_runs_agree_in_every_bit(B: int, D: int) -> None:
    x_BD, labels_B = _batch(B, D, seed=4)
    first = _run(x_BD, labels_B)
    for _ in range(1, REPEATS):
        assert all(
            torch.equal(got, want) for got, want in zip(_run(x_BD, labels_B), first, strict=True)
        )


@pytest.mark.parametrize("epsilon", [0.1, -0.5])
@pytest.mark.parametrize(
    "labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 0, 1]], ids=["one class", "all apart", "pairs"]
)
def test_nan_reaches_the_loss_and_the_gradient(labels: list[int], epsilon: float) -> None:
    x_BD, _ = _batch(4, 24)
    x_BD[2, 5] = math.nan
    statistics_B4, gradient_BD = _run(x_BD, torch.tensor(labels), epsilon=epsilon)
    # Row 2 is in a pair with every row, so no loss is spared; of the two logs at least the one of
    # that pair is NaN.
    assert statistics_B4[:, 2:].sum(1).isnan().all()
    assert gradient_BD.isnan().all()


def test_rows_and_labels_may_be_strided() -> None:
    x_BD, labels_B = _batch(33, 24)
    wide_BD = torch.stack([x_BD, -x_BD], 2)[..., 0]
    wide_B = torch.stack([labels_B, labels_B + 1], 1)[:, 0]
    for got, want in zip(_run(wide_BD, wide_B), _run(x_BD, labels_B), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("D", [128, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_without_reading_the_device(D: int, dtype: torch.dtype) -> None:
    x_BD = torch.empty(512, D, dtype=dtype, device="meta")
    labels_B = torch.empty(512, dtype=torch.int64, device="meta")
    with recording(90) as seen:
        statistics_B4, gradient_BD = _run(x_BD, labels_B)
    assert [one.kernel.__name__ for one in seen.launches] == [
        "_extremes",
        "_exponential_sums",
        "_pair_weights",
    ]
    assert statistics_B4.shape == (512, 4) and gradient_BD.shape == (512, D)
