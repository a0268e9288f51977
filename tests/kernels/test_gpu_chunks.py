"""Pair weights in chunks of rows and columns: gradients are those of the definition wherever the
cuts fall."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from op_cases import (
    KERNEL_DEVICE,
    KERNEL_MARKS,
    OPS,
    ROUNDED_RANKING,
    ROWS,
    Batch,
    batch,
    on_ranks,
    use_path,
    worst,
)

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.kernels.gpu import gradient_sums
from namr_dist.kernels.gpu.distances import (
    _inverse_distances,
    nearest_counted,
    root_mean_square,
    squared_norms,
)

pytestmark = KERNEL_MARKS
COLUMNS, WIDTH = 64, 300  # wider than any accumulator
RANKS = (14, 0, 39)
# The other two are cut in their own tests.
CHUNKED = ["mean_distance", "ranking"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """COLUMNS rows and columns of float32 at a time; the shapes of those that are made."""
    use_path("triton", monkeypatch)
    monkeypatch.setattr(gradient_sums, "CHUNK_BYTES", COLUMNS**2 * 2 * 4)
    seen: list[tuple[int, int]] = []
    product = gradient_sums.product
    monkeypatch.setattr(
        gradient_sums,
        "product",
        lambda weights, value: (seen.append(tuple(weights.shape[1:])), product(weights, value))[1],
    )
    return seen


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CHUNKED), ("ranking", torch.bfloat16)]
)
def test_many_chunks_equal_the_definition(
    name: str,
    dtype: torch.dtype,
    small_chunks: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == torch.bfloat16:  # one part of two bytes in place of two of four
        monkeypatch.setattr(gradient_sums, "CHUNK_BYTES", COLUMNS**2 * 2)
    op, given = OPS[name], batch(101, WIDTH).rounded(dtype)
    _, gradients = op.value_and_gradients(kernels, given.leaves(dtype, KERNEL_DEVICE))
    _, wanted = op.value_and_gradients(reference, given.leaves(torch.float64))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert worst(gradient.cpu(), want) <= (1e-4 if dtype == torch.float32 else ROUNDED_RANKING)
    assert {width for _, width in small_chunks} >= {COLUMNS, 101 % COLUMNS}


def test_chunks_on_uneven_ranks() -> None:
    given = batch(sum(RANKS), WIDTH, seed=6).rounded(torch.float32)
    plain = given.to(torch.float32, KERNEL_DEVICE)
    _, of_rows = ROWS["ranking"]
    results = on_ranks(RANKS, lambda i, j, gather: of_rows(plain, i, j, gather))
    _, wanted = OPS["ranking"].value_and_gradients(reference, given.leaves(torch.float64))
    for position, want in enumerate(wanted, start=1):
        assert worst(torch.cat([result[position].cpu() for result in results]), want) <= 1e-4


def test_memory_rows_end_within_a_chunk() -> None:
    """Anchors are the first 70 of 110 candidates: columns from there on have no gradient."""
    given, memory = (
        batch(70, WIDTH).rounded(torch.float32),
        batch(40, WIDTH, seed=9).rounded(torch.float32),
    )
    joined = Batch(
        **{name: getattr(given, name) for name in ("s", "x", "proxies", "beta", "labels")},
        z=torch.cat([given.z, memory.z]),
    )
    results = on_ranks(
        (70,),
        lambda i, j, gather: ROWS["ranking"][1](
            joined.to(torch.float32, KERNEL_DEVICE), i, j, gather
        ),
    )
    leaves = given.leaves(torch.float64)
    loss = partial(reference.multi_cluster_ranking, memory_QD=memory.z)(leaves.z, leaves.s)
    for got, want in zip(
        results[0][1:], torch.autograd.grad(loss, [leaves.z, leaves.s]), strict=True
    ):
        assert worst(got.cpu(), want) <= 1e-4


def test_float32_weights_are_kept_as_a_rounded_part_and_the_rest() -> None:
    """The rounded part has 10 bits of mantissa, as TF32 has, and the product of both parts loses
    nothing."""
    kept: list[torch.Tensor] = []
    z = batch(96, WIDTH).z.to(KERNEL_DEVICE, torch.float32)

    def keep(_rows: slice, _columns: slice, weights: torch.Tensor) -> None:
        kept.append(weights.cpu())

    for _ in gradient_sums.owner_sums(
            _inverse_distances, rows={"z": z, "norms": squared_norms(z)},
            columns={"all_z": z, "all_norms": squared_norms(z)},
            fixed={"unit": root_mean_square(z), "NEAREST": nearest_counted(z.dtype)},
            values=lambda window: [z[window]], accumulators=1, numbers=1, offset=0, transposed=keep):  # fmt: skip
        pass
    rounded, rest = torch.cat([weights.flatten(1) for weights in kept], 1)
    assert not (rounded.view(torch.int32) & 0x1FFF).any() and rest.any()
    assert (rest.abs() <= 2.0**-11 * rounded.abs()).all()
