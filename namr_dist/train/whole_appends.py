"""A file that grows by whole pieces, on a disk that may refuse some of them for a while."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class WholeAppends:
    """What does not fit is kept in memory and tried again with the next piece, in order; the file
    never holds a part of one. A piece is a line or two, so a whole run's would fit in memory."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; raises OSError if it cannot."""
        self.path = path
        # Unbuffered: what was refused must not be tried again, in part, when the file is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._size = self._file.seek(0, os.SEEK_END)
        self._pending = bytearray()
        self._torn = False

    @property
    def pending(self) -> bool:
        """Whether something is kept that the disk refused."""
        return bool(self._pending)

    def append(self, piece: bytes) -> None:
        """Write the piece after all that are kept. Raises OSError if the disk refuses, and then
        keeps it as well."""
        self._pending += piece
        self.flush()

    def flush(self) -> None:
        """Write what is kept, if anything is. Raises OSError if the disk still refuses."""
        rest = memoryview(bytes(self._pending))
        try:
            if self._torn:
                self._take_back()
            while rest:
                self._torn = True
                # A disk that is nearly full takes the beginning, and says so only by its count.
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._take_back()
            error.filename = str(self.path)
            raise
        self._torn = False
        self._size += len(self._pending)
        self._pending.clear()

    def sync(self) -> None:
        """Write what is kept, and wait until all is on disk. Raises OSError as `flush` does."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what is still kept is lost."""
        self._file.close()

    def _take_back(self) -> None:
        """Cut off what was written of a piece."""
        self._file.truncate(self._size)
        self._torn = False
