"""What is trained on: the images of a shard set that were chosen, and how they make batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from namr_dist.data.read.plan import Sampling, small_classes, steps_per_epoch
from namr_dist.data.shardset.manifest import Manifest, SplitIndex


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The chosen images of a shard set, and how batches are drawn from them."""

    manifest: Manifest
    """The whole set."""
    index: SplitIndex
    """The images that are trained on."""
    sampling: Sampling

    @property
    def classes(self) -> int:
        """Classes of these images."""
        return len(np.unique(self.index.label_N))

    @property
    def small_classes(self) -> int:
        """Those with fewer images than a batch shows of one."""
        return small_classes(self.index, self.sampling)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of every epoch."""
        return steps_per_epoch(self.index, self.sampling)
