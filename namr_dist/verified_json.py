"""JSON that carries the SHA-256 of its own bytes, as `sha256`, its first field.

The digest is taken with 64 zeros in its place. So a change of any byte is found, and every JSON
reader can read the file. A file without the field is read as it is: older versions and people write
those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from namr_dist.errors import DamagedFileError, InputError
from namr_dist.json_file import an_object, parse_json

_FIELD = "sha256"
_NO_DIGEST = "0" * 64
_BEGINNING = re.compile(rb'\{\s*"sha256": "([0-9a-f]{64})"')
_DIGEST_LIKE = re.compile(rb'"sha256"|[0-9a-f]{64}')
_BEGINNING_BYTES = 128
"""More than the first field takes."""


def dumps(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """An object as the text of a file. It must not have a field `sha256`."""
    assert _FIELD not in content
    text = json.dumps({_FIELD: _NO_DIGEST, **content}, indent=indent) + "\n"
    return text.replace(_NO_DIGEST, hashlib.sha256(text.encode()).hexdigest(), 1)


def verify(data: bytes) -> None:
    """Raise DamagedFileError if a file's bytes carry a digest, and it is not theirs."""
    beginning = data[:_BEGINNING_BYTES]
    if match := _BEGINNING.match(beginning):
        bare = data[: match.start(1)] + _NO_DIGEST.encode() + data[match.end(1) :]
        if hashlib.sha256(bare).hexdigest().encode() != match[1]:
            raise DamagedFileError("its SHA-256 is not the one it carries")
    elif _DIGEST_LIKE.search(beginning):
        # Either the field's name or its value is left of it: a file that never had it has neither.
        raise DamagedFileError("its first field, sha256, is damaged")


def loads(data: bytes, where: str, remedy: str) -> Any:
    """The value in a file's bytes, without the field `sha256`.

    Raises InputError, "`where` is damaged (why); `remedy`", if the digest is not that of the bytes,
    and as `parse_json` does.
    """
    try:
        verify(data)
    except DamagedFileError as error:
        raise InputError(f"{where} is damaged ({error}); {remedy}") from None
    value = parse_json(data, where, remedy)
    if isinstance(value, dict):
        value.pop(_FIELD, None)
    return value


def loads_object(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The same of a file that should hold an object with fields."""
    return an_object(loads(data, where, remedy), where, remedy)
