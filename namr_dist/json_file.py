"""JSON that others may have written: parsed within bounds, or a clear error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from namr_dist.errors import InputError

MOST_DEPTH = 64
"""Lists and objects within each other; none of our files has ten. What walks a value may recurse:
Python's own limit lies higher, and its parser's higher still."""
_MOST_DIGITS = 40
"""Of an integer: more than any of ours has, and few enough for it to be a float as well."""
_MANY_DIGITS = re.compile(rf"\d{{{_MOST_DIGITS + 1}}}")
MOST_MEMORY = 4 << 30
"""Bytes that a value may take while it is read, by an estimate from the text's punctuation."""
_SMALL = 1 << 20
"""Bytes of a text that is not worth an estimate."""
_STRING = re.compile(r'"[^"]*"')
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(
    text: str | bytes,
    where: str,
    remedy: str,
    *,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """The value that a JSON text in UTF-8 holds.

    object_hook: as `json.loads` has it.
    Raises InputError, "`where` is not JSON (why); `remedy`", also for a value that would take more
    than MOST_MEMORY, or hardly holds anything but lists and objects, for more than MOST_DEPTH lists
    and objects within each other, for an integer of more than 40 digits, and for a text with half
    of a surrogate pair that stands for no byte of a file name.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if len(text) > _SMALL:
            _check_memory(text)
        value = json.loads(
            text, object_hook=object_hook, parse_int=_integer if _MANY_DIGITS.search(text) else None
        )
        _check(value, texts=_HALF_CHARACTER.search(text) is not None)
    except UnicodeEncodeError:
        raise InputError(f"{where} is not JSON (it holds half a character); {remedy}") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); {remedy}") from None
    except RecursionError:
        raise InputError(f"{where} is not JSON ({_too_deep()}); {remedy}") from None
    return value


def json_object(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """The same of a text that should hold an object with fields."""
    return an_object(parse_json(text, where, remedy), where, remedy)


def an_object(value: Any, where: str, remedy: str) -> dict[str, Any]:
    """`value`, or an InputError if it is no object with fields."""
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a {type(value).__name__}, not an object; {remedy}")
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _too_deep() -> str:
    return f"more than {MOST_DEPTH} lists and objects lie within each other"


def _check_memory(text: str) -> None:
    """Raise ValueError for a text that costs far more memory than it has bytes.

    What CPython takes, about: 72 bytes for a list, 232 for an object with fields, 64 for a short
    string, 48 for a number and a place in a list. Characters within strings are counted too, for
    an estimate may be too high.
    """
    lists, objects = text.count("["), text.count("{")
    values = text.count(",") + text.count(":")
    memory = (
        len(text) * (1 if text.isascii() else 4)
        + 72 * lists
        + 232 * objects
        + 32 * text.count('"')
        + 48 * values
    )
    if memory > MOST_MEMORY:
        raise ValueError(
            f"to read it would take about {memory / 2**30:.1f} GiB, more than "
            f"{MOST_MEMORY / 2**30:g} GiB"
        )
    # Three bytes make an empty list of 80. A shard of one image has five lists to ten values.
    if lists + objects > 0.6 * values:
        lists += objects
        for string in _STRING.finditer(text.replace(r"\\", "").replace(r"\"", "")):
            lists -= string[0].count("[") + string[0].count("{")
            values -= string[0].count(",") + string[0].count(":")
        if lists > 0.6 * values:
            raise ValueError(f"it holds {lists:,} lists and objects and hardly anything else")


def _check(value: Any, *, texts: bool) -> None:
    """Level by level, without recursion. Raises ValueError for too many levels, UnicodeEncodeError
    for half a character where `texts` are to be looked at."""
    level = [value]
    for depth in range(MOST_DEPTH + 1):
        if depth == MOST_DEPTH and any(isinstance(entry, (dict, list)) for entry in level):
            raise ValueError(_too_deep())
        if texts:
            for entry in level:
                if isinstance(entry, str):
                    entry.encode(errors="surrogateescape")
                elif isinstance(entry, dict):
                    "".join(entry).encode(errors="surrogateescape")
        level = [
            child
            for entry in level
            if isinstance(entry, (dict, list))
            for child in (entry.values() if isinstance(entry, dict) else entry)
            if texts or isinstance(child, (dict, list))
        ]
        if not level:
            return
