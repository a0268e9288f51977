"""The public ops against the float64 definition, on the CPU path and on Triton's kernels; and as
PyTorch operators."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_cases import (
    CLASSES,
    DEVICES,
    OPS,
    PATHS,
    REPEATS,
    ROUNDED_RANKING,
    ROWS,
    UNEVEN,
    Batch,
    batch,
    device_of,
    on_ranks,
    use_path,
    worst,
)
from torch import Tensor

from namr_dist import kernels
from namr_dist.kernels import cpu, gpu, op_table, ops, reference

LATTICE = torch.randint(-2, 3, (24, 8), generator=torch.Generator().manual_seed(5))
BATCHES = {
    "random": batch(41, 24),
    "not a multiple of a tile": batch(133, 40),
    "wider than an accumulator": batch(33, 300),
    "two rows, one class": batch(2, 8, labels=torch.tensor([3, 3])),
    "two rows, two classes": batch(2, 8, labels=torch.tensor([3, 1])),
    "one class": batch(19, 8, labels=torch.full((19,), 4)),
    "a class each": batch(CLASSES, 8, labels=torch.arange(CLASSES)),
    "pairs of equal rows": batch(40, 24, z=batch(20, 24).z.repeat_interleave(2, 0)),
    "all rows equal": batch(20, 24, z=batch(1, 24).z.repeat(20, 1)),
    # Small integers: every order of summation is exact, so ties are ties in every implementation.
    "a lattice with ties": batch(24, 8, z=LATTICE),
    "far from the origin": batch(40, 24, z=batch(40, 24).z + 30),
    "near-duplicates": batch(
        40, 24, z=batch(20, 24).z.repeat(2, 1) + 1e-3 * batch(40, 24, seed=3).z
    ),
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on blocked PyTorch and on Triton's kernels."""
    use_path(request.param, monkeypatch)
    return request.param


@pytest.fixture
def device(path: str) -> torch.device:
    """Where that path's tensors belong."""
    return device_of(path)


@pytest.mark.parametrize("name", op_table.OPS)
def test_an_op_has_one_name_and_the_primitives_of_the_table(name: str) -> None:
    assert (
        callable(getattr(reference, name)) and name in reference.__all__ and name in kernels.__all__
    )
    assert getattr(torch.ops.namr, name).default
    source = inspect.getsource(sys.modules[getattr(kernels, name).__module__])
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "primitives"
    }
    assert used == set(op_table.OPS[name].primitives)


def test_every_primitive_is_of_some_op_and_runs_everywhere() -> None:
    wanted = {primitive for op in op_table.OPS.values() for primitive in op.primitives}
    assert wanted == set(cpu.__all__) and wanted >= set(gpu.__all__)


def test_every_op_of_the_table_is_tried_here() -> None:
    called = []
    stand_ins = SimpleNamespace(
        **{
            name: lambda *_, name=name, **__: (torch.zeros(()), called.append(name))
            for name in op_table.OPS
        }
    )
    for op in OPS.values():
        op.call(stand_ins, batch(2, 2))
    assert set(called) == set(op_table.OPS)


def test_the_table_imports_nothing() -> None:
    imports = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(op_table)))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert {node.module for node in imports} <= {"collections.abc", "dataclasses"}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("name", OPS)
