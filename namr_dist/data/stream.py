"""From a plan to batches: worker processes read JPEG bytes by range, decode and transform them.

Batches are uint8 and leave normalisation to the device, so a quarter of the bytes of float images moves.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from namr_dist.data.augment import TestTransform, TrainTransform
from namr_dist.data.manifest import Manifest, Shard, SplitIndex
from namr_dist.data.plan import Sampling, augment_seed, epoch_plan, rank_part, steps_per_epoch
from namr_dist.data.shards import decode_rgb
from namr_dist.errors import InputError

_AHEAD_BYTES = 256 << 20
"""Batches made ahead by all workers of a rank, unless one each is more."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's images of one step."""

    images_bHW3: torch.Tensor
    """uint8 (b, size, size, 3)."""
    labels_b: torch.Tensor
    """int64 (b,), numbered 0..C-1 in the order of the splits' sorted class labels."""
    index_b: torch.Tensor
    """int64 (b,), places in the split's index."""

    def pin_memory(self) -> Batch:
        return Batch(images_bHW3=self.images_bHW3.pin_memory(), labels_b=self.labels_b.pin_memory(),
                     index_b=self.index_b.pin_memory())


class ImageSource(Dataset["Batch | InputError"]):
    """Images that come a whole batch at a time.

    An item is a pair (place among the images, augmentation seed). A damaged image is returned as an InputError,
    for `stream` to raise: raised in a worker, it would arrive wrapped in the worker's traceback.
    """

    side: int
    """Pixels of a side of the images it makes."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | InputError:
        raise NotImplementedError


class ShardImages(ImageSource):
    """Images of an index, read by byte range from local tars."""

    def __init__(self, manifest: Manifest, index: SplitIndex, transform: TrainTransform | TestTransform) -> None:
        self._manifest = manifest
        self._index = index
        self._transform = transform
        self.side = transform.size
        self._class_N = np.unique(index.label_N, return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self._index)

    def jpeg(self, place: int) -> bytes:
        """The undecoded image."""
        # Opened anew each time: a set may have more shards than a process may have open files.
        with open(self._manifest.path(self._shard(place)), "rb", buffering=0) as file:
            file.seek(int(self._index.offset_N[place]))
            return file.read(int(self._index.length_N[place]))

    def _shard(self, place: int) -> Shard:
        return self._manifest.shards[self._index.shard_N[place]]

    def _image(self, place: int, seed: int) -> np.ndarray:
        where = f"{self._index.keys[place]}.jpg in {self._manifest.folder / self._shard(place).file}"
        image_HW3 = decode_rgb(self.jpeg(place), where, least_size=self._transform.size)
        if isinstance(self._transform, TrainTransform):
            return self._transform(image_HW3, np.random.Generator(np.random.Philox(seed)))
        return self._transform(image_HW3)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | InputError:
        places = np.array([place for place, _ in items], np.int64)
        try:
            images = np.stack([self._image(place, seed) for place, seed in items])
        except InputError as error:
            return error
        except OSError as error:
            return InputError(f"shard {error.filename} cannot be read ({error.strerror}); copy it again")
        return Batch(images_bHW3=torch.from_numpy(images), labels_b=torch.from_numpy(self._class_N[places]),
                     index_b=torch.from_numpy(places))


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """All training batches of one rank, from any step on: the stream's sampler. Position = the step alone."""

    index: SplitIndex
    how: Sampling
    seed: int
    rank: int
    world_size: int
    steps: int
    first_step: int = 0

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = steps_per_epoch(self.index, self.how)
        share = self.how.classes_per_batch // self.world_size * self.how.images_per_class
        plan_SPK, planned_epoch = np.empty(0), -1
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != planned_epoch:
                plan_SPK = epoch_plan(self.index, self.how, seed=self.seed, epoch=epoch)
                planned_epoch = epoch
            images = rank_part(plan_SPK[place], rank=self.rank, world_size=self.world_size)
            yield [(int(image), augment_seed(seed=self.seed, step=step, slot=self.rank * share + slot))
                   for slot, image in enumerate(images)]


def sequential_batches(count: int, *, batch_size: int, rank: int = 0,
                       world_size: int = 1) -> list[list[tuple[int, int]]]:
    """Places 0..count-1 in order for evaluation, each on one rank exactly once.

    Every rank gets the same number of batches (ZeRO-3 needs equal forwards): a rank that runs out repeats its
    last place, and `index_b` shows the repeats. Needs count ≥ world_size.
    """
    places = np.array_split(np.arange(count), world_size)
    longest = -(-count // world_size)
    own = [int(place) for place in places[rank]]
    own += own[-1:] * (longest - len(own))
    return [[(place, 0) for place in own[start : start + batch_size]] for start in range(0, longest, batch_size)]


def stream(images: ImageSource, batches: TrainPlan | list[list[tuple[int, int]]], *, workers: int,
           pin_memory: bool = False) -> Iterator[Batch]:
    """Batches in order, made ahead by `workers` processes (0: in this one).

    Raises InputError naming image and shard if one cannot be decoded.
    """
    # The sampler is a plan, known before the first read, so raw bytes are shuffled and never decoded images.
    made: DataLoader[Batch | InputError] = DataLoader(
        images, batch_sampler=batches, num_workers=workers, collate_fn=_as_is, pin_memory=pin_memory,
        prefetch_factor=_batches_ahead(images, batches, workers=workers) if workers else None,
        worker_init_fn=_leave_signals_to_parent,
        # Its own, though nothing uses it: a loader draws from the generator it has, and torch's one is the model's.
        generator=torch.Generator(),
    )
    for batch in made:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _batches_ahead(images: ImageSource, batches: TrainPlan | list[list[tuple[int, int]]], *, workers: int) -> int:
    """Batches that a worker makes ahead: four, or fewer if they are large."""
    batch_bytes = len(next(iter(batches))) * 3 * images.side**2
    return max(1, min(4, _AHEAD_BYTES // (workers * batch_bytes)))


def _leave_signals_to_parent(worker: int) -> None:
    # A launcher signals the whole process group; a parent that wants to end in good order still needs its batches.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Any) -> Batch | InputError:
    # ImageSource gives a whole batch where DataLoader expects a list of samples.
    assert isinstance(batch, (Batch, InputError))
    return batch
