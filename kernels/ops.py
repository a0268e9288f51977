"""A loss that computes its gradients in its forward pass, as an operator PyTorch knows: autograd, torch.compile, fakes.

A loss over all pairs must walk them again for its gradient, and what it needs for that is at hand in the forward pass:
one walk fewer, nothing of size B² or of a walk's results to keep. Backward multiplies by the incoming gradient.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_finite

Gather = Callable[[Tensor], Tensor]
"""(b, …) of one rank → (B, …) of all, in the order of ranks; every rank must call it with equal trailing shape."""


def alone(local: Tensor) -> Tensor:
    """The `Gather` of a single process."""
    return local


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type an op adds up and returns its loss in: the widest of its inputs, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def loss_op(name: str, *, differentiable: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of tensors and numbers the operator `namr::name`.

    The function's first `differentiable` arguments are tensors that receive gradients, its last is `with_grad`; it
    returns the loss, a scalar, and one gradient for each of those tensors (None without `with_grad`). It runs without
    autograd and without autocast. First order only: a second derivative raises RuntimeError.
    With NAMR_DEBUG=1 in the environment every floating argument is checked first; a row that is not finite is named.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> tuple[Tensor, ...]:
            leading: Sequence[Tensor] = arguments[:differentiable]
            if os.environ.get("NAMR_DEBUG") == "1":
                for place, tensor in enumerate(leading):
                    check_finite(f"{name}: argument {place}", tensor)
            rows = [tensor.contiguous() for tensor in leading]
            with torch.autocast(leading[0].device.type, enabled=False):
                loss, *gradients = function(*rows, *arguments[differentiable:])
            # An operator's results have fixed places; a gradient nobody asked for is an empty tensor.
            return loss, *(tensor.new_empty(0) if gradient is None else gradient.to(tensor.dtype)
                           for tensor, gradient in zip(leading, gradients, strict=True))

        schema = torch.library.infer_schema(function, mutates_args=())
        op = torch.library.custom_op(f"namr::{name}", run, mutates_args=(), schema=schema)

        @op.register_fake
        def fake(*arguments: Any) -> tuple[Tensor, ...]:
            leading, with_grad = arguments[:differentiable], arguments[-1]
            loss = leading[0].new_empty((), dtype=compute_dtype(*leading))
            return loss, *(torch.empty_like(tensor, memory_format=torch.contiguous_format) if with_grad
                           else tensor.new_empty(0) for tensor in leading)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(*output[1:])
            ctx.others = len(inputs) - differentiable

        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # create_graph=True
                raise RuntimeError(f"{name} has first derivatives only; use kernels.reference for anything beyond")
            gradients = ctx.saved_tensors if grad_loss is not None else (None,) * differentiable
            return *(None if gradient is None else (gradient * grad_loss).to(gradient.dtype)
                     for gradient in gradients), *(None,) * ctx.others

        op.register_autograd(backward, setup_context=setup_context)
        return op

    return register
