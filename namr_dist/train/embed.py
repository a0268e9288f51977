"""Images of a split → embeddings, on all ranks together, each image once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from namr_dist.config import Config
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ImageSource, sequential_batches, stream
from namr_dist.parallel.gather import RowGather, count_rows
from namr_dist.parallel.ranks import Rank


def test_transform(config: Config) -> TestTransform:
    """What every image passes that is embedded and not trained on."""
    return TestTransform(size=config.test_size, crop_share=config.data.test_crop)


@torch.no_grad()
def embed(
    forward: Callable[[Tensor], tuple[Tensor, ...]],
    images: ImageSource,
    *,
    rank: Rank,
    batch_size: int,
    workers: int,
    timeout_s: float = 600.0,
) -> tuple[np.ndarray, ...]:
    """Run `forward` (uint8 (b, H, H, 3) → tensors (b, …)) over all images; the results as fp32
    arrays (N, …).

    Every rank calls it, computes its share, and gets all rows, in the order of `images`: those that
    a single rank computes from the same batches. Memory O(N · width).
    timeout_s: as in `stream`, which raises InputError for images that cannot be read.
    """
    batches = sequential_batches(
        len(images), batch_size=batch_size, rank=rank.rank, world_size=rank.world_size
    )
    indices: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    for batch in stream(images, batches, workers=workers, timeout_s=timeout_s):
        outputs = forward(batch.images_bHW3.to(rank.device))
        indices.append(batch.index_b)
        parts.append(tuple(output.float() for output in outputs))
    gather = RowGather(count_rows(sum(len(index_b) for index_b in indices), rank.device))
    index_M = gather(torch.cat(indices).to(rank.device)).cpu().numpy()
    # Ranks that ran out repeated the last batch: the first of equal indices is as good as any.
    first_N = np.unique(index_M, return_index=True)[1]
    return tuple(
        gather(torch.cat(column)).cpu().numpy()[first_N] for column in zip(*parts, strict=True)
    )
