"""The stream delivers exactly the plan, whoever decodes it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from conftest import SAMPLING, TRANSFORM, alive, launch
from damaged_sets import with_images

from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.plan import epoch_plan
from namr_dist.data.read.stream import Batch, ShardImages, TrainPlan, sequential_batches, stream
from namr_dist.data.read.to_device import on_device
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import decode_rgb
from namr_dist.errors import InputError, TransientError


def batches(
    manifest: Manifest, *, workers: int = 0, rank: int = 0, world_size: int = 1, first_step: int = 0
) -> Iterator[Batch]:
    index = manifest.index("train")
    plan = TrainPlan(
        index=index,
        sampling=SAMPLING,
        seed=1,
        rank=rank,
        world_size=world_size,
        steps=7,
        first_step=first_step,
    )
    return stream(ShardImages(manifest, index, TRANSFORM), plan, workers=workers)


def same(one: Batch, other: Batch) -> bool:
    return one.replaced == other.replaced and all(map(torch.equal, one.tensors, other.tensors))


def test_follows_the_plan(shard_set: Manifest) -> None:
    index = shard_set.index("train")
    label_N = index.label_N
    made = list(batches(shard_set))
    planned = np.concatenate(
        [epoch_plan(index, SAMPLING, seed=1, epoch=epoch) for epoch in range(3)]
    )[:7]
    assert (torch.stack([batch.index_b for batch in made]).numpy() == planned.reshape(7, 12)).all()
    for batch in made:
        assert batch.images_bHW3.dtype == torch.uint8 and batch.images_bHW3.shape == (12, 32, 32, 3)
        assert (batch.labels_b.numpy() == label_N[batch.index_b.numpy()]).all()


def test_any_number_of_workers_gives_the_same(shard_set: Manifest) -> None:
    for one, other in zip(batches(shard_set), batches(shard_set, workers=2), strict=True):
        assert same(one, other)


def test_two_ranks_see_the_batches_of_one(shard_set: Manifest) -> None:
    shares = zip(*(batches(shard_set, rank=rank, world_size=2) for rank in range(2)), strict=True)
    for whole, (first, second) in zip(batches(shard_set), shares, strict=True):
        assert torch.equal(whole.images_bHW3, torch.cat([first.images_bHW3, second.images_bHW3]))
        assert torch.equal(whole.labels_b, torch.cat([first.labels_b, second.labels_b]))


def test_starts_anywhere(shard_set: Manifest) -> None:
    for one, other in zip(
        list(batches(shard_set))[5:], batches(shard_set, first_step=5), strict=True
    ):
        assert same(one, other)


@pytest.mark.parametrize(("count", "world_size"), [(36, 1), (36, 2), (35, 2), (7, 5), (5, 5)])
def test_evaluation_counts_every_image_once(count: int, world_size: int) -> None:
    ranks = [
        sequential_batches(count, batch_size=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(made) for made in ranks}) == 1, "ranks differ in their forwards"
    # The batches of a single rank, each on some rank: what an image is computed with is the same.
    alone = sequential_batches(count, batch_size=4)
    numbers = [alone.index(batch) for made in ranks for batch in made]
    assert sorted(set(numbers)) == list(range(len(alone)))
    assert all(number == len(alone) - 1 for number in numbers[len(alone) :])
    assert [position for batch in alone for position, _ in batch] == list(range(count))


def test_test_images_are_the_decoded_ones(shard_set: Manifest) -> None:
    index = shard_set.index("test")
    images = ShardImages(shard_set, index, TestTransform(size=48, crop_share=1.0))
    made = next(stream(images, sequential_batches(len(images), batch_size=36), workers=1))
    for position in range(36):
        assert (made.images_bHW3[position].numpy() == decode_rgb(images.jpeg(position), "x")).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_clear_error(own_shard_set: Manifest, workers: int) -> None:
    """It is what its manifest says, and no whole JPEG."""
    shard = own_shard_set.shards[0]
    tar = (own_shard_set.folder / shard.file).read_bytes()
    jpeg = tar[shard.offsets[2] :][: shard.lengths[2]]
    half = jpeg[: len(jpeg) // 2] + os.urandom(8) + b"\xff\xd9"
    own_shard_set = with_images(own_shard_set, {shard.keys[2]: half.ljust(len(jpeg), b"\0")})
    with pytest.raises(
        InputError,
        match=rf"^{shard.keys[2]}.jpg in .*{shard.file} cannot be decoded \(.*\); rebuild",
    ):
        images = ShardImages(
            own_shard_set, own_shard_set.index("train"), TestTransform(size=48, crop_share=1.0)
        )
        list(stream(images, sequential_batches(len(images), batch_size=10), workers=workers))


# Workers that die or hang.


def endless(manifest: Manifest, *, workers: int, timeout_s: float = 600.0) -> Iterator[Batch]:
    images = ShardImages(manifest, manifest.index("train"), TestTransform(size=48, crop_share=1.0))
    return stream(
        images, sequential_batches(72, batch_size=6) * 1000, workers=workers, timeout_s=timeout_s
    )


def worker_pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_one_clear_error(shard_set: Manifest, number: signal.Signals) -> None:
    before = worker_pids()
    made = endless(shard_set, workers=2)
    next(made)
    killed = min(worker_pids() - before)
    os.kill(killed, number)
    with pytest.raises(
        TransientError,
        match=rf"^a data worker process \({killed}\) was ended by signal {int(number)} "
        r"\(SIG.*\); lower data.workers or check memory, .*--resume$",
    ):
        for _ in made:
            pass
    assert worker_pids() == before


def test_a_killed_worker_interrupts_no_other_code(shard_set: Manifest) -> None:
    """Between two batches, the training step runs: the error comes with the next batch."""
    before = worker_pids()
    made = endless(shard_set, workers=1)
    next(made)
    (worker,) = worker_pids() - before
    os.kill(worker, signal.SIGKILL)
    while alive(worker):
        time.sleep(0.01)
    with pytest.raises(TransientError, match=str(worker)):
        list(made)


def test_a_shard_that_never_answers_is_named_and_the_process_ends(own_shard_set: Manifest) -> None:
    """Opening a FIFO waits for a writer, for ever, as does a file of a storage that is gone."""
    path = own_shard_set.folder / own_shard_set.shards[1].file
    path.unlink()
    os.mkfifo(path)
    program = f"""
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.read.stream import ShardImages, sequential_batches, stream
from namr_dist.errors import TransientError
manifest = Manifest.load({str(own_shard_set.folder)!r})
images = ShardImages(manifest, manifest.index("train"), TestTransform(size=48, crop_share=1.0))
try:
    for batch in stream(images, sequential_batches(72, batch_size=9), workers=2, timeout_s=3):
        print(*batch.index_b.tolist())