def test_equals_the_definition_in_float64(
    path: str, device: torch.device, name: str, case: str
) -> None:
    if name == "semihard" and (
        case == "near-duplicates" or (case, path) == ("pairs of equal rows", "triton")
    ):
        # A twin of the positive lies just within or just beyond it, and the loss itself jumps in
        # the last bits. The interpreter's products of equal columns may differ in those; the
        # lattice has exact twins.
        given = BATCHES[case].to(torch.float32)
        loss = float(OPS[name].call(kernels, given.to(torch.float32, device)))
        want = float(OPS[name].call(reference, given.to(torch.float64)))
        assert abs(loss - want) <= 1e-2 * want
        return
    op, given = OPS[name], BATCHES[case].rounded(torch.float32)
    loss, gradients = op.value_and_gradients(kernels, given.leaves(torch.float32, device))
    want_loss, want_gradients = op.value_and_gradients(reference, given.leaves(torch.float64))
    assert loss.dtype == torch.float32 and all(
        gradient.dtype == torch.float32 for gradient in gradients
    )
    assert abs(float(loss) - float(want_loss)) <= 1e-5 * abs(float(want_loss))
    for gradient, want in zip(gradients, want_gradients, strict=True):
        if want.abs().max() == 0:
            assert gradient.abs().max() == 0
        else:
            assert worst(gradient, want) <= 1e-4


