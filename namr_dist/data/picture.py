"""Any picture → the square of RGB pixels that a network takes.

The model card of an export prints this module from its imports on, so it needs NumPy and Pillow
alone. It trusts its pictures: `data.read.image_folder.read_picture` gives the same pixels, decodes
no more than shards may hold, and reports what cannot be read.

Shapes: H × W, a picture's height and width; S, the side of the square.
"""

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

Picture = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray
ARRAYS = (("uint8", ()), ("uint8", (3,)), ("uint8", (4,)), ("uint16", ()))
STRIP = 64


def prepare(picture: Picture, *, size: int, share: float) -> np.ndarray:
    """uint8 (size, size, 3): the middle square of a picture as a viewer shows it, on white.

    picture: an image file (its path, its bytes or the open file), a PIL image, or an array: grey
    (H, W), RGB (H, W, 3) or RGBA (H, W, 4) of uint8, or grey (H, W) of uint16.
    share: side of the square / shorter side of the picture.
    """
    return middle(on_white(upright(as_image(picture))), size=size, share=share)


def as_image(picture: Picture) -> Image.Image:
    """A file's first image, decoded, or what is one already.

    Raises ValueError for arrays of other shapes and types, and for images without a pixel.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim < 2 or (picture.dtype.name, picture.shape[2:]) not in ARRAYS:
            raise ValueError(
                f"an array {picture.shape} of {picture.dtype}; give uint8 (H, W), (H, W, 3) or "
                "(H, W, 4), or uint16 (H, W)"
            )
        image = Image.fromarray(picture)
    elif isinstance(picture, Image.Image):
        image = picture
    else:
        file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        with Image.open(file) as image:
            image.load()
    if 0 in image.size:
        raise ValueError(f"{image.width} × {image.height}: no pixel")
    return image


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF data asks for; the same image where they do not."""
    image.load()  # a PNG's EXIF data may lie behind its pixels
    if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        return ImageOps.exif_transpose(image)
    return image  # of which exif_transpose would make a copy


def on_white(image: Image.Image) -> Image.Image:
    """RGB, on white where it was transparent; 16 bits become 8. Colour profiles are not applied.

    Raises ValueError for floats, of which nothing says what is white.
    """
    deep = image.mode.startswith("I")  # 16 bits, also in 32, which convert("RGB") would clip
    if image.mode == "F":
        raise ValueError("an image of floats has no white; scale it to 0 to 255, mode L")
    if not (deep or image.has_transparency_data):
        return image if image.mode == "RGB" else image.convert("RGB")
    # Strip by strip: what lies between takes several times an image's memory.
    made = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        if deep:
            strip = eight_bits(strip, image.info.get("transparency"))
        else:
            if strip.mode == "La":  # which converts to LA alone
                strip = strip.convert("LA")
            white = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(white, strip.convert("RGBA"))
        made.paste(strip.convert("RGB"), (0, top))
    return made


def eight_bits(image: Image.Image, clear: int | None) -> Image.Image:
    """16-bit grey in 8 bits, rounded; white where its value is `clear`."""
    values_HW = np.asarray(image).astype(np.int32).clip(0, 65535)
    grey_HW = ((values_HW + 128) // 257).astype(np.uint8)  # 65535 = 257 · 255
    if clear is not None:
        grey_HW[values_HW == clear] = 255
    return Image.fromarray(grey_HW)


def middle(image: Image.Image, *, size: int, share: float) -> np.ndarray:
    """uint8 (size, size, 3): the middle square of an RGB image."""
    return cut(image, middle_square(image.width, image.height, min(image.size) * share), size)


def middle_square(width: int, height: int, side: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels, of a square in the middle of an image."""
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def cut(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """uint8 (size, size, 3): the part of an RGB image within `box`, by Pillow's bicubic."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
