"""Parsed JSON → frozen dataclasses, by their annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

from namr_dist.errors import InputError


def from_object(kind: Any, value: Any, where: str) -> Any:
    """A parsed JSON value as an instance of the annotated type, dataclasses within dataclasses.

    Raises InputError, naming `where`, for unknown or missing fields and wrong types.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where} should be an object with fields, not {value!r}")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()):
            raise InputError(
                f"{where} has the unknown field {unknown[0]!r}: it was written by another version"
            )
        try:
            return kind(
                **{
                    name: from_object(hints[name], entry, f"{where}: {name}")
                    for name, entry in value.items()
                }
            )
        except TypeError as error:
            raise InputError(f"{where} is incomplete: {error}") from None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_object(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {value!r}, not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} is {value!r}, expected a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise InputError(f"{where} is {value!r}, expected {len(arguments)} values")
        return tuple(from_object(arguments[0], entry, where) for entry in value)
    if kind is float and type(value) is int:
        return float(value)
    wanted = str if kind is Path else kind
    # A bool is an int to Python, and true is no number of steps.
    if not isinstance(value, wanted) or (type(value) is bool and kind is not bool):
        raise InputError(f"{where} is {value!r}, expected a {wanted.__name__}")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{where} is {value!r}, which holds a NUL character")
    return Path(value) if kind is Path else value
