"""Shards behind a URL are fetched once for all processes, ahead of need, and within the cache's
limit."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_server import BadServer, drop, flip, late, stall, status
from conftest import SAMPLING, TRANSFORM
from namespaces import apart

from namr_dist.config import RemoteConfig
from namr_dist.data.location import open_shards
from namr_dist.data.read.plan import Sampling
from namr_dist.data.read.stream import ShardImages, TrainPlan, stream
from namr_dist.data.read.training_set import TrainingSet
from namr_dist.data.remote.cache import check_cache
from namr_dist.data.remote.prefetch import LookAhead
from namr_dist.data.shardset.manifest import Manifest, Shard
from namr_dist.errors import InputError, TransientError

FORK = multiprocessing.get_context("fork")


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def kept(remote: RemoteConfig) -> list[Path]:
    """Whole shards in the cache."""
    assert remote.cache
    return sorted(
        path for path in (remote.cache / "shards").iterdir() if not path.name.startswith(".")
    )


def batches(manifest: Manifest, *, workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch."""
    index = manifest.index("train")
    plan = TrainPlan(index=index, sampling=SAMPLING, seed=1, rank=0, world_size=1, steps=3)
    return [
        (batch.index_b, batch.images_bHW3)
        for batch in stream(ShardImages(manifest, index, TRANSFORM), plan, workers=workers)
    ]


def assert_same_batches(one: list, other: list) -> None:
    assert len(one) == len(other) == 3
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(mine, theirs, strict=True))


