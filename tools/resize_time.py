"""What torch's antialiased bicubic is worth compared with Pillow's for training crops, and stacking
planes compared with a transposed copy: milliseconds of one core, in turns in one process; median
[p20–p80] of all rounds.

    python tools/resize_time.py > docs/results/resize-time.txt
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn.functional import interpolate

SIDE, ROUNDS, CALLS = 224, 30, 10


def main() -> None:
    """Time all ways in turns, and print them with how far the two resizers differ."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    grain = Image.fromarray(rng.integers(0, 256, (60, 70, 3), np.uint8))
    crop_hw3 = np.asarray(grain.resize((300, 270), Image.Resampling.BICUBIC)).copy()

    def by_torch() -> torch.Tensor:
        return interpolate(
            torch.from_numpy(crop_hw3.copy()).permute(2, 0, 1)[None],
            (SIDE, SIDE),
            mode="bicubic",
            antialias=True,
        )[0]

    def by_pillow() -> np.ndarray:
        return np.asarray(Image.fromarray(crop_hw3).resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    planes_3SS = by_torch()
    ways: dict[str, Callable[[], object]] = {
        "resize, Pillow": by_pillow,
        "resize, torch": by_torch,
        "planes to pixels, numpy copy": lambda: np.ascontiguousarray(
            planes_3SS.permute(1, 2, 0).numpy()
        ),
        "planes to pixels, torch.stack": lambda: torch.stack(tuple(planes_3SS), dim=-1).numpy(),
    }
    taken_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.thread_time()
            for _ in range(CALLS):
                way()
            taken_ms[name].append(1e3 * (time.thread_time() - began) / CALLS)
    print(
        f"crop of 300 × 270 px → {SIDE} px; torch {torch.__version__}, Pillow {PIL.__version__}, "
        f"numpy {np.__version__}, {platform.machine()}, one thread; ms, median [p20–p80] of {ROUNDS} rounds"
    )
    for name, values in taken_ms.items():
        low, middle, high = np.percentile(values, (20, 50, 80))
        print(f"{name:<31}{middle:.2f} [{low:.2f}–{high:.2f}]")
    differing = np.abs(by_pillow().astype(int) - planes_3SS.permute(1, 2, 0).numpy())
    print(
        f"largest difference {differing.max()} levels, {100 * (differing > 0).mean():.1f} % of values differ"
    )


if __name__ == "__main__":
    main()