except TransientError as error:
    print(error)
"""
    # Its pipes are inherited by the workers: had one gone on, their end would not be seen.
    done = launch(sys.executable, "-c", program, timeout=60)
    *batches, said = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert batches == [" ".join(map(str, range(first, first + 9))) for first in range(0, 36, 9)]
    assert said.startswith("no batch came for 3 s (data.batch_minutes); ") and said.endswith(
        "with --resume"
    )
    assert str(path) in said and "train-0.tar" not in said


def test_a_worker_blocked_in_a_read_does_not_outlive_its_parent(own_shard_set: Manifest) -> None:
    path = own_shard_set.folder / own_shard_set.shards[1].file
    path.unlink()
    os.mkfifo(path)
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(
        target=take_one_batch, args=(own_shard_set, theirs)
    )
    parent.start()
    theirs.close()  # so that one that fails is seen to end
    try:
        assert ours.poll(60)
        worker = ours.recv()
        assert alive(worker)
    finally:
        parent.kill()
        parent.join()
    deadline_s = time.monotonic() + 30
    while alive(worker):
        assert time.monotonic() < deadline_s, "the worker goes on"


def take_one_batch(manifest: Manifest, told: Connection) -> None:
    images = ShardImages(manifest, manifest.index("train"), TestTransform(size=48, crop_share=1.0))
    made = stream(images, sequential_batches(72, batch_size=36), workers=1)
    next(made)
    told.send(multiprocessing.active_children()[0].pid)
    next(made)


def test_full_shared_memory_is_one_clear_error(shard_set: Manifest) -> None:
    """In a mount namespace of its own, /dev/shm is a disk of 1 MiB."""
    program = f"""
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.read.stream import ShardImages, sequential_batches, stream
from namr_dist.errors import InputError
manifest = Manifest.load({str(shard_set.folder)!r})
images = ShardImages(manifest, manifest.index("train"), TestTransform(size=224, crop_share=1.0))
try:
    next(stream(images, sequential_batches(72, batch_size=36), workers=1))
