"""Batch norm over the global batch, on any device.

torch's SyncBatchNorm is for GPUs alone and each rank's own statistics would make the result depend
on how the batch was cut. Here W processes and one process give the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from namr_dist.errors import InputError
from namr_dist.parallel.gather import sum_ranks
from namr_dist.parallel.ranks import world_size


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of (b, C) or (b, C, H, W) with the mean and variance of all ranks' rows while
    training.

    Parameters, buffers and evaluation are those of torch.nn.BatchNorm1d/2d. Ranks may hold
    different numbers of rows. Source: Ioffe and Szegedy, 2015; the variance is taken around the
    global mean, in two passes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"expected (b, C) or (b, C, H, W), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """The rows normalised, of the shape and dtype that came in. In training all ranks call it
        together."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        over = [axis for axis in range(input.dim()) if axis != 1]
        column = [1, -1] + [1] * (input.dim() - 2)
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        rows = sum_ranks(values.new_tensor([values.numel() / values.shape[1]])).detach()
        mean_C = sum_ranks(values.sum(over)) / rows
        centred = values - mean_C.view(column)
        var_C = sum_ranks(centred.square().sum(over)) / rows
        self._update_running(mean_C.detach(), var_C.detach(), rows)
        normal = centred * torch.rsqrt(var_C + self.eps).view(column)
        return (normal * self.weight.view(column) + self.bias.view(column)).to(input.dtype)

    def _update_running(self, mean_C: Tensor, var_C: Tensor, rows: Tensor) -> None:
        assert (
            self.running_mean is not None
            and self.running_var is not None
            and self.momentum is not None
        )
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
        unbiased_C = var_C * (rows / (rows - 1))
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), self.momentum)


def use_global_batchnorm(module: nn.Module) -> None:
    """Replace every batch norm inside `module` by a GlobalBatchNorm with the same state.

    timm's layers that join a batch norm, a drop and an activation become a sequence of the three.
    Raises InputError for another kind of batch norm, whose extra work would be lost.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm) or isinstance(
                child, GlobalBatchNorm
            ):
                continue
            made = GlobalBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            made.load_state_dict(child.state_dict())
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                replaced: nn.Module = made
            elif isinstance(drop := getattr(child, "drop", None), nn.Module) and isinstance(
                child.act, nn.Module
            ):
                replaced = nn.Sequential(made, drop, child.act)
            else:
                raise InputError(
                    f"the backbone has a batch norm of type {type(child).__name__}, which cannot take "
                    "the global batch's statistics; set model.batchnorm to frozen"
                )
            setattr(parent, name, replaced.train(child.training))
