"""Where DeepSpeed keeps a parameter and its AdamW moments, for every ZeRO stage: whole tensors in
and out.

Each rank holds a fragment of a parameter's moments, inside a flat tensor that the optimizer sees as
its parameter: stage 0, the parameter itself; stages 1 and 2, the rank's slice of a parameter
group's concatenation; stage 3, the rank's slice of every parameter, concatenated. DeepSpeed's own
access (deepspeed.utils.safe_get_full_…) knows no stage 0, nothing before the first step, and loses
the sign of zeros.

All ranks must make each call together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class _Fragment:
    """This rank's part of one parameter: elements `start` on of the parameter, `offset` on of the
    flat `owner`."""

    owner: Tensor
    offset: int
    start: int
    count: int


def _fragment(engine: DeepSpeedEngine, parameter: nn.Parameter) -> _Fragment | None:
    """None for a parameter that is not optimized."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if not parameter.requires_grad:
        return None
    if stage == 0:
        return _Fragment(owner=parameter, offset=0, start=0, count=parameter.numel())
    if stage == 3:
        position = zero.grad_position.get(zero.get_param_id(parameter))
        if position is None:
            return None
        group, offset, count = position
        return _Fragment(
            owner=zero.fp32_partitioned_groups_flat[group],
            offset=offset,
            start=dist.get_rank() * count,
            count=count,
        )
    groups = [
        number
        for number, members in enumerate(zero.bit16_groups)
        if any(member is parameter for member in members)
    ]
    if not groups:
        return None
    owner = zero.single_partition_of_fp32_groups[groups[0]]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
    if mapping is None:  # all of it is on other ranks
        return _Fragment(owner=owner, offset=0, start=0, count=0)
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _Fragment(owner=owner, offset=here.start, start=there.start, count=here.numel)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has put it away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def get_value(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor:
    """The whole parameter, copied to the CPU."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        [parameter], enabled=engine.zero_optimization_stage() == 3
    ):
        return parameter.detach().to("cpu", copy=True)


@torch.no_grad()
def set_value(engine: DeepSpeedEngine, parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite the parameter, and the optimizer's copy of it, by `value`: the same on all
    ranks."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0, enabled=engine.zero_optimization_stage() == 3
    ):
        parameter.copy_(value)
    fragment = _fragment(engine, parameter)
    if fragment is not None:
        _cut(fragment.owner, fragment).copy_(_part(value, fragment))


def optimizer_step(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor | None:
    """How often AdamW has updated the parameter, fp32 (); None if it never has. No message is
    sent."""
    fragment = _fragment(engine, parameter)
    state = engine.basic_optimizer.state.get(fragment.owner) if fragment is not None else None
    return state["step"].detach().to("cpu", torch.float32, copy=True) if state else None


def own_value(engine: DeepSpeedEngine, parameter: nn.Parameter) -> tuple[int, Tensor]:
    """This rank's elements of the parameter, on the device: where they begin, and their values,
    flat; without ZeRO-3 the whole parameter. No message is sent."""
    if engine.zero_optimization_stage() != 3:
        return 0, parameter.detach()
    slice_ = parameter.ds_tensor.detach()  # type: ignore[attr-defined]  # DeepSpeed's
    start = dist.get_rank() * slice_.numel()
    # The last slices may be padding.
    return start, slice_[: max(0, torch.Size(full_shape(parameter)).numel() - start)]


def own_moment(engine: DeepSpeedEngine, parameter: nn.Parameter, key: str) -> tuple[int, Tensor]:
    """The same of one of MOMENTS, fp32, which is whole only with ZeRO-0."""
    fragment = _fragment(engine, parameter)
    assert fragment is not None
    moment = engine.basic_optimizer.state[fragment.owner][key]
    assert moment.dtype == torch.float32
    if engine.zero_optimization_stage() == 0:
        return 0, moment.detach()
    count = torch.Size(full_shape(parameter)).numel() - fragment.start
    return fragment.start, _cut(moment, fragment)[: max(0, count)]


def set_moments(
    engine: DeepSpeedEngine, parameter: nn.Parameter, moments: dict[str, Tensor], step: Tensor
) -> None:
    """Overwrite what AdamW knows of a parameter: `moments` by the names of MOMENTS, the same on all
    ranks."""
    fragment = _fragment(engine, parameter)
    assert fragment is not None
    state = engine.basic_optimizer.state[fragment.owner]
    if not state:  # torch makes it in the first step
        defaults = engine.basic_optimizer.defaults
        on_device = defaults.get("fused") or defaults.get("capturable")
        state["step"] = torch.zeros((), device=fragment.owner.device if on_device else "cpu")
        for key in MOMENTS:
            state[key] = torch.zeros_like(fragment.owner, requires_grad=False)
    # Parameters that share a flat tensor share its count; one that stage 0 never updated has none
    # of its own.
    state["step"].fill_(max(float(state["step"]), float(step)))
    for key in MOMENTS:
        _cut(state[key], fragment).copy_(_part(moments[key], fragment))


def _cut(flat: Tensor, fragment: _Fragment) -> Tensor:
    """The fragment's place in a tensor that is laid out as its owner."""
    # Stage 0: a whole parameter, which may lie in memory in any order.
    if fragment.owner.dim() != 1:
        return flat.detach()
    return flat.detach().narrow(0, fragment.offset, fragment.count)


def _part(value: Tensor, fragment: _Fragment) -> Tensor:
    """The fragment's elements of a whole tensor, with zeros where the fragment is padding."""
    if fragment.owner.dim() != 1:
        return value
    part = value.reshape(-1)[fragment.start : fragment.start + fragment.count]
    return torch.nn.functional.pad(part, (0, fragment.count - part.numel()))