except InputError as error:
    print(error)
"""
    done = launch(
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1"',
        sys.executable,
        program,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.startswith("a data worker process cannot pass on its images (")
        and "enlarge /dev/shm" in done.stdout
        and len(done.stdout.splitlines()) == 1
    )


# On the way to the device.


def test_batches_for_a_cpu_are_passed_on_as_they_are(shard_set: Manifest) -> None:
    made = list(batches(shard_set))
    for one, other in zip(made, on_device(iter(made), torch.device("cpu")), strict=True):
        assert one is other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_on_a_gpu_are_the_same_and_come_while_it_computes() -> None:
    device = torch.device("cuda")
    made = [
        Batch(
            images_bHW3=torch.full((64, 224, 224, 3), number, dtype=torch.uint8),
            labels_b=torch.arange(64),
            index_b=torch.arange(64),
            replaced=(str(number),),
        ).pin_memory()
        for number in range(8)
    ]
    work = torch.randn(8192, 8192, device=device)
    sums = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for number, batch in enumerate(on_device(iter(made), device)):
            assert all(tensor.is_cuda for tensor in batch.tensors) and batch.replaced == (
                str(number),
            )
            for _ in range(5):
                work @ work
            sums.append(batch.images_bHW3.long().sum())
            del batch
        torch.cuda.synchronize()
    assert [int(value) for value in sums] == [number * 64 * 224 * 224 * 3 for number in range(8)]
    events = profile.profiler.kineto_results.events()
    copies = [
        event for event in events if "Memcpy HtoD" in event.name() and event.duration_ns() > 100_000
    ]
    # cuBLAS calls its kernels by either name.
    products = [
        event for event in events if any(name in event.name().lower() for name in ("gemm", "nvjet"))
    ]
    overlapping = [
        copy
        for copy in copies
        if any(
            product.start_ns() < copy.start_ns() + copy.duration_ns()
            and copy.start_ns() < product.start_ns() + product.duration_ns()
            for product in products
        )
    ]
    assert len(copies) == 8 and len(overlapping) >= 4


def test_streams_leave_the_global_generator_alone(shard_set: Manifest) -> None:
    """A resumed run makes other loaders than an unbroken one: what the model draws must not depend
    on them."""
    index = shard_set.index("train")
    before = torch.get_rng_state()
    images = ShardImages(shard_set, index, TestTransform(size=32, crop_share=1.0))
    for workers in (0, 1):
        list(stream(images, sequential_batches(6, batch_size=3), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_elsewhere_ends_the_program(shard_set: Manifest) -> None:
    """One that is kept in its traceback keeps the stream and its workers, who ignore SIGTERM."""
    done = launch(
        sys.executable,
        "-c",
        f"""
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.read.augment import TestTransform
from namr_dist.data.read.stream import ShardImages, sequential_batches, stream
manifest = Manifest.load({str(shard_set.folder)!r})
images = ShardImages(manifest, manifest.index("train"), TestTransform(size=32, crop_share=1.0))
def step():
    batches = stream(images, sequential_batches(72, batch_size=2), workers=2)
    next(batches)
    raise RuntimeError("out of memory")
step()
""",
        timeout=60,
    )
    assert done.returncode == 1 and "RuntimeError: out of memory" in done.stderr
