"""Stanford Online Products in its full size and original layout, with tiny pictures of no
meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg

SUPER_CLASSES = (
    "bicycle",
    "cabinet",
    "chair",
    "coffee_maker",
    "fan",
    "kettle",
    "lamp",
    "mug",
    "sofa",
    "stapler",
    "table",
    "toaster",
)
SPLITS = {"train": (59_551, 11_318), "test": (60_502, 11_316)}
"""Images and classes, those of the original."""
_DISTINCT = 512


def full_size_sop(folder: Path, *, side: int = 48) -> Path:
    """Write 120,053 JPEGs of `side` pixels, no two of them with the same bytes, and both lists;
    return the folder.

    Classes have 2 to 12 images, 5.3 on average. About 20 s, and 600 MB of disk blocks.
    """
    rng = np.random.default_rng(0)
    smooth = (
        rng.uniform(0, 255, (_DISTINCT, 4, 4, 3))
        .repeat(side // 4, axis=1)
        .repeat(side // 4, axis=2)
    )
    noisy = np.clip(smooth + rng.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)
    jpegs = [simplejpeg.encode_jpeg(image, quality=85, colorsubsampling="420") for image in noisy]
    for name in SUPER_CLASSES:
        (folder / f"{name}_final").mkdir(parents=True, exist_ok=True)
    image_id, class_id = 0, 0
    for split, (images, classes) in SPLITS.items():
        lines = ["image_id class_id super_class_id path"]
        for position, size in enumerate(_class_sizes(images, classes, rng)):
            class_id += 1
            number = position * len(SUPER_CLASSES) // classes
            for view in range(size):
                image_id += 1
                path = f"{SUPER_CLASSES[number]}_final/{110_000_000_000 + class_id}_{view}.JPG"
                (folder / path).write_bytes(
                    _with_comment(jpegs[image_id % _DISTINCT], f"image {image_id}")
                )
                lines.append(f"{image_id} {class_id} {number + 1} {path}")
        (folder / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def _class_sizes(images: int, classes: int, rng: np.random.Generator) -> list[int]:
    """2 to 12 for each class, `images` together."""
    mean = images / classes
    size_C = 2 + rng.binomial(10, rng.beta(mean - 2, 12 - mean, classes))
    missing = images - int(size_C.sum())
    step = 1 if missing > 0 else -1
    room = np.flatnonzero((size_C + step >= 2) & (size_C + step <= 12))
    size_C[rng.choice(room, abs(missing), replace=False)] += step
    return size_C.tolist()


def _with_comment(jpeg: bytes, text: str) -> bytes:
    """The JPEG with a comment behind its first marker."""
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text.encode() + jpeg[2:]
