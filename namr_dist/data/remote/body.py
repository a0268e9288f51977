"""A file on its way, and the two ways in which that can fail: for now, and for good."""

from __future__ import annotations

from typing import Protocol

BLOCK_BYTES = 1 << 20
"""Most that is read at a time."""


class TransferError(Exception):
    """A try that failed and may be repeated."""

    def __init__(self, text: str, *, afresh: bool = False, wait_s: float = 0.0) -> None:
        """afresh: what has come so far is of no use.  wait_s: what the server asks to wait."""
        super().__init__(text)
        self.afresh = afresh
        self.wait_s = wait_s


class RefusedError(Exception):
    """An answer that another try would not change: cause; remedy."""


class Body(Protocol):
    """A file on its way."""

    start: int
    """First byte that comes; 0 where the source cannot begin in the middle."""
    total: int | None
    """Bytes of the whole file, where the source says so."""

    def read(self) -> bytes:
        """The next bytes; none at the end. Raises TransferError and RefusedError."""

    def close(self) -> None:
        """Let go of connection and processes."""
