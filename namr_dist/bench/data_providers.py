"""Ways from files to batches of uint8 images, each timed stage by stage while it runs as it is.

Every way passes one image at a time from stage to stage, so a lap clock suffices: what passed since
the last lap is added to the stage that ends. All draw the same kind of crop, flip and colour
jitter, and none normalises.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from namr_dist.config import DataConfig
from namr_dist.data.read.augment import TrainTransform, TrainView
from namr_dist.data.read.stream import Batch, ShardImages
from namr_dist.data.shardset.manifest import Manifest, SplitIndex

STAGES = ("read", "decode", "augment", "collate")


class LapClock:
    """Seconds of this thread on a core, by stage: what else runs on the machine adds little, and
    nothing is waited for once the files are in the page cache."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._last = time.thread_time()

    def lap(self, stage: str) -> None:
        """Add what passed since the last lap to the stage that ends here."""
        now = time.thread_time()
        self.seconds[stage] += now - self._last
        self._last = now


Provider = Callable[[LapClock], Iterator[int]]
"""One pass over the images: yields the number of images of each batch."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all ways have to do."""

    manifest: Manifest
    index: SplitIndex
    """The images; they are the first ones of the tars of one split."""
    batch: int
    size: int
    """Side of the finished images in pixels."""
    data: DataConfig
    """Crop, flip and jitter."""

    def transform(self) -> TrainTransform:
        """This package's training transform for the size."""
        return TrainTransform.configured(self.data, size=self.size)

    def urls(self) -> list[str]:
        """Paths of the tars that the images lie in, in the order of the manifest."""
        return [
            str(self.manifest.path(self.manifest.shards[number]))
            for number in np.unique(self.index.shard_N)
        ]


def namr(work: Work) -> Provider:
    """What a worker of this package's stream does, here and there in the tars."""
    order_N = np.random.default_rng(0).permutation(len(work.index)).tolist()

    def run(clock: LapClock) -> Iterator[int]:
        images = _LappedImages(work, clock)
        for first in range(0, len(order_N), work.batch):
            items = [(index, index) for index in order_N[first : first + work.batch]]
            batch = images.__getitems__(items)
            if not isinstance(batch, Batch):
                raise batch
            clock.lap("collate")
            yield len(items)

    return run


def plain_webdataset(work: Work) -> Provider:
    """WebDataset as its own pages show it, in the order of the tars, with this package's
    augmentation."""
    transform = work.transform()
    rng = np.random.default_rng(0)
    return _webdataset(work, lambda image: transform(np.asarray(image), rng))


def webdataset_torchvision(work: Work) -> Provider:
    """The same with torchvision's transforms on Pillow images."""
    return _webdataset(work, _torchvision_transform(work))


def image_folder(work: Work, folder: Path) -> Provider:
    """torchvision's ImageFolder behind a DataLoader without workers, of the same images as files in
    `folder`."""
    from torchvision.datasets import ImageFolder

    images = ShardImages(work.manifest, work.index, work.transform())
    for image, label in enumerate(work.index.label_N):
        path = folder / str(label) / f"{image:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(images.jpeg(image))
    transform = _torchvision_transform(work)

    def run(clock: LapClock) -> Iterator[int]:
        def load(path: str) -> Image.Image:
            jpeg = Path(path).read_bytes()
            clock.lap("read")
            image = Image.open(io.BytesIO(jpeg), formats=("JPEG",)).convert("RGB")
            clock.lap("decode")
            return image

        def augment(image: Image.Image) -> torch.Tensor:
            made = transform(image)
            clock.lap("augment")
            return made

        for pictures, _ in DataLoader(
            ImageFolder(str(folder), transform=augment, loader=load), work.batch
        ):
            clock.lap("collate")
            yield len(pictures)

    return run


def _webdataset(work: Work, transform: Callable[[Image.Image], Any]) -> Provider:
    def run(clock: LapClock) -> Iterator[int]:
        def after(stage: str) -> Callable[[Any], Any]:
            def passed(sample: Any) -> Any:
                clock.lap(stage)
                return sample

            return passed

        batches = (
            webdataset.WebDataset(work.urls(), shardshuffle=False)
            .slice(len(work.index))
            .map(after("read"))
            .decode("pil")
            .map(after("decode"))
            .map(lambda sample: (transform(sample["jpg"]), sample["json"]["label"]))
            .map(after("augment"))
            .batched(work.batch)
        )
        for pictures, _ in batches:
            clock.lap("collate")
            yield len(pictures)

    return run


def _torchvision_transform(work: Work) -> Callable[[Image.Image], torch.Tensor]:
    from torchvision import transforms

    data = work.data
    # Bytes: the usual floats would take longer.
    made: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                work.size, data.crop_scale, data.crop_ratio, transforms.InterpolationMode.BICUBIC
            ),
            *([transforms.RandomHorizontalFlip()] if data.flip else []),
            transforms.ColorJitter(data.brightness, data.contrast, data.saturation),
            transforms.PILToTensor(),
        ]
    )
    return made


class _LappedImages(ShardImages):
    """ShardImages that tells a clock when it has read, decoded and augmented an image."""

    def __init__(self, work: Work, clock: LapClock) -> None:
        super().__init__(
            work.manifest, work.index, _LappedTransform(**vars(work.transform()), clock=clock)
        )
        self._clock = clock

    def jpeg(self, position: int) -> bytes:
        jpeg = super().jpeg(position)
        self._clock.lap("read")
        return jpeg


@dataclass(frozen=True, kw_only=True)
class _LappedTransform(TrainTransform):
    clock: LapClock

    def view(self, height: int, width: int, rng: np.random.Generator) -> TrainView:
        view = super().view(height, width, rng)
        self.clock.lap("augment")
        return _LappedView(**vars(view), clock=self.clock)


@dataclass(frozen=True, kw_only=True)
class _LappedView(TrainView):
    clock: LapClock

    def render(self, image_HW3: np.ndarray, *, shrink: int = 1) -> np.ndarray:
        self.clock.lap("decode")
        picture = super().render(image_HW3, shrink=shrink)
        self.clock.lap("augment")
        return picture
