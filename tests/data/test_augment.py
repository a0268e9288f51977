"""Transforms, against Pillow's own where it has one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageEnhance

from namr_dist.data.augment import TestTransform, TrainTransform

PLAIN = TrainTransform(size=40, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, brightness=0.0,
                       contrast=0.0, saturation=0.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_without_randomness_it_is_a_resize() -> None:
    image = picture(3, 1)
    expected = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BICUBIC))
    assert (PLAIN(image, rng()) == expected).all()
    assert (TestTransform(size=40, crop_share=1.0)(image) == expected).all()


@pytest.mark.parametrize("seed", range(5))
def test_same_generator_same_image(seed: int) -> None:
    transform = TrainTransform(size=32, crop_scale=(0.2, 1.0), crop_ratio=(0.75, 1.33), flip=True, brightness=0.3,
                               contrast=0.3, saturation=0.3)
    first, second = transform(picture(1, 1), rng(seed)), transform(picture(1, 1), rng(seed))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (first == second).all()
    assert (first != transform(picture(1, 1), rng(seed + 100))).any()


@pytest.mark.parametrize(("field", "enhance"), [
    ("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)])
def test_jitter_is_what_pillow_calls_it(field: str, enhance: type) -> None:
    transform = dataclasses.replace(PLAIN, size=48, **{field: 0.4})
    image = np.clip(picture(2, 0), 60, 150)  # away from 0 and 255, where the two would clip differently
    factors = rng(3)
    factors.uniform(1, 1), factors.uniform(np.log(1), np.log(1)), factors.uniform(0, 0), factors.uniform(0, 0)
    drawn = dict(zip(("brightness", "contrast", "saturation"),
                     (factors.uniform(1 - (name == field) * 0.4, 1 + (name == field) * 0.4)
                      for name in ("brightness", "contrast", "saturation")), strict=True))[field]
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(drawn)).astype(int)
    assert abs(drawn - 1) > 0.01
    assert np.abs(transform(image, rng(3)).astype(int) - expected).max() <= 2


def test_half_are_mirrored() -> None:
    transform = dataclasses.replace(PLAIN, flip=True)
    image, plain = picture(4, 0), PLAIN(picture(4, 0), rng())
    mirrored = sum((transform(image, rng(seed)) == plain[:, ::-1]).all() for seed in range(200))
    assert 70 < mirrored < 130


def test_crops_keep_their_limits() -> None:
    transform = dataclasses.replace(PLAIN, crop_scale=(0.3, 0.5), crop_ratio=(0.5, 2.0))
    for seed in range(200):
        left, top, right, bottom = transform._crop_box(60, 90, rng(seed))
        assert 0 <= left < right <= 90 and 0 <= top < bottom <= 60
        assert 0.3 <= (right - left) * (bottom - top) / 5400 <= 0.5 + 1e-9
        assert 0.5 - 1e-9 <= (right - left) / (bottom - top) <= 2.0 + 1e-9


def test_no_crop_fits_a_very_long_image() -> None:
    transform = dataclasses.replace(PLAIN, crop_scale=(0.9, 1.0))
    assert transform._crop_box(10, 1000, rng()) == (495, 0, 505, 10)


def test_middle_square() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    middle = TestTransform(size=20, crop_share=1.0)(image)
    assert (middle[:, 2:-2] == 200).all(), "more than the middle was taken"  # bicubic blurs the outermost columns
    assert (middle[:, [0, -1]] > 150).all()
    assert (TestTransform(size=20, crop_share=0.5)(image) == 200).all()
