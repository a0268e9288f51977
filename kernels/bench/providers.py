"""Who computes a loss: this project, plain PyTorch, torch.compile, loops, another library; and the
bare product.

A provider is a name.  `find_form` gives its form of a loss, `obstacle` says why it sits a case out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..op_table import OPS
from . import eager, library, naive
from .cases import LOSSES, POSITIVES, Case, Form

PROVIDERS = ("ours", "eager", "compile", "naive", "pml", "matmul")
NAIVE_ROWS = {"cuda": 1024, "cpu": 256}
"""The loop form is measured up to this batch: it holds B²D numbers, and runs several operations an
anchor."""
GRADIENT_IN_FORWARD = ("ours",)
"""These compute the gradient beside the loss, so their backward alone is no measure of anything."""
_PAIR_TENSORS = 16
"""A generous count of the (B, B) float32 tensors alive in one pass of the forms that hold them."""


def _form(function: Callable[..., Tensor], options: Mapping[str, Any]) -> Form:
    """A loss of an op or of its definition: what it must be given is the labels, if it reads them,
    and the leaves."""
    parameters = signature(function).parameters
    needed = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty
    ]
    leaves = [name for name in needed if name != "labels_B"]
    # Else an op counts them.
    known = {"most_positives": POSITIVES} if "most_positives" in parameters else {}

    def form(labels_B: Tensor, *given: Tensor) -> Tensor:
        labels = {"labels_B": labels_B} if "labels_B" in needed else {}
        return function(**dict(zip(leaves, given, strict=True)), **labels, **known, **options)

    return form


def _forms(functions: ModuleType) -> dict[str, Form]:
    """Every loss by the functions of a module that are called as the ops are."""
    return {
        loss.name: _form(getattr(functions, op.name), loss.options)
        for op in OPS.values()
        for loss in op.benchmarks
    }


# The package of the ops, by which they are found by name.
OURS = _forms(import_module("..", __package__))
REFERENCE = _forms(reference)


def _compiled(loss: str) -> Form:
    # One graph a shape, as in training; the reset keeps earlier cases from using up the
    # recompilation limit.
    torch._dynamo.reset()
    compiled: Form = torch.compile(eager.FORMS[loss], dynamic=False)
    return compiled


_FINDERS: dict[str, Callable[[str], Form]] = {
    "ours": OURS.__getitem__,
    "eager": eager.FORMS.__getitem__,
    "compile": _compiled,
    "naive": naive.FORMS.__getitem__,
    "pml": lambda loss: library.forms()[loss],
    "matmul": lambda loss: bare_product,
}
_WRITTEN = {"eager": eager.FORMS, "compile": eager.FORMS, "naive": naive.FORMS}
"""Forms that are written for the benchmark; a loss need not have one."""


def bare_product(labels_B: Tensor, rows_BD: Tensor, *_: Tensor) -> Tensor:
    """X·Xᵀ by the library in the rows' own dtype: the witness."""
    return rows_BD @ rows_BD.T


def find_form(provider: str, loss: str) -> Form:
    """A provider's form of a loss."""
    return _FINDERS[provider](loss)


def available() -> tuple[str, ...]:
    """Providers whose packages are installed."""
    missing = find_spec("pytorch_metric_learning") is None
    return tuple(name for name in PROVIDERS if not (missing and name == "pml"))


def obstacle(provider: str, case: Case) -> str | None:
    """Why a provider cannot run a case, or None."""
    kind = torch.device(case.device).type
    if provider == "pml" and case.loss not in library.forms():
        return "pytorch-metric-learning has no such loss"
    if case.loss not in _WRITTEN.get(provider, LOSSES):
        return "no such form of this loss is written"
    if provider == "naive" and case.rows > NAIVE_ROWS[kind]:
        return f"the loop form is measured up to B {NAIVE_ROWS[kind]}"
    # A GPU says itself that its memory is full; on a CPU the system would end the process.
    needed, free = 4 * _PAIR_TENSORS * case.rows**2, _free_bytes()
    if (
        provider in ("eager", "compile", "pml")
        and kind == "cpu"
        and free is not None
        and needed > free
    ):
        return f"needs up to {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def _free_bytes() -> int | None:
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.is_file() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def difference(provider: str, loss: str) -> str | None:
    """Why a provider's results cannot be those of the definition, or None."""
    if provider == "ours":
        return None
    if LOSSES[loss].sampled:
        return "draws other negatives"
    if provider == "pml" and loss == "triplet-semihard":
        return "one triplet an anchor"
    return None