def test_an_epoch_over_a_bad_network_is_that_of_the_folder(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    first, second = shard_set.shards_of("train")
    server.faults[first.file] = [drop(20_000), status(503)]
    server.faults[second.file] = [flip(30_000), stall(50_000)]
    manifest = open_shards(server.url, dataclasses.replace(remote, stall_seconds=2))
    assert_same_batches(batches(manifest, workers=2), batches(shard_set, workers=0))
    until(lambda: server.completed.total() >= 3)
    assert server.completed == {"manifest.json": 1, first.file: 1, second.file: 1}


def test_several_processes_fetch_each_shard_once(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    for shard in shard_set.shards:
        server.faults[shard.file] = [late(0.1)]

    def read_all() -> None:
        manifest = open_shards(server.url, remote)
        for shard in manifest.shards:
            assert manifest.path(shard).read_bytes() == (shard_set.folder / shard.file).read_bytes()

    processes = [FORK.Process(target=read_all) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    until(lambda: server.completed.total() >= 4 + len(shard_set.shards))
    assert server.completed == {"manifest.json": 4, **{shard.file: 1 for shard in shard_set.shards}}


def test_after_a_kill_another_process_goes_on(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    shard = shard_set.shards[0]
    server.faults[shard.file] = [stall(40_000)]
    patient = dataclasses.replace(remote, stall_seconds=100)
    process = FORK.Process(target=lambda: open_shards(server.url, patient).path(shard), daemon=True)
    process.start()
    assert remote.cache
    until(
        lambda: any(
            part.stat().st_size == 40_000 for part in (remote.cache / "shards").glob(".*.part")
        )
    )
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert open_shards(server.url, remote).path(shard).stat().st_size == shard.bytes
    assert server.starts(shard.file) == [0, 40_000]


def test_a_cache_smaller_than_the_set_keeps_its_limit_and_the_data(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    largest = max(shard.bytes for shard in shard_set.shards)
    small = dataclasses.replace(remote, cache_gib=1.5 * largest / 2**30)
    manifest = open_shards(server.url, small)
    for shard in (*manifest.shards, *manifest.shards):
        manifest.path(shard)
        assert sum(path.stat().st_size for path in kept(small)) <= 1.5 * largest
    index = manifest.index("train", "val", "test")
    images, local = (ShardImages(each, index, TRANSFORM) for each in (manifest, shard_set))
    for position in np.random.default_rng(0).permutation(len(index))[:20]:
        assert images.jpeg(position) == local.jpeg(position)
    assert_same_batches(batches(manifest, workers=2), batches(shard_set, workers=0))


def test_what_was_not_used_for_longest_goes_first(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    one, two, three = shard_set.shards[:3]
    room = dataclasses.replace(
        remote, cache_gib=(max(one.bytes, two.bytes) + two.bytes + three.bytes - 1) / 2**30
    )
    manifest = open_shards(server.url, room)
    for shard in (one, two, one, three):
        manifest.path(shard)
        time.sleep(0.02)  # file systems count in steps of some milliseconds
    assert {path.name.split("-", 1)[1] for path in kept(room)} == {one.file, three.file}


def test_nothing_is_dropped_while_that_makes_no_room(
    server: BadServer,
    remote: RemoteConfig,
    shard_set: Manifest,
) -> None:
    one, two = shard_set.shards[:2]
    manifest = open_shards(
        server.url, dataclasses.replace(remote, cache_gib=2.5 * two.bytes / 2**30)
    )
    manifest.path(one)
    assert remote.cache
    part = remote.cache / "shards" / f".{'0' * 32}-other.tar.{2 * two.bytes}.part"
    process = FORK.Process(target=manifest.path, args=(two,), daemon=True)
    with open(part, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process.start()
        process.join(0.5)  # it asks for room again and again
        assert process.is_alive() and len(kept(remote)) == 1
        fcntl.flock(other, fcntl.LOCK_UN)
    process.join(60)
    assert process.exitcode == 0 and not part.exists()


def test_files_of_others_in_the_cache_are_left_alone(
    server: BadServer,
    remote: RemoteConfig,
    shard_set: Manifest,
) -> None:
    largest = max(shard.bytes for shard in shard_set.shards)
    manifest = open_shards(server.url, dataclasses.replace(remote, cache_gib=1.5 * largest / 2**30))
    assert remote.cache
    strays = [
        remote.cache / "shards" / name
        for name in (".DS_Store", ".nfs00000001", ".x.part", "notes.txt")
    ]
    for stray in strays:
        stray.write_bytes(bytes(2 * largest))
    (remote.cache / "shards" / ".gone").symlink_to("nowhere")
    for shard in manifest.shards:
        manifest.path(shard)
    assert all(stray.exists() for stray in strays)


def test_what_a_killed_process_left_makes_room(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    one, two = shard_set.shards[:2]
    manifest = open_shards(
        server.url, dataclasses.replace(remote, cache_gib=(two.bytes + 100) / 2**30)
    )
    assert remote.cache
    part = remote.cache / "shards" / f".{'0' * 32}-{one.file}.{one.bytes}.part"
    part.write_bytes(b"begun")
    assert manifest.path(two).stat().st_size == two.bytes
    assert not part.exists()


def replaced(path: Path, shard: Shard) -> None:
    """Put another shard of the same size there: one image's bytes are another's."""
    tar = bytearray(path.read_bytes())
    tar[shard.offsets[1] + 30] ^= 1
    path.write_bytes(tar)


def test_a_shard_that_is_another_is_fetched_again(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    """Damaged after it was fetched, and planted before."""
    shard = shard_set.shards[0]
    right = (shard_set.folder / shard.file).read_bytes()
    path = open_shards(server.url, remote).path(shard)
    used = path.stat()
    assert open_shards(server.url, remote).path(shard).stat().st_mtime_ns == used.st_mtime_ns
    until(lambda: server.completed[shard.file] == 1)
    replaced(path, shard)
    manifest = open_shards(server.url, remote)
    assert manifest.path(shard).read_bytes() == right
    replaced(path, shard)  # the same process looks at its later change as well
    assert manifest.path(shard).read_bytes() == right
    planted = path.with_name(f"{shard_set.shards[1].sha256[:32]}-{shard_set.shards[1].file}")
    planted.write_bytes(bytes(shard_set.shards[1].bytes))
    assert (
        manifest.path(shard_set.shards[1]).read_bytes()
        == (shard_set.folder / shard_set.shards[1].file).read_bytes()
    )


def test_a_shard_is_hashed_once_and_only_this_users_record_counts(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    """The record's use shows in a change that it cannot know of: the time of modification set back.
    The CRC-32s of its images still do."""
    shard, index = shard_set.shards[0], shard_set.index("train")
    right = (shard_set.folder / shard.file).read_bytes()
    path = open_shards(server.url, remote).path(shard)
    (record,) = path.parent.glob(f".{path.name}.*.hashed")
    assert record.stat().st_mode & 0o777 == 0o600
    before = path.stat()
    replaced(path, shard)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest = open_shards(server.url, remote)
    assert manifest.path(shard) == path and path.read_bytes() != right
    with pytest.raises(InputError, match=f"has CRC-32 .*; remove {path}, which is then fetched"):
        ShardImages(manifest, index, TRANSFORM).jpeg(1)
    record.chmod(0o666)  # anybody may have written it
    assert open_shards(server.url, remote).path(shard).read_bytes() == right
    (record,) = path.parent.glob(f".{path.name}.*.hashed")
    elsewhere = record.with_name("elsewhere")
    os.replace(record, elsewhere)
    record.symlink_to(elsewhere.name)
    before = path.stat()
    replaced(path, shard)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_shards(server.url, remote).path(shard).read_bytes() == right


def test_a_new_version_of_a_shard_is_fetched_and_the_old_one_not_used(
    own_shard_set: Manifest, remote: RemoteConfig
) -> None:
    shard = own_shard_set.shards[0]
    with BadServer(own_shard_set.folder) as server:
        changed = bytearray(open_shards(server.url, remote).path(shard).read_bytes())
        changed[shard.offsets[0] + 30] ^= 1
        (own_shard_set.folder / shard.file).write_bytes(changed)
        entry = dataclasses.replace(shard, sha256=hashlib.sha256(changed).hexdigest())
        dataclasses.replace(own_shard_set, shards=(entry, *own_shard_set.shards[1:])).save()
        manifest = open_shards(server.url, remote)
        assert manifest.path(manifest.shards[0]).read_bytes() == bytes(changed)


def test_a_cache_that_cannot_be_used_is_one_clear_line(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cache folder .*/file cannot be used \(Not a directory\); name a folder"
    ):
        open_shards(server.url, dataclasses.replace(remote, cache=tmp_path / "file"))
    shard = shard_set.shards[0]
    manifest = open_shards(
        server.url, dataclasses.replace(remote, cache_gib=(shard.bytes - 1) / 2**30)
    )
    with pytest.raises(
        InputError,
        match=r"train-0.tar has 0.001 GiB, more than data.remote.cache_gib \(.*\); set it",
    ):
        manifest.path(shard)

    def on_a_small_disk() -> None:
        with pytest.raises(
            TransientError, match=rf"cache is full \({os.strerror(errno.ENOSPC)}\); free some space"
        ):
            open_shards(server.url, remote).path(shard)

    assert remote.cache
    remote.cache.mkdir(exist_ok=True)
    apart(on_a_small_disk, disk=(remote.cache, "size=96k"))


def test_what_others_planted_in_the_cache_is_not_written_through(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest, tmp_path: Path
) -> None:
    """Links where a shard begins, where it ends up, and where the lock is."""
    manifest = open_shards(server.url, remote)
    assert remote.cache
    shards, victim = remote.cache / "shards", tmp_path / "victim"
    victim.write_bytes(b"precious" * 10_000)
    for number, shard in enumerate(shard_set.shards[:4]):
        whole = f"{shard.sha256[:32]}-{shard.file}"
        part = shards / f".{whole}.{shard.bytes}.part"
        if number == 0:
            part.symlink_to(victim)
        elif number == 1:
            part.symlink_to(tmp_path / "new")
        elif number == 2:
            os.link(victim, part)
        else:
            os.truncate(victim, shard.bytes)
            (shards / whole).symlink_to(victim)
        before = victim.read_bytes()
        path = manifest.path(shard)
        assert path.read_bytes() == (shard_set.folder / shard.file).read_bytes()
        assert not path.is_symlink() and path.stat().st_nlink == 1
        assert victim.read_bytes() == before and not (tmp_path / "new").exists()
    (shards / ".lock").unlink()
    (shards / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(
        InputError,
        match=r"cannot be used \(.*/shards/.lock is a link, which another user may have planted\);",
    ):
        manifest.path(shard_set.shards[4])
    assert not (tmp_path / "new").exists()


def test_in_a_folder_for_all_the_cache_is_this_users_own(
    server: BadServer, remote: RemoteConfig, tmp_path: Path
) -> None:
    tmp_path.chmod(0o1777)
    open_shards(server.url, remote)
    assert remote.cache and remote.cache.stat().st_mode & 0o077 == 0
    if os.geteuid() == 0:  # who alone can give a folder away
        os.chown(remote.cache, 65534, 65534)
        with pytest.raises(
            InputError, match=r"cannot be used \(.*/cache was made by another user\); name a folder"
        ):
            open_shards(server.url, remote)


def test_the_cache_must_hold_what_training_reads_at_a_time(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    here = TrainingSet(manifest=shard_set, index=shard_set.index("train"), sampling=SAMPLING)
    both = sum(shard.bytes for shard in shard_set.shards_of("train"))

    def with_cache(size: int, sampling: Sampling) -> TrainingSet:
        manifest = open_shards(server.url, dataclasses.replace(remote, cache_gib=size / 2**30))
        return dataclasses.replace(here, manifest=manifest, sampling=sampling)

    for sampling in (SAMPLING, dataclasses.replace(SAMPLING, shuffle="shards")):
        check_cache(with_cache(both, sampling), world_size=1, ranks_here=1)
        with pytest.raises(
            InputError, match=r"training reads 0.001 GiB of shards at a time, more than data.remote"
        ):
            check_cache(with_cache(both - 1, sampling), world_size=1, ranks_here=1)
    check_cache(here, world_size=1, ranks_here=1)


def test_look_ahead_fetches_in_the_plans_order_and_not_too_far(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    manifest = open_shards(server.url, remote)
    files = [shard.file for shard in manifest.shards]
    order = [2, 0, 1, 4, 3, 5]
    with contextlib.closing(
        LookAhead(manifest, [{shard} for shard in order for _ in range(3)])
    ) as ahead:
        for done in range(18):
            # The shard of the batch taken last is there, and so is the one after it.
            until(lambda: len(kept(remote)) >= min(6, max(0, done - 1) // 3 + 2))  # noqa: B023 (called at once)
            time.sleep(0.03)  # in which another could come
            assert len(kept(remote)) == min(6, max(0, done - 1) // 3 + 2)
            ahead.taken()
    asked = [asked.file for asked in server.asked if asked.file != "manifest.json"]
    assert asked == [files[number] for number in order]


def children() -> list[str]:
    """Processes of this one; other tests' ranks may be among them."""
    return [child.name for child in multiprocessing.active_children()]


def test_look_ahead_leaves_errors_to_the_reader_and_ends_when_told(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest
) -> None:
    manifest = open_shards(server.url, dataclasses.replace(remote, stall_seconds=100))
    files = [shard.file for shard in manifest.shards]
    server.faults[files[0]] = [status(404), status(404)]
    server.faults[files[1]] = [stall(30_000)]
    with contextlib.closing(LookAhead(manifest, [{0, 1, 2}])):
        until(lambda: bool(server.starts(files[1])))
        # No thread: a process forked in the midst of its fetch would find locks that nobody ever
        # gives back.
        assert "look-ahead" in children()
    assert "look-ahead" not in children()
    with pytest.raises(InputError, match="404"):
        manifest.path(manifest.shards[0])
    assert not kept(remote) and not server.starts(files[2])
