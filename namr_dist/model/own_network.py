"""A network of a user's own as backbone: normalised images → pooled features.

NAME in module:NAME is called with those of the keywords `pretrained` (bool: start from its own
weights; False when a checkpoint is loaded) and `image_size` (H in pixels, as trained) that its
signature names. It returns an nn.Module that maps (b, 3, H, H) to (b, F). Attributes `mean` and
`std` of the module, three numbers each, say how pixels within 0..1 are normalised before; without
them it is done as for ImageNet.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from namr_dist import named_code
from namr_dist.errors import InputError


def own_network(name: str, *, pretrained: bool, image_size: int) -> nn.Module:
    """What module:NAME makes. Raises InputError if the name was not allowed (named_code.allow), or
    is none of the form above."""
    make: Any = named_code.load(name, use="model.backbone")
    if not callable(make):
        raise InputError(
            f"model.backbone {name} is no function ({type(make).__name__}); name one that makes an "
            "nn.Module"
        )
    known = {"pretrained": pretrained, "image_size": image_size}
    parameters = inspect.signature(make).parameters
    if strange := [
        one.name
        for one in parameters.values()
        if one.name not in known
        and one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]:
        raise InputError(
            f"model.backbone {name} wants {', '.join(strange)}, which nothing gives; let it take "
            "pretrained, image_size or neither"
        )
    with named_code.own_code(name, use="model.backbone"):
        network = make(**{word: value for word, value in known.items() if word in parameters})
    if not isinstance(network, nn.Module):
        raise InputError(
            f"model.backbone {name} makes no nn.Module ({type(network).__name__}); let it return one"
        )
    return network


def own_normalisation(
    network: nn.Module, name: str, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The network's own mean and std, or these. Raises InputError for anything but three numbers,
    std above 0."""
    return _three(network, "mean", mean, name), _three(network, "std", std, name)


def _three(
    network: nn.Module, attribute: str, default: tuple[float, ...], name: str
) -> tuple[float, ...]:
    value = getattr(network, attribute, default)
    try:
        numbers = tuple(float(number) for number in value)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor's row that is no number
        numbers = ()
    if len(numbers) != 3 or (attribute == "std" and min(numbers) <= 0):
        raise InputError(
            f"model.backbone {name} has {attribute} = {value!r}; give it three numbers, one a channel"
            + (" and above 0" if attribute == "std" else "")
        )
    return numbers
