"""Shards behind a URL arrive whole, once, and within the cache's limit, whatever the network does."""

from __future__ import annotations

import base64
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from bad_server import BadServer, chunked, drop, flip, late, shorten, stall, status, whole

from namr_dist.config import RemoteConfig
from namr_dist.data import remote as transport
from namr_dist.data.augment import TrainTransform
from namr_dist.data.cache import ShardCache, check_cache
from namr_dist.data.location import open_shards
from namr_dist.data.manifest import Manifest
from namr_dist.data.plan import Sampling
from namr_dist.data.prefetch import LookAhead
from namr_dist.data.stream import ShardImages, TrainPlan, stream
from namr_dist.errors import InputError

FORK = multiprocessing.get_context("fork")
TRANSFORM = TrainTransform(size=32, crop_scale=(0.3, 1.0), crop_ratio=(0.75, 1.33), flip=True, brightness=0.2,
                           contrast=0.2, saturation=0.2)
HOW = Sampling(classes_per_batch=4, images_per_class=3)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.01)


@pytest.fixture
def server(shard_set: Manifest) -> Iterator[BadServer]:
    with BadServer(shard_set.folder) as server:
        yield server


@pytest.fixture
def remote(tmp_path: Path) -> RemoteConfig:
    return RemoteConfig(cache=tmp_path / "cache", retries=2, stall_seconds=0.5)


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def kept(remote: RemoteConfig) -> list[Path]:
    """Whole shards in the cache."""
    assert remote.cache
    return sorted(path for path in (remote.cache / "shards").iterdir() if not path.name.startswith("."))


def batches(manifest: Manifest, *, workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """An epoch."""
    index = manifest.index("train")
    plan = TrainPlan(index=index, how=HOW, seed=1, rank=0, world_size=1, steps=3)
    return [(batch.index_b, batch.images_bHW3)
            for batch in stream(ShardImages(manifest, index, TRANSFORM), plan, workers=workers)]


def assert_same_batches(one: list, other: list) -> None:
    assert len(one) == len(other) == 3
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("faults", "starts"), [
    ([drop(30_000)], [0, 30_000]),
    ([drop(30_000), drop(40_000)], [0, 30_000, 40_000]),
    ([drop(30_000), whole], [0, 30_000]),
    ([stall(30_000)], [0, 30_000]),
    ([stall(0)], [0, 0]),
    ([shorten(30_000)], [0, 0]),
    ([chunked(30_000)], [0, 30_000]),
    ([flip(30_000)], [0, 0]),
    ([drop(30_000), flip(40_000)], [0, 30_000, 0]),
    ([drop(30_000), status(416)], [0, 30_000, 0]),
    ([status(500)], [0, 0]),
    ([status(503, Retry_After="0"), status(429)], [0, 0, 0]),
    ([late(0.2)], [0]),
])
def test_a_shard_comes_whole_and_from_where_it_broke_off(server: BadServer, remote: RemoteConfig, shard_set: Manifest,
                                                         faults: list, starts: list[int]) -> None:
    shard = shard_set.shards[0]
    server.faults[shard.file] = list(faults)
    path = open_shards(server.url, remote).path(shard)
    assert path.read_bytes() == (shard_set.folder / shard.file).read_bytes()
    assert server.starts(shard.file) == starts


def test_a_redirect_is_followed_without_the_password(server: BadServer, shard_set: Manifest, remote: RemoteConfig,
                                                     ) -> None:
    shard = shard_set.shards[0]
    with BadServer(shard_set.folder) as other:
        server.faults[shard.file] = [status(302, Location=f"{server.url}/moved/{shard.file}"),
                                     status(307, Location=f"{other.url}/{shard.file}")]
        manifest = open_shards(server.url.replace("http://", "http://me:p%40ss@"), remote)
        assert manifest.path(shard).stat().st_size == shard.bytes
    given = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert [asked.authorization for asked in server.asked] == [given, given, given]
    assert [asked.authorization for asked in other.asked] == [None]


