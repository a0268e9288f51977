"""The ops where only a GPU can show it: at full size, in half types on matrix units, without
waiting, within memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from op_cases import OPS, ROUNDED_RANKING, Batch, Op, batch, worst
from test_ops import BATCHES
from torch import Tensor

from namr_dist import kernels
from namr_dist.kernels import reference
from namr_dist.kernels.bench import cases, eager, gate
from namr_dist.kernels.bench.providers import find_form

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIB = 2**20

# Widths on either side of each limit of what is kept in registers; 4001 is no multiple of any tile.
SIZES = [(4096, 64), (4001, 100), (4096, 128), (4001, 256), (4096, 512), (4001, 1024)]
SMOOTH = ("mean_distance", "proxy_anchor")
"""No comparison decides a pair's slope here; elsewhere rounding may decide a near tie, and moves a
row's gradient."""
DRAWN = ("distance_weighted", "margin")
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
# Every one of B² pairs has a kink at each centre: at this size most rows have a pair that falls on
# its other side.
RANKING_BOUND = {torch.float32: 2e-3, torch.bfloat16: 0.025, torch.float16: 4e-3}


def large_batch(B: int, D: int) -> Batch:
    """Four rows a class, in no order, and a proxy for each class."""
    return batch(B, D, labels=torch.arange(B) % (B // 4), classes=B // 4)


def apart(got: Tensor, want: Tensor, bound: float) -> float:
    """Share of the rows of a gradient that have an entry beyond `bound` of the largest."""
    beyond = (got.to(want) - want).abs().reshape(len(want), -1).amax(1) > bound * want.abs().max()
    return float(beyond.float().mean())


@pytest.mark.parametrize(("B", "D"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_equals_the_definition_at_full_size(name: str, dtype: torch.dtype, B: int, D: int) -> None:
    op, given = OPS[name], large_batch(B, D).to(dtype, DEVICE)
    loss, gradients = op.value_and_gradients(kernels, given.leaves(dtype, DEVICE))
    want_loss, want_gradients = op.value_and_gradients(
        reference, given.leaves(torch.float64, DEVICE)
    )
    # A draw that falls otherwise, on a near tie, is another term of the mean.
    bound = 1e-3 if name in DRAWN or dtype != torch.float32 else 1e-5
    assert abs(float(loss) - float(want_loss)) <= bound * abs(float(want_loss))
    bound = (RANKING_BOUND if name.startswith("ranking") else BOUND)[dtype]
    for gradient, want in zip(gradients, want_gradients, strict=True):
        assert gradient.isfinite().all()
        if want.numel() == 1:  # of beta: the difference of two counts, as a share of both
            assert abs(float(gradient) - float(want)) <= 1e-2
        else:
            assert want.any() and apart(gradient, want, bound) <= (0 if name in SMOOTH else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("name", OPS)
def test_half_types_equal_the_definition(name: str, case: str, dtype: torch.dtype) -> None:
    op, given = OPS[name], BATCHES[case].rounded(dtype)
    loss, gradients = op.value_and_gradients(kernels, given.leaves(dtype, DEVICE))
    want_loss, want_gradients = op.value_and_gradients(reference, given.leaves(torch.float64))
    assert abs(float(loss) - float(want_loss)) <= 2e-3 * abs(float(want_loss))
    for gradient, want in zip(gradients, want_gradients, strict=True):
        assert gradient.dtype == dtype and gradient.isfinite().all()
        rounded = name.startswith("ranking") and dtype == torch.bfloat16
        bound = ROUNDED_RANKING if rounded else 2 * torch.finfo(dtype).eps
        assert worst(gradient, want) <= bound or not want.any()


@pytest.mark.parametrize("name", OPS)
def test_float64_is_served_by_plain_pytorch(name: str) -> None:
    op, given = OPS[name], batch(41, 24)
    loss, gradients = op.value_and_gradients(kernels, given.leaves(torch.float64, DEVICE))
    want_loss, want_gradients = op.value_and_gradients(reference, given.leaves(torch.float64))
    torch.testing.assert_close(loss.cpu(), want_loss, rtol=1e-12, atol=0)
    for gradient, want in zip(gradients, want_gradients, strict=True):
        assert gradient.is_cuda and worst(gradient, want) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_a_hundred_runs_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    op, given = OPS[name], large_batch(4096, 128).leaves(dtype, DEVICE)
    first_loss, first = op.value_and_gradients(kernels, given)
    for _ in range(99):
        loss, gradients = op.value_and_gradients(kernels, given)
        assert torch.equal(loss, first_loss)
        assert all(torch.equal(one, other) for one, other in zip(gradients, first, strict=True))


# Half types: what the matrix units are given is rounded to them (docs/kernels.md, "Precision"), and
# eager PyTorch, which computes in float32, rounds its result alone. In multi-cluster ranking a pair
# may change sides of a centre.
ROUNDED = {
    ("multi-cluster-ranking", "bfloat16"): 6.0,
    **{
        (loss, dtype): 2.0
        for loss in ("multi-similarity", "proxy-anchor")
        for dtype in ("bfloat16", "float16")
    },
}


@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("loss", [name for name in eager.FORMS if not cases.LOSSES[name].sampled])
def test_gradients_are_as_exact_as_those_of_plain_pytorch(
    loss: str, dtype: str, width: int
) -> None:
    """Largest error against float64 beside that of the eager form. No sampled loss: it draws other
    negatives."""
    case = cases.Case(loss=loss, rows=2048, width=width, dtype=dtype, device="cuda")
    given = cases.make_batch(case)
    truth = gate.yardsticks(case, given)
    ours, plain = (
        gate.judge(find_form(provider, loss), case, given, truth) for provider in ("ours", "eager")
    )
    print(f"{case}: gradient error {ours.gradient_error:.2e}, eager {plain.gradient_error:.2e}")
    assert ours.agrees
    assert ours.gradient_error <= ROUNDED.get((loss, dtype), 1.1) * plain.gradient_error


# What is counted without these two makes the host wait for the device once.
KNOWN_POSITIVES = OPS | {
    **{mining: Op(call=lambda k, b, mining=mining: k.triplet_loss(b.z, b.labels, mining=mining, most_positives=3),
                  by=("z",)) for mining in ("semihard", "distance_weighted")},
    "margin": Op(call=lambda k, b: k.margin_loss(b.x, b.labels, beta=b.beta, most_positives=3), by=("x", "beta")),
}  # fmt: skip


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within, PyTorch raises RuntimeError where it would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN_POSITIVES)
def test_the_host_waits_for_nothing(name: str, dtype: torch.dtype, width: int) -> None:
    op, given = KNOWN_POSITIVES[name], large_batch(1024, width).leaves(dtype, DEVICE)
    op.value_and_gradients(kernels, given)  # compiles
    with waiting_is_an_error():
        op.value_and_gradients(kernels, given)


def test_waiting_is_noticed() -> None:
    given = large_batch(1024, 64).leaves(torch.float32, DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        OPS["semihard"].value_and_gradients(kernels, given)


@pytest.mark.parametrize("name", KNOWN_POSITIVES)
def test_a_step_can_be_captured_as_a_graph(name: str) -> None:
    """Capture refuses whatever reads the device; replay, whatever took a number from it."""
    op, given = KNOWN_POSITIVES[name], large_batch(1024, 128).leaves(torch.float32, DEVICE)
    op.value_and_gradients(kernels, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_loss, captured = op.value_and_gradients(kernels, given)
    others = batch(1024, 128, seed=1, labels=torch.arange(1024) // 4, classes=256).leaves(
        torch.float32, DEVICE
    )
    with torch.no_grad():
        for field, value in vars(others).items():
            getattr(given, field).copy_(value)
    graph.replay()
    loss, gradients = op.value_and_gradients(kernels, others)
    assert torch.equal(captured_loss, loss)
    assert all(torch.equal(one, other) for one, other in zip(captured, gradients, strict=True))


@pytest.fixture(scope="module")
def largest_batch() -> Batch:
    """65,536 rows of width 512 on a CPU; made once, for that takes seconds."""
    return large_batch(65536, 512).to(torch.bfloat16)


@pytest.mark.xdist_group("largest batch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN_POSITIVES)
def test_65536_rows_take_320_mib_beside_inputs_and_gradients(
    name: str, dtype: torch.dtype, largest_batch: Batch
) -> None:
    """The most that PyTorch's allocator holds at any moment of a forward and backward pass, less
    what it held before and less the gradients that are returned, in the type they are returned
    in."""
    op = KNOWN_POSITIVES[name]
    # The library's workspace.
    op.value_and_gradients(kernels, large_batch(1024, 512).leaves(dtype, DEVICE))
    given = largest_batch.leaves(dtype, DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, gradients = op.value_and_gradients(kernels, given)
    torch.cuda.synchronize()
    returned = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    extra_mib = (torch.cuda.max_memory_allocated() - before - returned) / MIB
    print(f"{name}, {dtype}: {extra_mib:.0f} MiB, gradients {returned / MIB:.0f} MiB")
    assert extra_mib <= 320


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            "triplet_loss(z, labels, most_positives=1)",
            "a class has more positives in the batch than most_positives says",
        ),
        (
            "margin_loss(z, labels, beta=z[0, :1], most_positives=1)",
            "a class has more positives in the batch",
        ),
        ("proxy_anchor_loss(z, labels, z[:1])", "a label has no proxy"),
    ],
)
def test_a_broken_promise_is_a_device_assertion(call: str, said: str) -> None:
    """In a process of its own, which such an assertion leaves without a GPU."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import torch
from namr_dist.kernels import margin_loss, proxy_anchor_loss, triplet_loss
z = torch.nn.functional.normalize(torch.randn(6, 8, device="cuda"))
labels = torch.tensor([0, 0, 0, 1, 1, 1], device="cuda")
{call}
torch.cuda.synchronize()
""",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode != 0
        and "device-side assert triggered" in done.stderr
        and said in done.stderr
    )