@pytest.mark.parametrize("name", ["mean_distance", "ranking"])
def test_rows_nearer_than_rounding_allows(path: str, device: torch.device, name: str) -> None:
    """At a hundred-thousandth of the usual distance the kernels' gradient is noisy, by the bound in
    docs/kernels.md."""
    close = batch(40, 24, z=batch(20, 24).z.repeat(2, 1) + 1e-5 * batch(40, 24, seed=3).z)
    op, given = OPS[name], close.rounded(torch.float32)
    loss, gradients = op.value_and_gradients(kernels, given.leaves(torch.float32, device))
    want_loss, want_gradients = op.value_and_gradients(reference, given.leaves(torch.float64))
    assert abs(float(loss) - float(want_loss)) <= 1e-5 * abs(float(want_loss))
    assert worst(gradients[0], want_gradients[0]) <= (1e-4 if path == "cpu" else 0.016)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_half_types_are_added_up_in_float32(
    path: str, device: torch.device, name: str, dtype: torch.dtype
) -> None:
    op, given = OPS[name], batch(70, 24, seed=2).rounded(dtype)
    loss, gradients = op.value_and_gradients(kernels, given.leaves(dtype, device))
    want_loss, want_gradients = op.value_and_gradients(reference, given.leaves(torch.float64))
    assert loss.dtype == torch.float32 and all(gradient.dtype == dtype for gradient in gradients)
    # Unit rows are normalised again by nothing: a rounded row of the batch is what both sides see.
    rounded = path == "triton" and name.startswith("ranking") and dtype == torch.bfloat16
    assert abs(float(loss) - float(want_loss)) <= (1e-3 if rounded else 1e-4) * abs(
        float(want_loss)
    )
    for gradient, want in zip(gradients, want_gradients, strict=True):
        assert worst(gradient, want) <= (ROUNDED_RANKING if rounded else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", OPS)
def test_repeats_have_the_same_bits(path: str, device: torch.device, name: str) -> None:
    op, given = OPS[name], batch(33, 8, seed=4).leaves(torch.float32, device)
    first_loss, first = op.value_and_gradients(kernels, given)
    for _ in range(1, 20 if path == "cpu" else REPEATS):
        loss, gradients = op.value_and_gradients(kernels, given)
        assert torch.equal(loss, first_loss)
        assert all(torch.equal(one, other) for one, other in zip(gradients, first, strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_several_ranks_make_the_same_loss_and_gradient(
    device: torch.device, name: str
) -> None:
    whole, of_rows = ROWS[name]
    given = batch(sum(UNEVEN), 24, seed=6).rounded(torch.float32)
    plain = given.to(torch.float32, device)
    results = on_ranks(UNEVEN, lambda i, j, gather: of_rows(plain, i, j, gather))
    want_loss, want_gradients = OPS[whole].value_and_gradients(
        reference, given.leaves(torch.float64)
    )
    for loss, *_ in results:
        assert abs(float(loss) - float(want_loss)) <= 1e-5 * abs(float(want_loss))
    for position, (argument, want) in enumerate(
        zip(OPS[whole].by, want_gradients, strict=True), start=1
    ):
        shares = [result[position] for result in results]
        # A parameter's gradient is shared out among ranks, a row's belongs to its rank.
        got = torch.stack(shares).sum(0) if argument in ("proxies", "beta") else torch.cat(shares)
        assert worst(got, want) <= 1e-4


@pytest.mark.parametrize("name", ["mean_distance", "ranking"])
def test_a_rank_whose_only_row_is_the_middle_of_the_batch(device: torch.device, name: str) -> None:
    given = batch(5, 2, z=torch.tensor([[0, 0], [2, 0], [-2, 0], [0, 2], [0, -2]])).rounded(
        torch.float32
    )
    plain = given.to(torch.float32, device)
    results = on_ranks((1, 4), lambda i, j, gather: ROWS[name][1](plain, i, j, gather))
    _, (want, *_) = OPS[name].value_and_gradients(reference, given.leaves(torch.float64))
    assert worst(torch.cat([result[1] for result in results]), want) <= 1e-4
    assert name == "mean_distance" or want[0].abs().max() > 1e-3 * want.abs().max()


@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("ranking")])
def test_gradcheck_in_float64(name: str) -> None:
    given = batch(11, 5, seed=1).leaves(torch.float64)
    op = OPS[name]

    def function(*arguments: Tensor) -> Tensor:
        fields = {
            "z": given.z,
            "s": given.s,
            "x": given.x,
            "proxies": given.proxies,
            "beta": given.beta,
        }
        return op.call(
            kernels,
            Batch(**(fields | dict(zip(op.by, arguments, strict=True))), labels=given.labels),
        )

    assert torch.autograd.gradcheck(
        function, [getattr(given, name) for name in op.by], eps=1e-7, atol=1e-5
    )


class _RankingAroundFixedCentres(torch.autograd.Function):
    """The centres carry no gradient, so a finite difference must not move them either."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, s: Tensor, far: Tensor, step: Tensor, clusters: int) -> Tensor:
        loss, *gradients = cpu.ranking(z, s, z, s, far, step, offset=0, clusters=clusters, sharpness=4.0,
                                       with_grad=True)  # fmt: skip
        ctx.save_for_backward(*gradients)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * grad for gradient in ctx.saved_tensors), None, None, None


@pytest.mark.parametrize("clusters", [2, 3, 7])
def test_gradcheck_of_ranking_around_fixed_centres(clusters: int) -> None:
    given = batch(11, 5, seed=1).leaves(torch.float64)
    far = torch.linspace(1.5, 2.5, 11, dtype=torch.float64)
    step = torch.full_like(far, 1.3 / clusters)
    assert torch.autograd.gradcheck(
        lambda z, s: _RankingAroundFixedCentres.apply(z, s, far, step, clusters),
        [given.z, given.s],
        eps=1e-7,
        atol=1e-5,
    )


RAW: dict[str, tuple[str, Callable[[Batch], tuple[Any, ...]]]] = {
    "mean_distance": ("mean_pairwise_distance", lambda b: (b.z, True)),
    "ranking": ("multi_cluster_ranking", lambda b: (b.z, b.s, 3, 3.0, 0.2, 10.0, "batch", True)),
    "without gradient": ("multi_cluster_ranking", lambda b: (
        b.z.detach(), b.s.detach(), 3, 3.0, 0.2, 10.0, "anchor", False)),
    "nearest_centres": ("nearest_centres", lambda b: (b.z, b.proxies, 3)),
    "gradient of nearest_centres": ("nearest_centres_gradient", lambda b: (
        b.z.detach(), b.proxies.detach(), b.labels[:, None], b.s.detach()[:, :1].contiguous(), True, False)),
    "semihard": ("triplet_loss", lambda b: (b.z, b.labels, 0.2, "semihard", 0, None, True)),
    "hardest": ("triplet_loss", lambda b: (b.z, b.labels, 0.2, "hardest", 0, None, True)),
    "distance_weighted": ("triplet_loss", lambda b: (b.z, b.labels, 0.2, "distance_weighted", 2**40, 12, True)),
    "margin": ("margin_loss", lambda b: (b.x, b.beta, b.labels, 0.2, 3, None, True)),
    "multi_similarity": ("multi_similarity_loss", lambda b: (b.x, b.labels, 2.0, 50.0, 0.5, 0.1, True)),
    "proxy_anchor": ("proxy_anchor_loss", lambda b: (b.x, b.proxies, b.labels, 32.0, 0.1, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str, name: str) -> None:
    op, arguments = RAW[name]
    given = batch(13, 6, seed=3).leaves(torch.float32, device)
    torch.library.opcheck(getattr(torch.ops.namr, op).default, arguments(given))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device: str, name: str) -> None:
    torch._dynamo.reset()
    op, given = OPS[name], batch(23, 8, seed=9).leaves(torch.float32, device)

    def function(
        z: Tensor, s: Tensor, x: Tensor, proxies: Tensor, beta: Tensor, labels: Tensor
    ) -> Tensor:
        return 2 * op.call(kernels, Batch(z=z, s=s, x=x, proxies=proxies, beta=beta, labels=labels))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = (given.z, given.s, given.x, given.proxies, given.beta, given.labels)
    by = [getattr(given, field) for field in op.by]
    for one, other in zip(torch.autograd.grad(compiled(*arguments), by),
                          torch.autograd.grad(function(*arguments), by), strict=True):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_a_new_seed_does_not_compile_anew(device: str) -> None:
    torch._dynamo.reset()
    given = batch(23, 8).leaves(torch.float32, device)
    compiled = torch.compile(
        lambda z, seed: kernels.triplet_loss(z, given.labels, mining="distance_weighted", seed=seed),
        fullgraph=True, backend="aot_eager")  # fmt: skip
    with torch._dynamo.config.patch(error_on_recompile=False):
        losses = [float(compiled(given.z, seed).detach()) for seed in (1, 2)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses += [float(compiled(given.z, seed).detach()) for seed in (3, 2**41, 5)]
    assert len(set(losses)) == 5


@pytest.mark.parametrize("name", OPS)
def test_nan_comes_out_and_debug_mode_names_the_row(
    device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, given = OPS[name], batch(21, 8)
    field = op.by[0]
    getattr(given, field)[17, 3] = float("nan")
    # Mined losses may pass a row by.
    if name in (
        "mean_distance",
        "ranking",
        "nearest_centres",
        "multi_similarity",
        "proxy_anchor",
    ):
        assert torch.isnan(op.call(kernels, given.leaves(torch.float32, device)))
    monkeypatch.setenv("NAMR_DEBUG", "1")
    with pytest.raises(ValueError, match=r"nan at row 17, column 3"):
        op.call(kernels, given.leaves(torch.float32, device))


def test_second_derivatives_are_refused() -> None:
    given = batch(9, 4).leaves(torch.float64)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(kernels.mean_pairwise_distance(given.z), given.z, create_graph=True)


@pytest.mark.parametrize("name", OPS)
def test_autocast_changes_nothing(device: torch.device, name: str) -> None:
    op, given = OPS[name], batch(21, 8).leaves(torch.float32, device)
    plain, _ = op.value_and_gradients(kernels, given)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside, _ = op.value_and_gradients(kernels, given)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("name", OPS)
def test_strided_rows(device: torch.device, name: str) -> None:
    op, given = OPS[name], batch(21, 8).leaves(torch.float32, device)
    wide = {field: torch.stack([getattr(given, field), getattr(given, field) + 9], -1)[..., 0]
            for field in ("z", "s", "x", "proxies")}  # fmt: skip
    strided = Batch(**{field: value.detach().requires_grad_() for field, value in wide.items()}, beta=given.beta,
                    labels=given.labels.repeat_interleave(2)[::2])  # fmt: skip
    assert not strided.z.is_contiguous()
    loss, gradients = op.value_and_gradients(kernels, strided)
    want_loss, want = op.value_and_gradients(kernels, given)
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(one, other) for one, other in zip(gradients, want, strict=True))


def test_too_few_slots_for_positives_are_refused() -> None:
    given = batch(8, 4, labels=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])).leaves(torch.float32)
    assert kernels.triplet_loss(given.z, given.labels, most_positives=2) == kernels.triplet_loss(
        given.z, given.labels
    )
    assert kernels.triplet_loss(given.z, given.labels, most_positives=6) == kernels.triplet_loss(
        given.z, given.labels
    )
    with pytest.raises(ValueError, match="most_positives is 1, but a class has 3 rows"):
        kernels.triplet_loss(given.z, given.labels, most_positives=1)


@pytest.mark.parametrize("name", ["mean_distance", "ranking"])
def test_float16_rows_far_from_the_origin(device: torch.device, name: str) -> None:
    far = batch(32, 48, z=40 + 0.5 * batch(32, 48).z)
    op, given = OPS[name], far.rounded(torch.float16)
    _, gradients = op.value_and_gradients(kernels, given.leaves(torch.float16, device))
    _, want = op.value_and_gradients(reference, given.leaves(torch.float64))
    for one, other in zip(gradients, want, strict=True):
        assert worst(one, other) <= 5e-3


def test_a_loss_scale_reaches_half_gradients_before_they_are_rounded(device: torch.device) -> None:
    rows = batch(64, 8)
    given, scale = batch(64, 8, z=0.0005 * rows.z).rounded(torch.float16), 2.0**14
    half, exact = given.leaves(torch.float16, device), given.leaves(torch.float64)
    (scaled,) = torch.autograd.grad(kernels.multi_cluster_ranking(half.z, half.s) * scale, half.s)
    (want,) = torch.autograd.grad(reference.multi_cluster_ranking(exact.z, exact.s), exact.s)
    assert want.abs().max() < 2.0**-14  # float16 keeps few bits of numbers this small
    assert worst(scaled.double() / scale, want) <= 2 * torch.finfo(torch.float16).eps


def test_lower_precision_of_products_is_not_for_the_losses() -> None:
    # Not every CPU has a lower precision, so what is asked is the setting that the products see.
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        seen = ops.exactly(
            lambda _: (
                torch.backends.cuda.matmul.fp32_precision,
                torch.backends.mkldnn.matmul.fp32_precision,
            )
        )(torch.zeros(1))
        assert seen == ("ieee", "ieee")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("seed", [2**63 + 5, 2**64 - 1, -3])
def test_every_seed_of_64_bits_is_the_references(device: torch.device, seed: int) -> None:
    given = batch(30, 16, seed=2)
    ready = given.to(torch.float32, device)
    ours = kernels.triplet_loss(ready.z, ready.labels, mining="distance_weighted", seed=seed)
    want = reference.triplet_loss(given.z, given.labels, mining="distance_weighted", seed=seed)
    assert abs(float(ours) - float(want)) <= 1e-5 * float(want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    given = batch(300, 8, labels=torch.arange(300) % 7)
    for name in ("hardest", "semihard", "margin", "multi_similarity", "proxy_anchor"):
        plain, narrow = given.leaves(torch.float32), given.leaves(torch.float32)
        narrow = Batch(**{**vars(narrow), "labels": given.labels.to(dtype)})
        assert torch.equal(OPS[name].call(kernels, plain), OPS[name].call(kernels, narrow))


def test_arguments_of_two_types_are_computed_in_the_wider() -> None:
    given = batch(20, 8)
    got = kernels.multi_cluster_ranking(given.z.float(), given.s)
    want = reference.multi_cluster_ranking(given.z.float(), given.s)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    x, beta = given.x.float(), given.beta.requires_grad_()
    torch.library.opcheck(
        torch.ops.namr.margin_loss.default, (x, beta, given.labels, 0.2, 3, None, True)
    )