def test_an_epoch_over_a_bad_network_is_that_of_the_folder(server: BadServer, remote: RemoteConfig,
                                                           shard_set: Manifest) -> None:
    first, second = shard_set.shards_of("train")
    server.faults[first.file] = [drop(20_000), status(503)]
    server.faults[second.file] = [flip(30_000), stall(50_000)]
    assert_same_batches(batches(open_shards(server.url, remote), workers=2), batches(shard_set, workers=0))
    assert server.completed == {"manifest.json": 1, first.file: 1, second.file: 1}


def test_several_processes_fetch_each_shard_once(server: BadServer, remote: RemoteConfig, shard_set: Manifest) -> None:
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
    assert server.completed == {"manifest.json": 4, **{shard.file: 1 for shard in shard_set.shards}}


def test_after_a_kill_another_process_goes_on(server: BadServer, remote: RemoteConfig, shard_set: Manifest) -> None:
    shard = shard_set.shards[0]
    server.faults[shard.file] = [stall(40_000)]
    patient = dataclasses.replace(remote, stall_seconds=100)
    process = FORK.Process(target=lambda: open_shards(server.url, patient).path(shard))
    process.start()
    assert remote.cache
    until(lambda: any(part.stat().st_size == 40_000 for part in (remote.cache / "shards").glob(".*.part")))
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert open_shards(server.url, remote).path(shard).stat().st_size == shard.bytes
    assert server.starts(shard.file) == [0, 40_000]


def test_a_cache_smaller_than_the_set_keeps_its_limit_and_the_data(server: BadServer, remote: RemoteConfig,
                                                                   shard_set: Manifest) -> None:
    largest = max(shard.bytes for shard in shard_set.shards)
    small = dataclasses.replace(remote, cache_gib=1.5 * largest / 2**30)
    manifest = open_shards(server.url, small)
    for shard in (*manifest.shards, *manifest.shards):
        manifest.path(shard)
        assert sum(path.stat().st_size for path in kept(small)) <= 1.5 * largest
    index = manifest.index("train", "val", "test")
    images, local = (ShardImages(each, index, TRANSFORM) for each in (manifest, shard_set))
    for place in np.random.default_rng(0).permutation(len(index))[:20]:
        assert images.jpeg(place) == local.jpeg(place)
    assert_same_batches(batches(manifest, workers=2), batches(shard_set, workers=0))


def test_what_was_not_used_for_longest_goes_first(server: BadServer, remote: RemoteConfig, shard_set: Manifest) -> None:
    one, two, three = shard_set.shards[:3]
    room = dataclasses.replace(remote, cache_gib=(max(one.bytes, two.bytes) + two.bytes + three.bytes - 1) / 2**30)
    manifest = open_shards(server.url, room)
    for shard in (one, two, one, three):
        manifest.path(shard)
        time.sleep(0.02)  # file systems count in steps of some milliseconds
    assert {path.name.split("-", 1)[1] for path in kept(room)} == {one.file, three.file}


