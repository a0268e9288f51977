"""JSON that carries its own hash: other readers read it, and no changed bit goes unseen."""

from __future__ import annotations

import hashlib
import json

import pytest

from namr_dist import verified_json
from namr_dist.errors import InputError

CONTENT = {"test": {"sample": {"R@1": 61.25}}, "name": "é", "hash": "0" * 64, "none": None}


def _loads(data: bytes) -> object:
    return verified_json.loads(data, "metrics.json", "evaluate again")


@pytest.mark.parametrize("indent", [None, 2])
def test_every_flipped_bit_is_found(indent: int | None) -> None:
    data = verified_json.dumps(CONTENT, indent=indent).encode()
    assert _loads(data) == CONTENT
    sha256 = json.loads(data).pop("sha256")
    assert json.loads(data) == {"sha256": sha256, **CONTENT}
    bare = data.replace(sha256.encode(), b"0" * 64)
    assert hashlib.sha256(bare).hexdigest() == sha256
    for position in range(len(data)):
        for bit in range(8):
            flipped = data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
            with pytest.raises(InputError, match=r"(?s)^metrics\.json is .*; evaluate again$"):
                _loads(flipped)
    for changed in (data[:-1], data + b" ", data.replace(b"61.25", b"62.25")):
        with pytest.raises(InputError, match="SHA-256 is not the one it carries"):
            _loads(changed)


def test_what_carries_no_hash_is_read() -> None:
    for value in (CONTENT, [1, 2], "text", {}):
        assert _loads(json.dumps(value, indent=2).encode()) == value
