"""A user's own pictures are embedded as they would be from shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from namr_dist.data.read.augment import TestTransform
from namr_dist.errors import InputError
from namr_dist.gallery.pictures import collect

WHOLE = TestTransform(size=48, crop_share=1.0)


def test_pictures_are_shown_as_shards_would_show_them(tmp_path: Path) -> None:
    clear = Image.fromarray(picture(0, 0)).convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.full((48, 48), 30_000, np.uint16)).save(tmp_path / "deep.PNG")
    Image.fromarray(picture(1, 1)).save(tmp_path / "plain.jfif", "JPEG", quality=100, subsampling=0)
    (tmp_path / "note.txt").write_text("no image")
    collection = collect([tmp_path], WHOLE)
    images = collection.images
    assert collection.items.ids == ("clear.png", "deep.PNG", "plain.jfif")
    batch = images.__getitems__([(0, 0), (1, 0), (2, 0)])
    assert not isinstance(batch, InputError)
    shown = batch.images_bHW3.numpy()
    assert (shown[0] == 255).all() and (shown[1] == round(30_000 / 257)).all()
    assert np.abs(shown[2].astype(int) - picture(1, 1)).mean() < 3
    assert batch.labels_b.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    result = collect([tmp_path], WHOLE).images.__getitems__([(0, 0)])
    assert isinstance(result, InputError) and f"{tmp_path / 'bad.jpg'} cannot be decoded" in str(
        result
    )
