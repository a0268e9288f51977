"""Image transforms on uint8 RGB arrays (H, W, 3). Every random choice comes from the generator passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

# ITU-R BT.601 luma weights, as JPEG and Pillow use them.
_LUMA = np.array([0.299, 0.587, 0.114])


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

    def __call__(self, image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 (size, size, 3)."""
        height, width, _ = image_HW3.shape
        box = self._crop_box(height, width, rng)
        image = Image.fromarray(image_HW3).resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(self._jitter(image, rng))

    def _crop_box(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for _ in range(10):
            area = height * width * rng.uniform(*self.crop_scale)
            ratio = math.exp(rng.uniform(low, high))
            crop_w, crop_h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if crop_w <= width and crop_h <= height:
                left, top = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
                return left, top, left + crop_w, top + crop_h
        # A very long image may refuse every draw: its middle square is always possible.
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def _jitter(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        bright, contrast, saturation = (rng.uniform(1 - amount, 1 + amount)
                                        for amount in (self.brightness, self.contrast, self.saturation))
        if bright == contrast == saturation == 1:
            return image
        # Saturation blends with the grey image, contrast with its mean, brightness scales: all are affine in the
        # colour, so one 3×4 matrix does the three in one pass.
        matrix = np.zeros((3, 4))
        matrix[:, :3] = saturation * np.eye(3) + (1 - saturation) * _LUMA
        mean_grey = float(np.asarray(image).reshape(-1, 3).mean(0) @ _LUMA)
        matrix[:, :3] *= contrast * bright
        matrix[:, 3] = (1 - contrast) * mean_grey * bright
        return image.convert("RGB", tuple(matrix.reshape(-1)))


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
        side = min(height, width) * self.crop_share
        left, top = (width - side) / 2, (height - side) / 2
        image = Image.fromarray(image_HW3).resize((self.size, self.size), Image.Resampling.BICUBIC,
                                                  box=(left, top, left + side, top + side))
        return np.asarray(image)
