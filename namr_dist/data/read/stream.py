"""From a plan to batches: worker processes read JPEG bytes by range, decode and transform them.

Batches are uint8 and leave normalisation to the device, so a quarter of the bytes of float images
moves.
"""

from __future__ import annotations

import itertools
import os
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from namr_dist.data.read.augment import TestTransform, TrainTransform
from namr_dist.data.read.plan import Sampling, augment_seed, epoch_plan, rank_part, steps_per_epoch
from namr_dist.data.read.watched_loader import LOOK_S, WatchedLoader, set_up_worker
from namr_dist.data.shardset.manifest import Manifest, Shard, SplitIndex
from namr_dist.data.shardset.shards import DamagedImageError, decode_rgb, jpeg_size, sha256_of
from namr_dist.errors import InputError, ReportedError, TransientError, is_transient

_AHEAD_BYTES = 256 << 20
"""Batches made ahead by all workers of a rank, unless one each is more."""
_CLOCKS_DIFFER_NS = 60 * 10**9
"""A file's times are those of its server's clock."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's images of one step."""

    images_bHW3: torch.Tensor
    """uint8 (b, size, size, 3)."""
    labels_b: torch.Tensor
    """int64 (b,), numbered 0..C-1 in the order of the splits' sorted class labels."""
    index_b: torch.Tensor
    """int64 (b,), positions in the split's index; of a replacement, its own."""
    replaced: tuple[str, ...] = ()
    """A line for each damaged image that another of its class stands in for: its key, and what is
    wrong."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Images, labels and positions."""
        return self.images_bHW3, self.labels_b, self.index_b

    def to(self, device: torch.device) -> Batch:
        """On a device; from pinned memory, without waiting for the copy."""
        images, labels, index = (tensor.to(device, non_blocking=True) for tensor in self.tensors)
        return replace(self, images_bHW3=images, labels_b=labels, index_b=index)

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from by itself. DataLoader asks for it."""
        images, labels, index = (tensor.pin_memory() for tensor in self.tensors)
        return replace(self, images_bHW3=images, labels_b=labels, index_b=index)


class ImageSource(Dataset["Batch | ReportedError"], ABC):
    """Images that come a whole batch at a time.

    An item is a pair (position among the images, augmentation seed). What is wrong with the data is
    returned as an InputError, for `stream` to raise: raised in a worker, it would arrive wrapped in
    the worker's traceback.
    """

    side: int
    """Pixels of a side of the images it makes."""

    @abstractmethod
    def __len__(self) -> int:
        """Images in all."""

    @abstractmethod
    def files(self, positions: Iterable[int]) -> list[str]:
        """The files that the images at these positions are read from, each once, sorted."""

    @abstractmethod
    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | ReportedError:
        """The images of a batch, in order."""


class ShardImages(ImageSource):
    """Images of an index, read by byte range from local tars.

    damaged: an image that cannot be decoded ends a training run ("stop"), or is replaced by the
    next one of its class that can, in cyclic order of position ("replace"); None: it is an error
    outside of training, where no setting helps.

    A shard that is missing, short or cannot be read is an error in any case, and so is one that is
    another than the manifest says: the CRC-32 of every image is compared, and a shard that changed
    since it was opened before is hashed. Where the manifest has no CRC-32s, so is one that changed
    since the manifest was read. Of a set that lies elsewhere, the cache hashes what it keeps.
    """

    def __init__(
        self,
        manifest: Manifest,
        index: SplitIndex,
        transform: TrainTransform | TestTransform,
        *,
        damaged: Literal["stop", "replace"] | None = None,
    ) -> None:
        self._manifest = manifest
        self._index = index
        self._transform = transform
        self._damaged = damaged
        self.side = transform.size
        self._class_N = np.unique(index.label_N, return_inverse=True)[1]
        self._opened: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._index)

    def files(self, positions: Iterable[int]) -> list[str]:
        """The shards' names for a message: paths, or for a set that lies elsewhere, file and
        set."""
        return sorted({self._named(self._shard(position)) for position in positions})

    def jpeg(self, position: int) -> bytes:
        """The undecoded image. Raises InputError, naming the shard, if it cannot be read or is not
        the one of the manifest, and TransientError if storage does not answer."""
        shard, length = self._shard(position), int(self._index.length_N[position])
        try:
            # Opened anew each time: a set may have more shards than a process may have open files.
            with self._open(shard) as file:
                status = os.fstat(file.fileno())
                size = status.st_size
                if size == shard.bytes and self._manifest.source is None:
                    self._check_unchanged(shard, file, status)
                file.seek(int(self._index.offset_N[position]))
                jpeg = file.read(length)
        except OSError as error:
            if is_transient(error):
                raise TransientError(
                    f"shard {self._named(shard)} cannot be read ({error.strerror}); check that storage "
                    "answers, and go on with --resume, or copy it again"
                ) from None
            raise InputError(
                f"shard {self._named(shard)} cannot be read ({error.strerror}); copy it again"
            ) from None
        if size != shard.bytes or len(jpeg) != length:
            raise InputError(
                f"shard {self._named(shard)} has {size} bytes, its manifest says {shard.bytes}; copy it "
                "again"
            )
        stated = int(self._index.crc32_N[position])
        if stated >= 0 and zlib.crc32(jpeg) != stated:
            remedy = (
                f"remove {file.name}, which is then fetched again"
                if self._manifest.source
                else "copy it again"
            )
            raise InputError(
                f"shard {self._named(shard)} is not the one of its manifest: {self._index.keys[position]}.jpg "
                f"has CRC-32 {zlib.crc32(jpeg):08x}, not {stated:08x}; {remedy}"
            )
        return jpeg

    def _check_unchanged(self, shard: Shard, file: BinaryIO, status: os.stat_result) -> None:
        """Hash a shard that may no longer be what was verified. Raises InputError if it is
        another."""
        state = (status.st_ino, status.st_mtime_ns)
        before = self._opened.get(shard.file)
        if state == before:
            return
        # Unlike the time of modification, that of the last change cannot be set by a program.
        may_differ = before is not None or (
            not shard.crc32
            and max(status.st_mtime_ns, status.st_ctime_ns)
            > self._manifest.read_ns - _CLOCKS_DIFFER_NS
        )
        if may_differ and (digest := sha256_of(file)) != shard.sha256:
            raise InputError(
                f"shard {self._named(shard)} has been changed or replaced since the set was opened: "
                f"sha256 {digest[:12]}…, its manifest says {shard.sha256[:12]}…; copy it again"
            )
        self._opened[shard.file] = state

    def _shard(self, position: int) -> Shard:
        return self._manifest.shards[self._index.shard_N[position]]

    def _named(self, shard: Shard) -> str:
        # A cache gives its files names of its own.
        return (
            f"{shard.file} of {self._manifest.name}"
            if self._manifest.source
            else str(self._manifest.folder / shard.file)
        )

    def _open(self, shard: Shard) -> BinaryIO:
        try:
            return open(self._manifest.path(shard), "rb")
        except FileNotFoundError:
            if self._manifest.source is None:
                raise
            # A cache may have dropped the shard since it named its file; it fetches it once more.
            return open(self._manifest.path(shard), "rb")

    def _image(self, position: int, seed: int) -> np.ndarray:
        where = f"{self._index.keys[position]}.jpg in {self._named(self._shard(position))}"
        jpeg = self.jpeg(position)
        height, width = jpeg_size(jpeg, where)
        # What is to be seen is drawn before the image is decoded: that tells how far the decoder
        # may shrink it.
        view = (
            self._transform.view(height, width, np.random.Generator(np.random.Philox(seed)))
            if isinstance(self._transform, TrainTransform)
            else self._transform.view(height, width)
        )
        return view.render(decode_rgb(jpeg, where, shrink=view.shrink), shrink=view.shrink)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch | ReportedError:
        replaced: list[str] = []
        try:
            shown = [self._image_or_next(position, seed, replaced) for position, seed in items]
        except ReportedError as error:
            return error
        positions = np.array([position for position, _ in shown], np.int64)
        return Batch(
            images_bHW3=torch.from_numpy(np.stack([image for _, image in shown])),
            labels_b=torch.from_numpy(self._class_N[positions]),
            index_b=torch.from_numpy(positions),
            replaced=tuple(replaced),
        )

    def _image_or_next(
        self, position: int, seed: int, replaced: list[str]
    ) -> tuple[int, np.ndarray]:
        """An image, with its position, or its replacement; `replaced` then gets a line."""
        try:
            return position, self._image(position, seed)
        except DamagedImageError as error:
            if self._damaged is None:
                raise
            if self._damaged == "stop":
                # A set without the image is another, with which this run does not go on.
                raise InputError(
                    f"{error.fault}; set data.damaged_images to replace, and the next image of its class stands in: "
                    "a run that has begun goes on so with --resume"
                ) from None
            replaced.append(error.fault)
        own_C = np.flatnonzero(self._class_N == self._class_N[position])
        turn = int(np.searchsorted(own_C, position)) + 1
        for other in (*own_C[turn:].tolist(), *own_C[: turn - 1].tolist()):
            try:
                return other, self._image(other, seed)
            except DamagedImageError:
                continue  # it is counted when its own turn comes
        label = int(self._index.label_N[position])
        name = self._manifest.class_by_label[label].name
        raise InputError(
            f"class {label} ({name}) of {self._manifest.folder} has no image that can be decoded: "
            f"{replaced[-1]}; rebuild the shard set without the class, or leave it out by data.class_list, and "
            "start again with --overwrite"
        )


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """All training batches of one rank, from any step on: the stream's sampler. Position = the step
    alone."""

    index: SplitIndex
    sampling: Sampling
    seed: int
    rank: int
    world_size: int
    steps: int
    first_step: int = 0

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.sampling.classes_per_batch // self.world_size * self.sampling.images_per_class
        for step, positions in self._parts():
            yield [
                (
                    int(position),
                    augment_seed(seed=self.seed, step=step, slot=self.rank * share + slot),
                )
                for slot, position in enumerate(positions)
            ]

    def shards(self) -> Iterator[set[int]]:
        """Positions in Manifest.shards that each batch is read from."""
        for _, positions in self._parts():
            yield set(self.index.shard_N[positions].tolist())

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each step, and the positions of this rank's images."""
        per_epoch = steps_per_epoch(self.index, self.sampling)
        plan_SPK, planned_epoch = np.empty(0), -1
        for step in range(self.first_step, self.steps):
            epoch, step_in_epoch = divmod(step, per_epoch)
            if epoch != planned_epoch:
                plan_SPK = epoch_plan(self.index, self.sampling, seed=self.seed, epoch=epoch)
                planned_epoch = epoch
            yield (
                step,
                rank_part(plan_SPK[step_in_epoch], rank=self.rank, world_size=self.world_size),
            )


