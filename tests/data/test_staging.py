"""A staged set is the set, whole and checked, whatever was there before and whoever was killed in
the midst."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from bad_server import BadServer, drop, flip, late, stall
from conftest import TRANSFORM, launch
from namespaces import apart

from namr_dist.cli.main import main
from namr_dist.config import RemoteConfig
from namr_dist.data.read.stream import ShardImages
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import shard_problems, verify_shards
from namr_dist.data.staging import stage
from namr_dist.errors import InputError, ReportedError, TransientError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def own_cache(remote: RemoteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Manifests from URLs go there, and tries follow one another soon."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def change_a_bit(path: Path, position: int) -> None:
    body = bytearray(path.read_bytes())
    body[position] ^= 1
    path.write_bytes(body)


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


# What comes of it.


@pytest.mark.parametrize("location", ["folder", "file", "http", "pipe"])
def test_the_staged_set_is_the_set_from_wherever_it_comes(
    server: BadServer,
    shard_set: Manifest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    location: str,
) -> None:
    server.faults[shard_set.shards[0].file] = [drop(20_000), flip(30_000)]
    words = {
        "folder": str(shard_set.folder),
        "file": f"file://{shard_set.folder}",
        "http": server.url,
        "pipe": f"pipe:cat {shard_set.folder}/{{}}",
    }
    assert main(["shards", "stage", words[location], str(tmp_path / "to")]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("\n") and len(printed.out.splitlines()) == 1
    folder = Path(printed.out.removesuffix("\n"))
    digest = hashlib.sha256((shard_set.folder / "manifest.json").read_bytes()).hexdigest()
    assert folder == tmp_path / "to" / f"synthetic-{digest[:12]}"
    size = sum(shard.bytes for shard in shard_set.shards) / 2**20
    assert re.search(
        rf"^staged 132 images, {size:.1f} MiB, in \d+.\d s; 0 of 6 shards were there already$",
        printed.err,
        re.MULTILINE,
    )
    assert files(folder) == files(shard_set.folder)
    staged = Manifest.load(folder)
    assert dataclasses.replace(staged, folder=shard_set.folder) == shard_set
    index = shard_set.index("train", "val", "test")
    theirs, mine = (ShardImages(manifest, index, TRANSFORM) for manifest in (shard_set, staged))
    assert all(mine.jpeg(position) == theirs.jpeg(position) for position in range(len(index)))


def test_some_splits_alone_and_the_others_later(shard_set: Manifest, tmp_path: Path) -> None:
    some = stage(str(shard_set.folder), tmp_path, ["train", "test"])
    assert (some.images, some.shards, some.were_there) == (72 + 36, 4, 0)
    assert set(files(some.folder)) == {
        "manifest.json",
        "train-0.tar",
        "train-1.tar",
        "test-0.tar",
        "test-1.tar",
    }
    assert verify_shards(Manifest.load(some.folder), ("train", "test")) == 108
    every = stage(str(shard_set.folder), tmp_path)
    assert (every.folder, every.shards, every.were_there) == (some.folder, 6, 4)
    assert files(every.folder) == files(shard_set.folder)
    with pytest.raises(InputError, match=r"has no split 'tests'; it has train, val, test$"):
        stage(str(shard_set.folder), tmp_path, ["tests"])


def test_versions_of_a_set_lie_side_by_side(own_shard_set: Manifest, tmp_path: Path) -> None:
    old = stage(str(own_shard_set.folder), tmp_path / "to").folder
    before = files(old)
    dataclasses.replace(own_shard_set, description="stripes again").save()
    new = stage(str(own_shard_set.folder), tmp_path / "to").folder
    assert new != old and files(old) == before and files(new) == files(own_shard_set.folder)


def test_a_name_leads_nowhere_else(own_shard_set: Manifest, tmp_path: Path) -> None:
    dataclasses.replace(own_shard_set, name="../../a set\n" + "é" * 300).save()
    folder = stage(str(own_shard_set.folder), tmp_path / "to").folder
    assert folder.parent == tmp_path / "to" and re.fullmatch(
        r"\.\._\.\._a_set__{48}-[0-9a-f]{12}", folder.name
    )


# What was there before.


def test_what_is_whole_stays_and_what_is_damaged_is_copied_again(
    shard_set: Manifest, tmp_path: Path
) -> None:
    folder = stage(str(shard_set.folder), tmp_path).folder
    rotten, short, gone, *good = (folder / shard.file for shard in shard_set.shards)
    before = [path.stat() for path in good]
    change_a_bit(rotten, 30_000)
    os.truncate(short, 1000)
    gone.unlink()
    again = stage(str(shard_set.folder), tmp_path)
    assert (again.folder, again.were_there) == (folder, 3) and files(folder) == files(
        shard_set.folder
    )
    after = [path.stat() for path in good]
    assert [(file.st_ino, file.st_mtime_ns) for file in after] == [
        (file.st_ino, file.st_mtime_ns) for file in before
    ]


def test_a_copy_goes_on_where_it_broke_off(own_shard_set: Manifest, tmp_path: Path) -> None:
    """What precedes is not read again: it is damaged there by now."""
    folder = stage(str(own_shard_set.folder), tmp_path / "to", ["val"]).folder
    shard = own_shard_set.shards[0]
    whole = (own_shard_set.folder / shard.file).read_bytes()
    (folder / f".{shard.file}.part").write_bytes(whole[:30_000])
    change_a_bit(own_shard_set.folder / shard.file, 5)
    stage(str(own_shard_set.folder), tmp_path / "to")
    assert (folder / shard.file).read_bytes() == whole


@pytest.mark.parametrize(
    "left", [bytes(30_000), bytes(184_320), bytes(200_000)], ids=["short", "full", "long"]
)
def test_an_unfinished_copy_that_a_crash_has_left_damaged_is_begun_anew(
    shard_set: Manifest, tmp_path: Path, left: bytes
) -> None:
    assert shard_set.shards[0].bytes == 184_320
    folder = stage(str(shard_set.folder), tmp_path, ["val"]).folder
    (folder / ".train-0.tar.part").write_bytes(left)
    assert stage(str(shard_set.folder), tmp_path).were_there == 2
    assert files(folder) == files(shard_set.folder)


def test_links_that_others_planted_are_not_written_through(
    shard_set: Manifest, tmp_path: Path
) -> None:
    to, victim = tmp_path / "to", tmp_path / "victim"
    folder = stage(str(shard_set.folder), to, ["val"]).folder
    one, other, third, *_ = shard_set.shards
    precious = b"precious" * (one.bytes // 8)
    victim.write_bytes(precious)
    (folder / f".{one.file}.part").symlink_to(victim)
    os.link(victim, folder / f".{other.file}.part")
    (folder / third.file).unlink()
    (folder / third.file).symlink_to(shard_set.folder / third.file)
    stage(str(shard_set.folder), to)
    assert victim.read_bytes() == precious and victim.stat().st_nlink == 1
    assert files(folder) == files(shard_set.folder)
    assert not any(path.is_symlink() for path in folder.iterdir())
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(
        InputError, match=r"cannot be used \(.*/.lock is a link, which another user"
    ):
        stage(str(shard_set.folder), to)
    assert not (tmp_path / "new").exists()


def test_in_a_folder_for_all_the_staged_set_is_this_users_own(
    shard_set: Manifest, tmp_path: Path
) -> None:
    tmp_path.chmod(0o1777)
    folder = stage(str(shard_set.folder), tmp_path, ["val"]).folder
    assert folder.stat().st_mode & 0o077 == 0
    if os.geteuid() == 0:  # who alone can give a folder away
        os.chown(folder, 65534, 65534)
        with pytest.raises(
            InputError, match=r"cannot be used \(.* was made by another user\); stage"
        ):
            stage(str(shard_set.folder), tmp_path)


# Several processes, and kills.


def test_killed_again_and_again_it_gets_done_and_is_never_half_a_set(
    shard_set: Manifest, tmp_path: Path
) -> None:
    for attempt in count():
        process = FORK.Process(target=stage, args=(str(shard_set.folder), tmp_path))
        process.start()
        process.join(0.001 * 1.3**attempt)
        process.kill()
        process.join()
        for manifest in tmp_path.glob("*/manifest.json"):
            verify_shards(Manifest.load(manifest.parent), shard_set.splits)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    # Of a kill as it was written.
    left = {name for name in files(folder) if name.startswith(".manifest.json.")}
    assert {name: body for name, body in files(folder).items() if name not in left} == files(
        shard_set.folder
    )


def test_after_a_kill_in_the_midst_the_one_that_waits_goes_on(
    server: BadServer, shard_set: Manifest, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shard, to = shard_set.shards[0], tmp_path / "to"
    server.faults[shard.file] = [stall(40_000)]
    first, second = (
        FORK.Process(target=stage, args=(server.url, to), daemon=True) for _ in range(2)
    )
    first.start()
    until(lambda: any(part.stat().st_size == 40_000 for part in to.glob(f"*/.{shard.file}.part")))
    second.start()
    until(lambda: "another process stages into" in capfd.readouterr().err)
    assert not list(to.glob("*/manifest.json"))
    first.kill()
    second.join(60)
    assert second.exitcode == 0 and files(next(to.iterdir())) == files(shard_set.folder)
    assert server.starts(shard.file) == [0, 40_000]


def test_of_several_at_once_one_copies(
    server: BadServer, shard_set: Manifest, tmp_path: Path
) -> None:
    for shard in shard_set.shards:
        server.faults[shard.file] = [late(0.1)]
    processes = [FORK.Process(target=stage, args=(server.url, tmp_path / "to")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [len(server.starts(shard.file)) for shard in shard_set.shards] == [1] * 6
    (folder,) = (tmp_path / "to").iterdir()
    assert files(folder) == files(shard_set.folder)


# What cannot be staged.


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "it is not there; copy it there or rebuild the shard set$"),
        (
            lambda path: os.truncate(path, 5000),
            r"2 tries, the last said: it has 5000 bytes there, its manifest says \d+;",
        ),
        (
            lambda path: change_a_bit(path, 30_000),
            "2 tries, the last said: it has sha256 [0-9a-f]{12}…, its manifest says "
            "[0-9a-f]{12}…; check the file there or rebuild the shard set; staging",
        ),
        (
            lambda path: (path.unlink(), path.mkdir()),
            "Is a directory; make it a file that can be read$",
        ),
        (
            lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")),
            "2 tries, the last said: (Invalid argument|Input/output error); check the file there",
        ),
    ],
    ids=["missing", "short", "changed", "folder", "unreadable"],
)
def test_a_source_that_is_damaged_is_named_and_leaves_no_set(
    own_shard_set: Manifest, tmp_path: Path, damage: Callable, said: str
) -> None:
    path = own_shard_set.folder / "val-0.tar"
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(ReportedError, match=f"^{path} cannot be fetched: .*{said}") as error:
        stage(str(own_shard_set.folder), tmp_path / "to")
    # A storage that fails may answer later; what is wrong there stays so.
    assert isinstance(error.value, TransientError) == ("Input/output" in said)
    assert "\n" not in str(error.value)
    (folder,) = (tmp_path / "to").iterdir()
    assert not (folder / "manifest.json").exists() and not (folder / path.name).exists()
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_bytes(whole)
    # Those before it; how far those behind it came, varies.
    assert stage(str(own_shard_set.folder), tmp_path / "to").were_there in range(2, 6)
    assert files(folder) == files(own_shard_set.folder)


@pytest.mark.parametrize("inside", [".", "to", "to/deeper"])
def test_nothing_is_staged_into_the_set_itself(
    own_shard_set: Manifest, tmp_path: Path, inside: str
) -> None:
    before = files(own_shard_set.folder)
    (tmp_path / "link").symlink_to(own_shard_set.folder)
    with pytest.raises(
        InputError,
        match=r"is the shard set's own folder or lies in it; give a folder on this machine",
    ):
        stage(str(own_shard_set.folder), tmp_path / "link" / inside)
    assert files(own_shard_set.folder) == before


def test_too_small_a_disk_is_told_before_the_first_byte(
    shard_set: Manifest, tmp_path: Path
) -> None:
    """In a mount namespace of its own, the folder is a disk of 0.5 MiB; the set has 0.64, two
    splits of it 0.46."""
    program = f"""
