"""Image transforms on uint8 RGB arrays (H, W, 3), in two steps: draw what is to be seen, then make
it.

A `View` holds every random choice of one image and depends on the image's size alone, so it is
known before the image is decoded, and the decoder can leave out what would not be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from namr_dist.config import DataConfig
from namr_dist.data.picture import cut, middle_square

# ITU-R BT.601 luma weights, as JPEG and Pillow use them.
_LUMA = np.array([0.299, 0.587, 0.114])

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One square picture of an image."""

    size: int
    """Pixels of a side."""
    box: Box
    """The part of the whole image that is seen."""

    @property
    def shrink(self) -> int:
        """Most of 1, 2, 4 and 8 by which the image may be shrunk before, with `size` pixels or more
        left of the box.

        Powers of two alone: for shares such as 7/8, a JPEG decoder takes longer than for the whole
        image.
        """
        left, top, right, bottom = self.box
        return max(
            [
                1,
                *(
                    factor
                    for factor in (2, 4, 8)
                    if factor * self.size <= min(right - left, bottom - top)
                ),
            ]
        )

    def render(self, image_HW3: np.ndarray, *, shrink: int = 1) -> np.ndarray:
        """The picture, uint8 (size, size, 3), of an image whose sides were divided by `shrink`.

        By Pillow's bicubic, which a user of a trained network has, too.
        """
        left, top, right, bottom = self.box
        box = (left / shrink, top / shrink, right / shrink, bottom / shrink)
        return cut(Image.fromarray(image_HW3), box, self.size)


@dataclass(frozen=True, kw_only=True)
class TrainView(View):
    """One that is mirrored or coloured as well."""

    mirrored: bool
    brightness: float
    contrast: float
    saturation: float
    """Factors as in Pillow's ImageEnhance; 1 changes nothing."""

    def render(self, image_HW3: np.ndarray, *, shrink: int = 1) -> np.ndarray:
        """As View's, with the box rounded to whole pixels and torch's antialiased bicubic, which
        takes a third of Pillow's time and differs from it by a level or two."""
        height, width, _ = image_HW3.shape
        left, right = _whole_pixels(self.box[0] / shrink, self.box[2] / shrink, width)
        top, bottom = _whole_pixels(self.box[1] / shrink, self.box[3] / shrink, height)
        part_hw3 = torch.from_numpy(image_HW3[top:bottom, left:right].copy())
        picture_3SS = interpolate(
            part_hw3.permute(2, 0, 1)[None], (self.size, self.size), mode="bicubic", antialias=True
        )[0]
        picture_3SS = self._jittered(picture_3SS)
        # Stacked, not transposed: that takes a third of the time (tools/resize_time.py).
        return torch.stack(
            tuple(picture_3SS.flip(2) if self.mirrored else picture_3SS), dim=-1
        ).numpy()

    def _jittered(self, picture_3SS: Tensor) -> Tensor:
        if self.brightness == self.contrast == self.saturation == 1:
            return picture_3SS
        # Saturation blends with the grey image, contrast with its mean, brightness scales: together
        # a colour becomes colour × own + grey × shared + offset. In whole numbers of 1/65536, so
        # that no vector width shows.
        own = self.saturation * self.contrast * self.brightness
        shared = (1 - self.saturation) * self.contrast * self.brightness
        colour_3SS = picture_3SS.to(torch.int32)
        mean_grey = float(colour_3SS.sum((1, 2)).numpy() @ _LUMA) / self.size**2
        offset = (1 - self.contrast) * mean_grey * self.brightness
        red_SS, green_SS, blue_SS = colour_3SS
        grey_SS = red_SS * 77 + green_SS * 150 + blue_SS * 29  # _LUMA in 1/256
        # A half, to round to the nearest.
        grey_SS.mul_(round(shared * 256)).add_(round(offset * 65536) + 32768)
        return (
            colour_3SS.mul_(round(own * 65536))
            .add_(grey_SS)
            .bitwise_right_shift_(16)
            .clamp_(0, 255)
            .to(torch.uint8)
        )


def _whole_pixels(low: float, high: float, size: int) -> tuple[int, int]:
    """The nearest whole pixels of an image of `size`, one at least."""
    first = min(round(low), size - 1)
    return first, min(max(round(high), first + 1), size)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random resized crop, horizontal flip, colour jitter."""

    size: int
    """Side of the square result in pixels."""
    crop_scale: tuple[float, float]
    """Share of the image's area that a crop covers, least and most."""
    crop_ratio: tuple[float, float]
    """Width over height of a crop, least and most."""
    flip: bool
    brightness: float
    contrast: float
    saturation: float
    """Each factor is drawn from 1 ± this value; 0 leaves it out."""

    @classmethod
    def configured(cls, data: DataConfig, *, size: int) -> TrainTransform:
        """What a configuration asks for, at any size."""
        return cls(
            size=size,
            crop_scale=data.crop_scale,
            crop_ratio=data.crop_ratio,
            flip=data.flip,
            brightness=data.brightness,
            contrast=data.contrast,
            saturation=data.saturation,
        )

    def __call__(self, image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 (size, size, 3)."""
        height, width, _ = image_HW3.shape
        return self.view(height, width, rng).render(image_HW3)

    def view(self, height: int, width: int, rng: np.random.Generator) -> TrainView:
        """Draw a view of an image of so many pixels."""
        # Arguments are drawn in the order they stand in: another order would be other images from
        # the same seed.
        return TrainView(
            size=self.size,
            box=self._crop_box(height, width, rng),
            mirrored=self.flip and rng.random() < 0.5,
            brightness=rng.uniform(1 - self.brightness, 1 + self.brightness),
            contrast=rng.uniform(1 - self.contrast, 1 + self.contrast),
            saturation=rng.uniform(1 - self.saturation, 1 + self.saturation),
        )

    def _crop_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for _ in range(10):
            area = height * width * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(low, high))
            crop_w, crop_h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if crop_w <= width and crop_h <= height:
                left, top = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
                return left, top, left + crop_w, top + crop_h
        # A very long image may refuse every draw: its middle square is always possible.
        return middle_square(width, height, min(width, height))


@dataclass(frozen=True, kw_only=True)
class TestTransform:
    """Shorter side to size / crop_share, then the middle square. No randomness."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    size: int
    crop_share: float
    """Share of the shorter side that is kept; 1 keeps all of it."""

    def __call__(self, image_HW3: np.ndarray) -> np.ndarray:
        """Returns uint8 (size, size, 3)."""
        height, width, _ = image_HW3.shape
        return self.view(height, width).render(image_HW3)

    def view(self, height: int, width: int) -> View:
        """The view of an image of so many pixels."""
        return View(
            size=self.size, box=middle_square(width, height, min(width, height) * self.crop_share)
        )
