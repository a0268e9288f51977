"""Transforms, against Pillow's own where it has one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import simplejpeg
from conftest import picture
from PIL import Image, ImageEnhance

from namr_dist.data.read.augment import TestTransform, TrainTransform, TrainView, View
from namr_dist.data.shardset.shards import decode_rgb

PLAIN = TrainTransform(
    size=40,
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    flip=False,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_without_randomness_it_is_a_resize() -> None:
    """Pillow's bicubic, but for rounding between its two passes."""
    for image in (picture(3, 1), large_picture()[:400, :400]):
        expected = np.asarray(
            Image.fromarray(image).resize((40, 40), Image.Resampling.BICUBIC)
        ).astype(int)
        made = PLAIN(image, rng())
        assert np.abs(made - expected).max() <= 2 and (made != expected).mean() < 0.05
        assert (TestTransform(size=40, crop_share=1.0)(image) == expected).all()


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((3, 900), (448.5, 0, 451.5, 3)),
        ((50, 60), (59.8, 0.2, 60, 0.4)),
        ((7, 5), (0.4, 0.4, 4.6, 6.6)),
    ],
)
def test_a_box_has_one_whole_pixel_at_least(
    shape: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    image = np.full((*shape, 3), 90, np.uint8)
    for shrink in (1, 2, 8):
        small = image[::shrink, ::shrink]
        view = TrainView(
            size=12, box=box, mirrored=False, brightness=1.0, contrast=1.0, saturation=1.0
        )
        assert (view.render(small, shrink=shrink) == 90).all()


@pytest.mark.parametrize("seed", range(5))
def test_same_generator_same_image(seed: int) -> None:
    transform = TrainTransform(
        size=32,
        crop_scale=(0.2, 1.0),
        crop_ratio=(0.75, 1.33),
        flip=True,
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
    )
    first, second = transform(picture(1, 1), rng(seed)), transform(picture(1, 1), rng(seed))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (first == second).all()
    assert (first != transform(picture(1, 1), rng(seed + 100))).any()


@pytest.mark.parametrize(
    ("field", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_jitter_is_what_pillow_calls_it(field: str, enhance: type) -> None:
    transform = dataclasses.replace(PLAIN, size=48, **{field: 0.4})
    # Away from 0 and 255, where the two would clip differently.
    image = np.clip(picture(2, 0), 60, 150)
    factors = rng(3)
    (
        factors.uniform(1, 1),
        factors.uniform(np.log(1), np.log(1)),
        factors.uniform(0, 0),
        factors.uniform(0, 0),
    )
    drawn = dict(
        zip(
            ("brightness", "contrast", "saturation"),
            (
                factors.uniform(1 - (name == field) * 0.4, 1 + (name == field) * 0.4)
                for name in ("brightness", "contrast", "saturation")
            ),
            strict=True,
        )
    )[field]
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
    # Bicubic blurs the outermost columns.
    assert (middle[:, 2:-2] == 200).all(), "more than the middle was taken"
    assert (middle[:, [0, -1]] > 150).all()
    assert (TestTransform(size=20, crop_share=0.5)(image) == 200).all()


def large_picture() -> np.ndarray:
    """440 × 500 px with soft edges and noise, as photographs have."""
    soft = Image.fromarray(picture(1, 1)).resize((500, 440), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(soft) + rng().normal(0, 6, (440, 500, 3)), 0, 255).astype(np.uint8)


JITTERED = TrainTransform(
    size=96,
    crop_scale=(0.2, 1.0),
    crop_ratio=(0.75, 1.33),
    flip=True,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
)


def test_the_decoder_never_shrinks_a_box_below_the_result() -> None:
    shrinks = set()
    for seed in range(300):
        height, width = ((200, 600), (440, 1500))[seed % 2]
        view = JITTERED.view(height, width, rng(seed))
        shorter = min(view.box[2] - view.box[0], view.box[3] - view.box[1])
        assert view.shrink == 1 or shorter / view.shrink >= 96
        assert view.shrink == 8 or shorter / (2 * view.shrink) < 96, (
            "it could have been shrunk further"
        )
        shrinks.add(view.shrink)
    assert shrinks == {1, 2, 4}
    assert [View(size=10, box=(0, 0, side, 900)).shrink for side in (19.9, 20, 40, 80, 900)] == [
        1,
        2,
        4,
        8,
        8,
    ]


@pytest.mark.parametrize(("size", "shrinks"), [(96, {2, 4}), (48, {4, 8})])
def test_shrinking_while_decoding_keeps_the_picture(size: int, shrinks: set[int]) -> None:
    """Within 1.5 levels on average. Shrinking the whole image to `size` before a small crop would
    differ by 2 to 5."""
    jpeg = simplejpeg.encode_jpeg(large_picture(), 90, "RGB", "420")
    transform = dataclasses.replace(JITTERED, size=size)
    met = set()
    for seed in range(20):
        view = transform.view(440, 500, rng(seed))
        shrunk = view.render(decode_rgb(jpeg, "x", shrink=view.shrink), shrink=view.shrink)
        # The box is of whole pixels of the shrunk image.
        box = tuple(view.shrink * round(edge / view.shrink) for edge in view.box)
        whole = dataclasses.replace(view, box=box).render(decode_rgb(jpeg, "x"))
        assert np.abs(shrunk.astype(int) - whole).mean() < 1.5
        met.add(view.shrink)
    assert shrinks <= met


def test_a_small_crop_of_a_large_image_is_sharp() -> None:
    """Fine stripes live through a crop that needs every pixel, however large the image around
    it."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::4], stripes[:, 1::4] = 255, 255
    jpeg = simplejpeg.encode_jpeg(stripes, 95)
    view = View(size=64, box=(100, 100, 164, 164))
    assert view.shrink == 1
    assert view.render(decode_rgb(jpeg, "x", shrink=view.shrink)).std() > 100