def test_nothing_is_dropped_while_that_makes_no_room(server: BadServer, remote: RemoteConfig, shard_set: Manifest,
                                                     ) -> None:
    one, two = shard_set.shards[:2]
    manifest = open_shards(server.url, dataclasses.replace(remote, cache_gib=2.5 * two.bytes / 2**30))
    manifest.path(one)
    assert remote.cache
    part = remote.cache / "shards" / f".{'0' * 32}-other.tar.{2 * two.bytes}.part"
    process = FORK.Process(target=manifest.path, args=(two,))
    with open(part, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process.start()
        process.join(0.5)  # it asks for room again and again
        assert process.is_alive() and len(kept(remote)) == 1
        fcntl.flock(other, fcntl.LOCK_UN)
    process.join(60)
    assert process.exitcode == 0 and not part.exists()


def test_files_of_others_in_the_cache_are_left_alone(server: BadServer, remote: RemoteConfig, shard_set: Manifest,
                                                     ) -> None:
    largest = max(shard.bytes for shard in shard_set.shards)
    manifest = open_shards(server.url, dataclasses.replace(remote, cache_gib=1.5 * largest / 2**30))
    assert remote.cache
    strays = [remote.cache / "shards" / name for name in (".DS_Store", ".nfs00000001", ".x.part", "notes.txt")]
    for stray in strays:
        stray.write_bytes(bytes(2 * largest))
    (remote.cache / "shards" / ".gone").symlink_to("nowhere")
    for shard in manifest.shards:
        manifest.path(shard)
    assert all(stray.exists() for stray in strays)


def test_what_a_killed_process_left_makes_room(server: BadServer, remote: RemoteConfig, shard_set: Manifest) -> None:
    one, two = shard_set.shards[:2]
    manifest = open_shards(server.url, dataclasses.replace(remote, cache_gib=(two.bytes + 100) / 2**30))
    assert remote.cache
    part = remote.cache / "shards" / f".{'0' * 32}-{one.file}.{one.bytes}.part"
    part.write_bytes(b"begun")
    assert manifest.path(two).stat().st_size == two.bytes
    assert not part.exists()


def test_a_new_version_of_a_shard_is_fetched_and_the_old_one_not_used(own_shard_set: Manifest,
                                                                      remote: RemoteConfig) -> None:
    shard = own_shard_set.shards[0]
    with BadServer(own_shard_set.folder) as server:
        changed = bytearray(open_shards(server.url, remote).path(shard).read_bytes())
        changed[shard.offsets[0] + 30] ^= 1
        (own_shard_set.folder / shard.file).write_bytes(changed)
        entry = dataclasses.replace(shard, sha256=hashlib.sha256(changed).hexdigest())
        dataclasses.replace(own_shard_set, shards=(entry, *own_shard_set.shards[1:])).save()
        manifest = open_shards(server.url, remote)
        assert manifest.path(manifest.shards[0]).read_bytes() == bytes(changed)


@pytest.mark.parametrize(("faults", "said"), [
    ([status(404)], r"cannot be fetched: the server answers 404 Not Found; check the address, or copy the file there$"),
    ([status(403)], r"cannot be fetched: the server answers 403 Forbidden; check the credentials"),
    ([status(302, Location="file:///etc/hostname")], r"the server answers 302 Found, without end or to something other "
                                                     r"than http; check the address$"),
    ([status(302, Location="ftp://127.0.0.1/x")], r"the server answers 302 Found, without end or"),
    ([status(500)] * 3, r"cannot be fetched: 3 tries, the last said: the server answers 500 Internal Server Error; "
                        r"check the network and the file there; training goes on with --resume$"),
    ([stall(10_000)] * 3, r"3 tries, the last said: no byte came for 0.5 s;"),
    ([flip(5)] * 3, r"3 tries, the last said: it has sha256 [0-9a-f]{12}…, its manifest says [0-9a-f]{12}…;"),
    ([shorten(10_000)] * 3, r"3 tries, the last said: it has 10000 bytes there, its manifest says \d+;"),
    ([drop(10_000)] * 3, r"3 tries, the last said: the connection broke off \d+ bytes before the end;"),
])
def test_what_cannot_be_fetched_is_one_clear_line(server: BadServer, remote: RemoteConfig, shard_set: Manifest,
                                                  faults: list, said: str) -> None:
    shard = shard_set.shards[0]
    manifest = open_shards(server.url, remote)
    server.faults[shard.file] = list(faults)
    with pytest.raises(InputError, match=said) as error:
        manifest.path(shard)
    assert str(error.value).startswith(f"{server.url}/{shard.file} cannot") and "\n" not in str(error.value)
    assert len(server.starts(shard.file)) == len(faults)


@pytest.mark.parametrize(("location", "said"), [
    ("http://127.0.0.1:9/set", r"^http://127.0.0.1:9/set/manifest.json cannot be fetched: 3 tries, the last said: .*"
                               r"Connection refused; check the address and the network$"),
    ("http://no-such-host.invalid/set", "its host is not known"),
    ("http://127.0.0.1:port/set", "is no URL; give a folder or a URL such as https://HOST/FOLDER$"),
    ("https:///set", "is no URL"),
    ("http://a..b/set", r"^http://a..b/set/manifest.json cannot be fetched: it is no URL \(.*\); check the address$"),
    (f"http://{'a' * 64}.invalid/set", r"it is no URL \(.*\); check the address$"),
    ("nonsense://bucket/set", "nothing here reads such URLs; give one of http"),
    ("s3://bucket/set", "a package is missing: Install s3fs"),
    ("memory://nothing", "it is not there; check the address"),
    ("pipe:cat /set", r"^pipe:cat … has no {} where the file's name belongs; put it there$"),
    ("pipe:cat {}; exit 3", r"^manifest.json from pipe:cat … cannot be fetched: 3 tries, the last said: the command "
                            r"ended with exit code 3;"),
    ("pipe:sleep 100; cat {}", "no byte came for 0.5 s"),
])
def test_a_location_that_is_none_is_one_clear_line(remote: RemoteConfig, location: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        open_shards(location, remote)
    assert "\n" not in str(error.value)


def test_pauses_grow_and_are_as_long_as_the_server_asks(server: BadServer, remote: RemoteConfig, shard_set: Manifest,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(transport, "_LONGEST_WAIT_S", 0.3)
    shard = shard_set.shards[0]
    server.faults[shard.file] = [status(503, Retry_After="3600"), status(503, Retry_After="soon"), status(503)]
    open_shards(server.url, dataclasses.replace(remote, retries=3)).path(shard)
    pauses = [line.rsplit(" in ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    assert pauses == ["0.3 s", "0.0 s", "0.0 s"]
    assert transport._asked_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert transport._asked_wait("Wed, 21 Oct 2195 07:28:00 GMT") > 1e9


def test_credentials_are_never_told(server: BadServer, remote: RemoteConfig, capfd: pytest.CaptureFixture[str]) -> None:
    server.faults["manifest.json"] = [status(500), status(500), status(404)]
    for location in (server.url.replace("http://", "http://me:secret@") + "?sig=secret#secret", "http://me:secret@:x/y",
                     "http://me:/secret@:x/y", "http://me:?secret@:x/y", "http://127.0.0.1:x/y?sig=a@secret",
                     "s3://secret:secret@bucket/x", "pipe:false --token secret {}", "pipe:false --token secret",
                     "pipe:TOKEN=secret false {}", "pipe:T='a secret' false", "pipe:{false,secret}"):
        with pytest.raises(InputError) as error:
            open_shards(location, remote)
        assert "secret" not in str(error.value)
    assert "secret" not in capfd.readouterr().err


def test_any_way_to_the_set_gives_the_same_bytes(shard_set: Manifest, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(f"{shard_set.folder}/", "/set/", recursive=True)
    for number, url in enumerate(("memory://set", f"pipe:cat {shard_set.folder}/{{}}", f"file://{shard_set.folder}")):
        manifest = open_shards(url, RemoteConfig(cache=tmp_path / str(number), retries=0))
        assert manifest == dataclasses.replace(shard_set, folder=manifest.folder)
        for shard in manifest.shards:
            assert manifest.path(shard).read_bytes() == (shard_set.folder / shard.file).read_bytes()
    assert not (tmp_path / "2").exists()


def test_fsspec_goes_on_where_it_broke_off(shard_set: Manifest, remote: RemoteConfig) -> None:
    store = fsspec.filesystem("memory")
    store.put(f"{shard_set.folder}/", "/set/", recursive=True)
    shard = shard_set.shards[0]
    whole_file = (shard_set.folder / shard.file).read_bytes()
    manifest = open_shards("memory://set", remote)
    assert isinstance(manifest.source, ShardCache) and remote.cache
    part = remote.cache / "shards" / f".{shard.sha256[:32]}-{shard.file}.{shard.bytes}.part"
    part.write_bytes(whole_file[:30_000])
    store.pipe_file(f"/set/{shard.file}", bytes(30_000) + whole_file[30_000:])
    assert manifest.path(shard).read_bytes() == whole_file


def test_a_manifest_that_is_none_names_its_url(own_shard_set: Manifest, remote: RemoteConfig) -> None:
    manifest = own_shard_set.folder / "manifest.json"
    good = json.loads(manifest.read_text())
    with BadServer(own_shard_set.folder) as server:
        manifest.write_text(manifest.read_text()[:500])
        with pytest.raises(InputError, match=rf"^{server.url}/manifest.json, fetched as .* cannot be read"):
            open_shards(server.url, remote)
        good["shards"][0]["sha256"] = "../../../x"
        manifest.write_text(json.dumps(good))
        with pytest.raises(InputError, match=r"train-0.tar has sha256 '../../../x', not 64 hex digits; rebuild"):
            open_shards(server.url, remote)


def test_a_manifest_without_end_is_refused(remote: RemoteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_LONGEST_READ_BYTES", 5 << 20)
    with pytest.raises(InputError, match=r"^manifest.json from pipe:yes … cannot be fetched: it has more than 0.0\d+ "
                                         "GiB; check the address$"):
        open_shards("pipe:yes {}", remote)


def test_a_redirect_to_no_host_is_one_clear_line(server: BadServer, remote: RemoteConfig) -> None:
    server.faults["manifest.json"] = [status(302, Location="http://a..b/"), status(302, Location="http://[x/")]
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^{server.url}/manifest.json cannot be fetched: it is no URL"):
            open_shards(server.url, remote)


def test_a_command_is_given_no_name_that_a_shell_would_read(own_shard_set: Manifest, remote: RemoteConfig) -> None:
    shard = dataclasses.replace(own_shard_set.shards[0], file="$(touch x).tar")
    manifest = open_shards(f"pipe:cat {own_shard_set.folder}/{{}}", remote)
    with pytest.raises(InputError, match="a command can take no name with such characters"):
        manifest.path(shard)


def test_a_cache_that_cannot_be_used_is_one_clear_line(server: BadServer, remote: RemoteConfig, shard_set: Manifest,
                                                       tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache folder .*/file cannot be used \(Not a directory\); name a folder"):
        open_shards(server.url, dataclasses.replace(remote, cache=tmp_path / "file"))
    shard = shard_set.shards[0]
    manifest = open_shards(server.url, dataclasses.replace(remote, cache_gib=(shard.bytes - 1) / 2**30))
    with pytest.raises(InputError, match=r"train-0.tar has 0.001 GiB, more than data.remote.cache_gib \(.*\); set it"):
        manifest.path(shard)
    manifest = open_shards(server.url, remote)
    # Writing to this device fails as on a full disk.
    assert remote.cache
    (remote.cache / "shards" / f".{shard.sha256[:32]}-{shard.file}.{shard.bytes}.part").symlink_to("/dev/full")
    with pytest.raises(InputError, match=rf"cache is full \({os.strerror(errno.ENOSPC)}\); free some space"):
        manifest.path(shard)


def test_the_cache_must_hold_what_training_reads_at_a_time(server: BadServer, remote: RemoteConfig,
                                                           shard_set: Manifest) -> None:
    index = shard_set.index("train")
    both = sum(shard.bytes for shard in shard_set.shards_of("train"))
    for need, how in ((both, HOW), (both, dataclasses.replace(HOW, shuffle="shards"))):
        check_cache(open_shards(server.url, dataclasses.replace(remote, cache_gib=need / 2**30)), index, how,
                    world_size=1, ranks_here=1)
        with pytest.raises(InputError, match=r"training reads 0.001 GiB of shards at a time, more than data.remote"):
            check_cache(open_shards(server.url, dataclasses.replace(remote, cache_gib=(need - 1) / 2**30)), index, how,
                        world_size=1, ranks_here=1)
    check_cache(shard_set, index, HOW, world_size=1, ranks_here=1)


def test_look_ahead_fetches_in_the_plans_order_and_not_too_far(server: BadServer, remote: RemoteConfig,
                                                               shard_set: Manifest) -> None:
    manifest = open_shards(server.url, remote)
    files = [shard.file for shard in manifest.shards]
    order = [2, 0, 1, 4, 3, 5]
    ahead = LookAhead(manifest, [{shard} for shard in order for _ in range(3)])
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


def test_look_ahead_leaves_errors_to_the_reader_and_ends_when_told(server: BadServer, remote: RemoteConfig,
                                                                   shard_set: Manifest) -> None:
    manifest = open_shards(server.url, remote)
    files = [shard.file for shard in manifest.shards]
    server.faults[files[0]] = [status(404), status(404)]
    server.faults[files[1]] = [stall(30_000)]
    ahead = LookAhead(manifest, [{0, 1, 2}])
    until(lambda: bool(server.starts(files[1])))
    # No thread: a process forked in the midst of its fetch would find locks that nobody ever gives back.
    assert "look-ahead" in children()
    ahead.close()
    assert "look-ahead" not in children()
    with pytest.raises(InputError, match="404"):
        manifest.path(manifest.shards[0])
    assert not kept(remote) and not server.starts(files[2])

