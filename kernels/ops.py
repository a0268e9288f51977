"""A loss that computes its gradients in its forward pass, as an operator PyTorch knows: autograd,
torch.compile, fakes.

A loss over all pairs must walk them again for its gradient, and what it needs for that is at hand
in the forward pass: one walk fewer, nothing of size B² or of a walk's results to keep. Backward
multiplies by the incoming gradient.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import check_finite
from .reference.pairs import compute_dtype

Gather = Callable[[Tensor], Tensor]
"""(b, …) of one rank → (B, …) of all, in the order of ranks; every rank must call it with equal
trailing shape."""

Function = TypeVar("Function", bound=Callable[..., Any])


def alone(local: Tensor) -> Tensor:
    """The `Gather` of a single process."""
    return local


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def seed_64(seed: int) -> int:
    """The low 64 bits of a seed as a signed number, which is what an operator's argument can
    hold."""
    return seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, and with float32 products in float32 whatever
    torch.set_float32_matmul_precision says."""
    # By backend: torch.get_float32_matmul_precision refuses to answer those who use the newer
    # settings.
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = cpu.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def exactly(function: Function) -> Function:
    """Run a function of tensors, the first of its arguments one, without autograd and in full
    precision."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *arguments: Any, **options: Any) -> Any:
        with _full_precision(first.device):
            return function(first, *arguments, **options)

    return wrapped  # type: ignore[return-value]


def loss_op(
    name: str, *, differentiable: int
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of tensors and numbers the operator `namr::name`.

    The function's first `differentiable` arguments are tensors that receive gradients, its last is
    `with_grad`; it returns the loss, a scalar, and one gradient for each of those tensors (None
    without `with_grad`). Gradients are kept in float32 or wider and rounded to a half type only
    after the incoming gradient is multiplied in, so that a loss scale does its work. First order
    only: a second derivative raises RuntimeError.
    With NAMR_DEBUG=1 in the environment every floating argument is checked first; a row that is not
    finite is named.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> tuple[Tensor, ...]:
            leading: Sequence[Tensor] = arguments[:differentiable]
            if os.environ.get("NAMR_DEBUG") == "1":
                for position, tensor in enumerate(leading):
                    check_finite(f"{name}: argument {position}", tensor)
            rows = [tensor.contiguous() for tensor in leading]
            # What else is a tensor is labels.
            others = [
                other.long() if isinstance(other, Tensor) else other
                for other in arguments[differentiable:]
            ]
            loss, *gradients = function(*rows, *others)
            # An operator's results have fixed positions; a gradient nobody asked for is an empty
            # tensor.
            return loss.to(compute_dtype(*leading)), *(
                _kept(tensor, 0)
                if gradient is None
                else gradient.to(compute_dtype(tensor)).contiguous()
                for tensor, gradient in zip(leading, gradients, strict=True)
            )

        schema = torch.library.infer_schema(function, mutates_args=())
        op = torch.library.custom_op(f"namr::{name}", run, mutates_args=(), schema=schema)

        @op.register_fake
        def fake(*arguments: Any) -> tuple[Tensor, ...]:
            leading, with_grad = arguments[:differentiable], arguments[-1]
            loss = leading[0].new_empty((), dtype=compute_dtype(*leading))
            return loss, *(_kept(tensor, tensor.shape if with_grad else 0) for tensor in leading)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*output[1:])
            ctx.dtypes = [tensor.dtype for tensor in inputs[:differentiable]]
            ctx.others = len(inputs) - differentiable

        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # create_graph=True
                raise RuntimeError(
                    f"{name} has first derivatives only; use kernels.reference for anything beyond"
                )
            if grad_loss is None:
                return (None,) * (differentiable + ctx.others)
            return *(
                _scaled(gradient, grad_loss, dtype)
                for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ), *(None,) * ctx.others

        op.register_autograd(backward, setup_context=setup_context)
        return op

    return register


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Their product rounded to `dtype`, on a GPU without a wider one in between."""
    if gradient.dtype == dtype:
        return gradient * factor
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _kept(tensor: Tensor, shape: Any) -> Tensor:
    """Room for a gradient of `tensor`."""
    return tensor.new_empty(shape, dtype=compute_dtype(tensor))
