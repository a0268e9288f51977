"""How far a build is: images and bytes that have been read of all that are to be read."""

from __future__ import annotations

from namr_dist.progress import Progress


class BuildProgress(Progress):
    """On stderr."""

    def __init__(self, name: str, *, images: int, size: int) -> None:
        """size: bytes."""
        self._images, self._done_images = images, 0
        super().__init__(name, size, self._said)

    def __enter__(self) -> BuildProgress:
        super().__enter__()
        return self

    def read(self, images: int, size: int) -> None:
        """So many more images of so many bytes together have been read."""
        self._done_images += images
        self.advance(size)

    def _said(self, size: int, rate: float) -> str:
        left = f"{(self._total - size) / rate:,.0f} s left" if rate else ""
        return f"{self._done_images:,}/{self._images:,} images  {rate / 2**20:.1f} MiB/s  {left}"