def sequential_batches(
    count: int, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[tuple[int, int]]]:
    """Positions 0..count-1 in order for evaluation, each on one rank at least.

    The batches are those of a single rank, so that what is computed of an image depends on no
    number of ranks; each rank gets whole ones. Every rank gets the same number (ZeRO-3 needs equal
    forwards): one that runs out repeats the last batch, and `index_b` shows the repeats.
    """
    starts = range(0, count, batch_size)
    each = -(-len(starts) // world_size)
    own = [starts[min(number, len(starts) - 1)] for number in range(rank * each, (rank + 1) * each)]
    return [
        [(position, 0) for position in range(start, min(start + batch_size, count))]
        for start in own
    ]


def stream(
    images: ImageSource,
    batches: TrainPlan | list[list[tuple[int, int]]],
    *,
    workers: int,
    pin_memory: bool = False,
    timeout_s: float = 600.0,
) -> Iterator[Batch]:
    """Batches in order, made ahead by `workers` processes (0: in this one, which then cannot tell
    that a read hangs).

    Raises InputError if an image or its shard cannot be read, and TransientError if storage is the
    reason; if a worker is killed; and if no batch comes for `timeout_s` seconds, naming the files
    of the one that is waited for.
    """
    planned = iter(batches)
    first = next(planned, None)
    if first is None:
        return
    asked: deque[list[tuple[int, int]]] = deque()
    # The sampler is a plan, known before the first read, so raw bytes are shuffled and never
    # decoded images.
    made: DataLoader[Batch | ReportedError] = DataLoader(
        images,
        batch_sampler=_noting(itertools.chain([first], planned), asked),
        num_workers=workers,
        collate_fn=_to_parent,
        pin_memory=pin_memory,
        worker_init_fn=set_up_worker,
        timeout=min(LOOK_S, timeout_s) if workers else 0,
        prefetch_factor=batches_ahead(images, len(first), workers=workers) if workers else None,
        # Its own, though nothing uses it: a loader draws from the generator it has, and torch's one
        # is the model's.
        generator=torch.Generator(),
    )
    with WatchedLoader(made, timeout_s=timeout_s) as loaded:
        while (
            batch := loaded.next(lambda: images.files(position for position, _ in asked[0]))
        ) is not None:
            asked.popleft()
            if isinstance(batch, ReportedError):
                raise batch
            yield batch


def _noting(
    batches: Iterable[list[tuple[int, int]]], asked: deque[list[tuple[int, int]]]
) -> Iterator[list[tuple[int, int]]]:
    """The same batches; `asked` has those that were taken, for whoever receives them to take
    off."""
    for batch in batches:
        asked.append(batch)
        yield batch


def batches_ahead(images: ImageSource, batch_size: int, *, workers: int) -> int:
    """Batches that a worker makes ahead: four, or fewer if they are large."""
    batch_bytes = batch_size * 3 * images.side**2
    return max(1, min(4, _AHEAD_BYTES // (workers * batch_bytes)))


def _to_parent(batch: Any) -> Batch | ReportedError:
    """In a worker, puts the batch where its parent can see it."""
    # ImageSource gives a whole batch where DataLoader expects a list of samples.
    assert isinstance(batch, (Batch, ReportedError))
    if isinstance(batch, ReportedError) or get_worker_info() is None:
        return batch
    try:
        # The queue would do it by itself, but a thread of it prints what goes wrong there, and the
        # batch never comes.
        for tensor in batch.tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        return InputError(
            f"a data worker process cannot pass on its images ({str(error).splitlines()[0]}); enlarge "
            "/dev/shm (docker run --shm-size), lower data.workers, or set it to 0"
        )
    return batch
