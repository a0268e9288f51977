"""Any PyTorch loss `(embeddings, labels) → scalar` on many ranks, by autograd over the rows of all
of them.

Shapes: b rows of this rank, B rows of all ranks, D width, W ranks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from namr_dist import named_code
from namr_dist.errors import InputError
from namr_dist.json_file import parse_json
from namr_dist.losses.registry import MetricLossConfig
from namr_dist.losses.rows import Batches, Rows, RowsLoss, with_gradients

Loss = Callable[[Tensor, Tensor], Tensor]
_USE = "loss.metric"


class PlainRows(RowsLoss):
    """A loss of (embeddings (B, D), labels (B,)), computed by every rank on the gathered rows of
    all.

    Each rank keeps the gradient of its own rows, so nothing is sent back; the loss's own parameters
    get a W-th of theirs from each rank. Embeddings are scaled to mean pairwise distance 1, in
    float32 or wider. Memory O(B·D) and what the loss takes, usually O(B²). What it draws at random
    depends on the seed, alike on all ranks.

    loss: an nn.Module, whose parameters train and are saved with the others, or any other callable.
    Parameters without dimensions get one, for DeepSpeed cannot broadcast them without.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss
        if isinstance(loss, nn.Module):
            for module in loss.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() == 0:
                        setattr(
                            module,
                            name,
                            nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad),
                        )

    @classmethod
    def configured(cls, settings: MetricLossConfig, batches: Batches) -> PlainRows:
        """The loss that settings.metric names as module:NAME, tried on a few rows on the CPU.

        NAME is a function, or a class whose constructor takes settings.options and, where it asks
        for them, num_classes and embedding_size. Raises InputError if it cannot be imported or
        made, and if it does not give a differentiable scalar.
        """
        made = cls(_make(named_code.load(settings.metric, use=_USE), settings, batches))
        _try(made, settings.metric, batches)
        return made

    def forward(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor]:
        """The batch's loss, carrying this rank's share of the gradient for the loss's own
        parameters, and its gradient for rows.z_bD. seed: of whatever the loss draws."""
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        devices = [rows.z_ND.device] if rows.z_ND.is_cuda else []
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed % 2**63)
            z_ND = rows.z_ND.detach().requires_grad_()
            value = self.definition(z_ND, rows.labels_N, seed=seed)
            leaves = (z_ND, *learnt)
            # A batch without any term, as a miner may leave one, has no gradient.
            gradients = (
                torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
                if value.requires_grad
                else [torch.zeros_like(leaf) for leaf in leaves]
            )
        grad_ND, *of_learnt = gradients
        loss = with_gradients(
            value.detach(),
            *(
                (parameter, gradient / rows.ranks)
                for parameter, gradient in zip(learnt, of_learnt, strict=True)
            ),
        )
        return loss, grad_ND[rows.offset : rows.offset + len(rows.z_bD)]

    def definition(self, x_BD: Tensor, labels_B: Tensor, *, seed: int) -> Tensor:
        """The loss itself, as a scalar. seed: not used; what it draws comes from torch's
        generators."""
        return self.loss(x_BD, labels_B).reshape(())


def _make(named: Any, settings: MetricLossConfig, batches: Batches) -> Loss:
    name = settings.metric
    options = _options(settings.options)
    try:
        parameters = inspect.signature(named).parameters
    except (TypeError, ValueError):
        raise InputError(
            f"{_USE} is {name}, which cannot be called; name a class or a function"
        ) from None
    facts = {"num_classes": batches.classes, "embedding_size": batches.width}
    options = {fact: value for fact, value in facts.items() if fact in parameters} | options
    if not isinstance(named, type):
        return partial(named, **options) if options else named
    try:
        loss = named(**options)
    except (Exception, SystemExit) as error:  # another's constructor may raise anything
        raise InputError(
            f"{_USE} is {name}, but {named.__name__} cannot be made with {options or 'no options'} "
            f"({type(error).__name__}: {error}); give its keywords by loss.options, a JSON object"
        ) from error
    if not callable(loss):
        raise InputError(
            f"{_USE} is {name}, whose instances cannot be called with (embeddings, labels)"
        )
    return loss


def _options(text: str) -> dict[str, Any]:
    options = parse_json(
        text or "{}",
        f"loss.options is {text!r}, which",
        'give an object, such as {"temperature": 0.1}',
    )
    if not isinstance(options, dict):
        raise InputError(
            f'loss.options is {text!r}; give a JSON object, such as {{"temperature": 0.1}}'
        )
    return options


def _try(made: PlainRows, name: str, batches: Batches) -> None:
    """Raise InputError if the loss does not serve, before hours of training. A copy is tried: it
    may count its calls."""
    classes = min(batches.classes, 4)
    labels_B = torch.arange(classes).repeat(2)
    with torch.enable_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        x_BD = torch.randn(2 * classes, batches.width).requires_grad_()
        try:
            value = copy.deepcopy(made.loss)(x_BD, labels_B)
        except (Exception, SystemExit) as error:  # another's loss may raise anything
            raise InputError(
                f"{_USE} is {name}, which fails on {2 * classes} embeddings of {batches.width} numbers "
                f"and their labels ({type(error).__name__}: {error})"
            ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{_USE} is {name}, which gives {shown} for (embeddings, labels); it should give a scalar, "
            "such as the mean over the batch"
        )
    if not value.requires_grad:
        raise InputError(
            f"{_USE} is {name}, whose value has no gradient for the embeddings; compute it by PyTorch "
            "functions of them"
        )
