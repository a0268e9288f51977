"""Image files of a folder, for embedding a user's own pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from namr_dist.data.build.formats.lists import ENDINGS
from namr_dist.data.build.normalise import BrokenImageError, viewed_rgb
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import Batch, ImageSource
from namr_dist.errors import InputError, ReportedError, TransientError, is_transient


class FolderImages(ImageSource):
    """All image files below a folder, ordered by path. Labels are −1.

    `names` are paths relative to the folder. Raises InputError if there is no folder or no image in
    it.
    """

    def __init__(self, folder: Path, transform: TestTransform) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; give one with image files")
        self._folder = folder
        self._transform = transform
        self.side = transform.size
        self.names = tuple(
            sorted(
                str(path.relative_to(folder))
                for path in folder.rglob("*")
                if path.suffix.lower() in ENDINGS and path.is_file()
            )
        )
        if not self.names:
            raise InputError(f"{folder} holds no image ({', '.join(ENDINGS)})")

    def __len__(self) -> int:
        return len(self.names)

    def files(self, positions: Iterable[int]) -> list[str]:
        """The image files themselves, with the folder before their names."""
        return sorted({str(self._folder / self.names[position]) for position in positions})

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | ReportedError:
        positions = [position for position, _ in items]
        try:
            images = np.stack(
                [self._image(self._folder / self.names[position]) for position in positions]
            )
        except ReportedError as error:
            return error
        return Batch(
            images_bHW3=torch.from_numpy(images),
            labels_b=torch.full((len(positions),), -1),
            index_b=torch.tensor(positions),
        )

    def _image(self, path: Path) -> np.ndarray:
        try:
            return self._transform(viewed_rgb(path.read_bytes(), least=self.side))
        except BrokenImageError as error:
            raise InputError(f"{path} cannot be decoded ({error}); repair or remove it") from None
        except OSError as error:
            kind = TransientError if is_transient(error) else InputError
            raise kind(f"{path} cannot be read ({error.strerror}); repair or remove it") from None
