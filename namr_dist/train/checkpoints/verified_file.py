"""A safetensors file that carries the SHA-256 of all its own bytes, written tensor by tensor.

The header begins with the digest, and the digest is taken with 64 zeros in its place. So one file
is enough, one rename makes it visible, and a change of any byte is found. Every safetensors reader
can open it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from namr_dist.atomic import flush
from namr_dist.errors import DamagedFileError
from namr_dist.text import say

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
_BEFORE_DIGEST = b'{"__metadata__":{"sha256":"'
_NO_DIGEST = b"0" * 64
_DIGEST_AT = _LENGTH_BYTES + len(_BEFORE_DIGEST)
_HEX_DIGITS = frozenset(b"0123456789abcdef")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a header says of a tensor before its values are known."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Of a tensor that is at hand."""
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape))

    @classmethod
    def all_in(cls, file: safetensors.safe_open) -> dict[str, TensorSpec]:
        """Of an open file, by name; no tensor is read."""
        dtypes = {name: dtype for dtype, name in DTYPES.items()}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {
            name: cls(dtype=dtypes[part.get_dtype()], shape=tuple(part.get_shape()))
            for name, part in slices.items()
        }

    @property
    def bytes(self) -> int:
        """Size of the tensor's values in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class VerifiedFileWriter:
    """Writes one file under a temporary name; only `commit` makes it visible, and only once it has
    been verified.

    layout: all tensors by name, in the order in which `add` will bring them, widest dtype first
    (readers map tensors in place, where an int64 must not begin at an odd multiple of four).
    Methods raise OSError where the disk does; then call `discard`.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, str], layout: Mapping[str, TensorSpec]
    ) -> None:
        widths = [spec.dtype.itemsize for spec in layout.values()]
        assert widths == sorted(widths, reverse=True)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        self._awaited = list(layout.items())[::-1]
        header = _header(metadata, layout)
        self._sha256 = hashlib.sha256(header)
        # Unbuffered: after an error, closing has nothing left to try once more.
        self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115 (closed in commit and discard)
        try:
            self._write(memoryview(header))
        except OSError:
            self.discard()
            raise

    def add(self, tensor: Tensor) -> None:
        """Append the layout's next tensor, from the CPU."""
        name, spec = self._awaited.pop()
        assert TensorSpec.of(tensor) == spec, (
            f"{name} is {TensorSpec.of(tensor)}, announced as {spec}"
        )
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._sha256.update(values)
        self._write(values)

    def commit(self) -> str:
        """Store the digest, flush to disk, read back, compare, and rename over `path`; returns the
        digest that the file carries."""
        assert not self._awaited, f"{self._awaited[-1][0]} was announced and never written"
        self._file.seek(_DIGEST_AT)
        self._write(memoryview(self._sha256.hexdigest().encode()))
        os.fsync(self._file.fileno())
        # What is read back then comes from the disk, as far as the system lets us choose.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        try:
            verify_file(self._temporary)
        except DamagedFileError as error:
            raise OSError(
                None, f"read back differs from what was written ({error})", str(self._path)
            ) from None
        os.replace(self._temporary, self._path)
        flush(self._path.parent)
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Remove what was written so far; nothing, after a commit. What cannot be removed goes at
        the next start."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _write(self, values: memoryview) -> None:
        while values:  # the system may take fewer bytes than it is given
            values = values[self._file.write(values) :]


def _header(metadata: Mapping[str, str], layout: Mapping[str, TensorSpec]) -> bytes:
    """Length and header, with zeros for the digest and the tensors behind it aligned to 8 bytes."""
    assert "sha256" not in metadata and "__metadata__" not in layout
    entries: dict[str, object] = {"__metadata__": {"sha256": _NO_DIGEST.decode(), **metadata}}
    offset = 0
    for name, spec in layout.items():
        entries[name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    assert text.startswith(_BEFORE_DIGEST + _NO_DIGEST)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Replace `path` by one verified file of tensors that are at hand, from any device; returns the
    digest that it carries.

    Raises OSError, naming `path`, where the disk refuses; what was there then still stands.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    layout = {name: TensorSpec.of(value) for name, value in ordered.items()}
    try:
        writer = VerifiedFileWriter(path, metadata, layout)
        try:
            for value in ordered.values():
                writer.add(value.cpu())
            return writer.commit()
        finally:
            writer.discard()
    except OSError as error:
        # The file the caller knows, not the temporary one, or none at all.
        error.filename = str(path)
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, each byte of it verified.

    A file that carries no hash, as older versions wrote them, is read as well, after a line on
    stderr. Raises DamagedFileError for what is not whole or no safetensors file, OSError where the
    disk does.
    """
    if not verify_file(path, required=False):
        say(f"WARNING: {no_hash(path)}", file=sys.stderr)
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"it is not a whole safetensors file: {error}") from None


def no_hash(path: Path) -> str:
    """What is said of a file that is read without being verified."""
    return (
        f"{path} carries no SHA-256 of itself, as files of older versions do not: it is read, but damage to "
        "it would not be seen"
    )


def verify_file(path: Path, *, required: bool = True) -> str | None:
    """Read every byte; the digest that the file carries, in hexadecimal, and thus is known to be
    whole by; None for one that carries none.

    Raises DamagedFileError if it is not whole, or carries none although one is `required`.
    """
    with open(path, "rb") as file:
        start = file.read(_DIGEST_AT)
        told = file.read(len(_NO_DIGEST))
        begins_as_ours = start[_LENGTH_BYTES:] == _BEFORE_DIGEST
        has_digest = len(told) == len(_NO_DIGEST) and _HEX_DIGITS.issuperset(told)
        # With one of the two left, the other has been damaged: such a file did carry a digest.
        if not begins_as_ours and not has_digest and not required:
            return None
        if not begins_as_ours or len(told) < len(_NO_DIGEST):
            raise DamagedFileError("it has no SHA-256 of itself")
        sha256 = hashlib.sha256(start + _NO_DIGEST)
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
    if sha256.hexdigest().encode() != told:
        raise DamagedFileError("its SHA-256 is not the one it carries")
    return sha256.hexdigest()
