"""Bounds of settings, written beside the fields they bound: `rows: Annotated[int, at_least(0)] =
0`."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from namr_dist.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a number, or each number of a tuple, may be; NaN is out of all bounds, and None is no
    number."""

    least: float = float("-inf")
    most: float = float("inf")
    above: float = float("-inf")
    below: float = float("inf")
    words: str
    """Which numbers are allowed, and why, as it follows "set it"."""

    def hold(self, value: float) -> bool:
        """Whether the number lies within."""
        return bool(self.least <= value <= self.most and self.above < value < self.below)


def _text(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def at_least(least: float, why: str = "") -> Bounds:
    """why: goes on with the sentence, such as ", for a batch of one class has no negatives"."""
    return Bounds(least=least, words=f"to at least {_text(least)}{why}")


def between(least: float, most: float) -> Bounds:
    """Both included."""
    return Bounds(least=least, most=most, words=f"between {_text(least)} and {_text(most)}")


def strictly_between(above: float, below: float) -> Bounds:
    """Both excluded."""
    return Bounds(
        above=above, below=below, words=f"between {_text(above)} and {_text(below)}, both excluded"
    )


def above_up_to(above: float, most: float) -> Bounds:
    """The first excluded, the second included."""
    return Bounds(above=above, most=most, words=f"above {_text(above)} and at most {_text(most)}")


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Raise InputError for the first field of a dataclass, or of the dataclasses in it, that is out
    of its bounds.

    prefix: what comes before a field's name in the message, such as "loss.".
    """
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{name}.")
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        for bounds in getattr(hints[field.name], "__metadata__", ()):
            for number in numbers:
                if isinstance(bounds, Bounds) and not bounds.hold(number):
                    raise InputError(f"{name} is {number}; set it {bounds.words}")