import os
from namr_dist.cli.main import main
words = ["shards", "stage", {str(shard_set.folder)!r}, {str(tmp_path)!r}]
print(main(words), [files for _, _, files in os.walk(words[-1])][1:], flush=True)
main([*words, "--splits", "train", "val"])
"""
    done = launch(
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        'mount -t tmpfs -o size=512k tmpfs "$2" && exec "$0" -c "$1"',
        sys.executable,
        program,
        tmp_path,
    )
    refused, staged = done.stderr.splitlines()
    assert re.fullmatch(
        rf"namr: error: {tmp_path}/synthetic-\w+ needs 0.6 MiB more and its disk has 0.5 MiB free; "
        "free some space, or stage into a folder on a larger disk",
        refused,
    )
    assert done.stdout.splitlines()[0] == "2 [['.lock']]"
    assert staged.startswith("staged 96 images")


def test_a_disk_that_fills_up_and_a_folder_that_is_none_are_one_clear_line(
    shard_set: Manifest, tmp_path: Path
) -> None:
    folder = stage(str(shard_set.folder), tmp_path / "to", ["val"]).folder

    def without_room() -> None:
        with pytest.raises(
            TransientError,
            match=rf"/to/\S+ is full \({os.strerror(errno.ENOSPC)}\); free some space, or",
        ):
            stage(str(shard_set.folder), tmp_path / "to")

    # Room for the bytes, and not for so many files.
    apart(without_room, disk=(tmp_path / "to", "size=2m,nr_inodes=5"))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"/file/synthetic-\w+ cannot be used \(Not a directory\); stage into"
    ):
        stage(str(shard_set.folder), tmp_path / "file")
    assert not any(
        shard_problems(folder / "val-0.tar", shard_set.shards_of("val")[0], decode=False)
    )
