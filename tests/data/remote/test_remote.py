"""Shards behind a URL arrive whole, or one line says why they do not, whatever the network does."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from bad_server import (
    Answer,
    BadServer,
    chunked,
    drip,
    drip_body,
    drop,
    flip,
    late,
    shorten,
    stall,
    status,
    whole,
)
from namespaces import apart

from namr_dist.config import RemoteConfig
from namr_dist.data.location import open_shards
from namr_dist.data.remote import transfer as transport
from namr_dist.data.remote import web
from namr_dist.data.remote.cache import ShardCache
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError, ReportedError, TransientError


@pytest.fixture
def impatient(remote: RemoteConfig) -> RemoteConfig:
    """For tests of stalls, which are then over soon."""
    return dataclasses.replace(remote, stall_seconds=0.5)


@pytest.mark.parametrize(
    ("faults", "starts"),
    [
        ([drop(30_000)], [0, 30_000]),
        ([drop(30_000), drop(40_000)], [0, 30_000, 40_000]),
        ([drop(30_000), whole], [0, 30_000]),
        ([shorten(30_000)], [0, 0]),
        ([chunked(30_000)], [0, 30_000]),
        ([flip(30_000)], [0, 0]),
        ([drop(30_000), flip(40_000)], [0, 30_000, 0]),
        ([drop(30_000), status(416)], [0, 30_000, 0]),
        ([status(500)], [0, 0]),
        ([status(503, Retry_After="0"), status(429)], [0, 0, 0]),
        ([late(0.2)], [0]),
    ],
)
def test_a_shard_comes_whole_and_from_where_it_broke_off(
    server: BadServer, remote: RemoteConfig, shard_set: Manifest, faults: list, starts: list[int]
) -> None:
    shard = shard_set.shards[0]
    server.faults[shard.file] = list(faults)
    path = open_shards(server.url, remote).path(shard)
    assert path.read_bytes() == (shard_set.folder / shard.file).read_bytes()
    assert server.starts(shard.file) == starts


@pytest.mark.parametrize("after", [30_000, 0])
def test_a_stalled_fetch_goes_on_from_where_it_was(
    server: BadServer, impatient: RemoteConfig, shard_set: Manifest, after: int
) -> None:
    shard = shard_set.shards[0]
    server.faults[shard.file] = [stall(after)]
    path = open_shards(server.url, impatient).path(shard)
    assert path.read_bytes() == (shard_set.folder / shard.file).read_bytes()
    assert server.starts(shard.file) == [0, after]


def test_a_redirect_is_followed_without_the_password(
    server: BadServer,
    shard_set: Manifest,
    remote: RemoteConfig,
) -> None:
    shard = shard_set.shards[0]
    with BadServer(shard_set.folder) as other:
        server.faults[shard.file] = [
            status(302, Location=f"{server.url}/moved/{shard.file}"),
            status(307, Location=f"{other.url}/{shard.file}"),
        ]
        manifest = open_shards(server.url.replace("http://", "http://me:p%40ss@"), remote)
        assert manifest.path(shard).stat().st_size == shard.bytes
    given = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert [asked.authorization for asked in server.asked] == [given, given, given]
    assert [asked.authorization for asked in other.asked] == [None]


def test_a_redirect_leads_to_no_other_host_of_a_private_network(
    shard_set: Manifest, remote: RemoteConfig
) -> None:
    """A public server's to none at all, also by another spelling of its address. In a network of
    its own, where this machine has a public address."""

    def redirects() -> None:
        hosts = ("8.8.8.8", "8.8.4.4", "10.1.2.3", "10.1.2.4", "127.0.0.1")
        with contextlib.ExitStack() as stack:
            servers = {
                host: stack.enter_context(BadServer(shard_set.folder, host)) for host in hosts
            }
            public, other, private, neighbour, loopback = servers.values()
            twin = stack.enter_context(BadServer(shard_set.folder, "10.1.2.3"))
            refused = [
                (public, f"http://localhost:{loopback.port}", r"localhost \(127.0.0.1\)"),
                (public, f"http://2130706433:{loopback.port}", r"2130706433 \(127.0.0.1\)"),
                (public, loopback.url, r"127.0.0.1 \(127.0.0.1\)"),
                (public, private.url, r"10.1.2.3 \(10.1.2.3\)"),
                (private, neighbour.url, r"10.1.2.4 \(10.1.2.4\)"),
                (private, loopback.url, r"127.0.0.1 \(127.0.0.1\)"),
            ]
            for source, target, where in refused:
                source.faults["manifest.json"] = [status(302, Location=f"{target}/manifest.json")]
                with pytest.raises(
                    InputError,
                    match=rf"^{source.url}/manifest.json cannot be fetched: it redirects to {where}, "
                    "another host on a private network; ",
                ):
                    open_shards(source.url, remote)
            assert not loopback.asked and not neighbour.asked
            for source, target in ((public, other), (private, twin), (private, public)):
                source.faults["manifest.json"] = [
                    status(302, Location=f"{target.url}/manifest.json")
                ]
                assert open_shards(source.url, remote).shards == shard_set.shards

    apart(redirects, addresses=("8.8.8.8", "8.8.4.4", "10.1.2.3", "10.1.2.4"))


@pytest.mark.parametrize("fault", [drip, drip_body])
def test_a_server_that_drips_holds_no_fetch_beyond_its_deadline(
    server: BadServer, remote: RemoteConfig, fault: Callable[[Answer], None]
) -> None:
    server.faults["manifest.json"] = [fault] * 3
    with pytest.raises(
        TransientError,
        match=rf"^{server.url}/manifest.json cannot be fetched: it has not come within 0.3 s "
        r"\(data.remote.manifest_seconds\), all tries together; check the server and",
    ):
        open_shards(server.url, dataclasses.replace(remote, manifest_seconds=0.3))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("faults", "kind", "said"),
    [
        (
            [status(404)],
            InputError,
            r"cannot be fetched: the server answers 404 Not Found; check the address, or copy the file there$",
        ),
        (
            [status(403)],
            InputError,
            r"cannot be fetched: the server answers 403 Forbidden; check the credentials",
        ),
        (
            [status(302, Location="file:///etc/hostname")],
            InputError,
            r"the server answers 302 Found, without end or to something other "
            r"than http; check the address$",
        ),
        (
            [status(302, Location="ftp://127.0.0.1/x")],
            InputError,
            r"the server answers 302 Found, without end or",
        ),
        (
            [status(302, Location="http://me:secret@127.0.0.1/x")],
            InputError,
            r"fetched: it redirects to an address with a user or a password in it; give that address$",
        ),
        (
            [status(500)] * 3,
            TransientError,
            r"cannot be fetched: 3 tries, the last said: the server answers 500 Internal Server Error; "
            r"check the network and the file there; training goes on with --resume$",
        ),
        (
            [flip(5)] * 3,
            InputError,
            r"3 tries, the last said: it has sha256 [0-9a-f]{12}…, its manifest says [0-9a-f]{12}…;",
        ),
        (
            [shorten(10_000)] * 3,
            InputError,
            r"3 tries, the last said: it has 10000 bytes there, its manifest says \d+;",
        ),
        (
            [drop(10_000)] * 3,
            TransientError,
            r"3 tries, the last said: the connection broke off \d+ bytes before the end;",
        ),
    ],
)
def test_what_cannot_be_fetched_is_one_clear_line(
    server: BadServer,
    remote: RemoteConfig,
    shard_set: Manifest,
    faults: list,
    kind: type,
    said: str,
) -> None:
    shard = shard_set.shards[0]
    manifest = open_shards(server.url, remote)
    server.faults[shard.file] = list(faults)
    with pytest.raises(kind, match=said) as error:
        manifest.path(shard)
    assert str(error.value).startswith(f"{server.url}/{shard.file} cannot") and "\n" not in str(
        error.value
    )
    assert len(server.starts(shard.file)) == len(faults)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        (
            "http://127.0.0.1:9/set",
            r"^http://127.0.0.1:9/set/manifest.json cannot be fetched: 3 tries, the last said: .*"
            r"Connection refused; check the address and the network$",
        ),
        ("http://no-such-host.invalid/set", "its host is not known"),
        (
            "http://127.0.0.1:port/set",
            "is no URL; give a folder or a URL such as https://HOST/FOLDER$",
        ),
        ("https:///set", "is no URL"),
        (
            "http://a..b/set",
            r"^http://a..b/set/manifest.json cannot be fetched: it is no URL \(.*\); check the address$",
        ),
        (f"http://{'a' * 64}.invalid/set", r"it is no URL \(.*\); check the address$"),
        ("nonsense://bucket/set", "nothing here reads such URLs; give one of http"),
        ("https://…@host/set?…", "lacks its credentials, which were left out .*; give the whole"),
        ("s3://bucket/set", "a package is missing: Install s3fs"),
        ("memory://nothing", "it is not there; check the address"),
        ("pipe:cat /set", r"^pipe:cat … has no {} where the file's name belongs; put it there$"),
        (
            "pipe:cat {}; exit 3",
            r"^manifest.json from pipe:cat … cannot be fetched: 3 tries, the last said: the command "
            r"ended with exit code 3;",
        ),
    ],
)
def test_a_location_that_is_none_is_one_clear_line(
    remote: RemoteConfig, location: str, said: str
) -> None:
    mended_by_time = "3 tries" in said or "host is not known" in said
    with pytest.raises(TransientError if mended_by_time else InputError, match=said) as error:
        open_shards(location, remote)
    assert "\n" not in str(error.value)


def test_what_stalls_each_time_is_one_clear_line(
    server: BadServer,
    impatient: RemoteConfig,
    shard_set: Manifest,
) -> None:
    shard = shard_set.shards[0]
    manifest = open_shards(server.url, impatient)
    server.faults[shard.file] = [stall(10_000)] * 3
    said = "cannot be fetched: 3 tries, the last said: no byte came for 0.5 s; check the network and .*$"
    with pytest.raises(TransientError, match=f"^{server.url}/{shard.file} {said}"):
        manifest.path(shard)
    assert len(server.starts(shard.file)) == 3


def test_a_command_that_says_nothing_is_one_clear_line(impatient: RemoteConfig) -> None:
    with pytest.raises(
        TransientError,
        match=r"^manifest.json from pipe:sleep … cannot be fetched: 3 tries, the last said: "
        r"no byte came for 0.5 s; check the address and the network$",
    ):
        open_shards("pipe:sleep 100; cat {}", impatient)


def test_pauses_grow_and_are_as_long_as_the_server_asks(
    server: BadServer,
    remote: RemoteConfig,
    shard_set: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(transport, "_LONGEST_WAIT_S", 0.3)
    shard = shard_set.shards[0]
    server.faults[shard.file] = [
        status(503, Retry_After="3600"),
        status(503, Retry_After="soon"),
        status(503),
    ]
    open_shards(server.url, dataclasses.replace(remote, retries=3)).path(shard)
    pauses = [line.rsplit(" in ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    assert pauses == ["0.3 s", "0.0 s", "0.0 s"]
    assert web._asked_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert web._asked_wait("Wed, 21 Oct 2195 07:28:00 GMT") > 1e9


def test_credentials_are_never_told(
    server: BadServer, remote: RemoteConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults["manifest.json"] = [status(500), status(500), status(404)]
    for location in (
        server.url.replace("http://", "http://me:secret@") + "?sig=secret#secret",
        "http://me:secret@:x/y",
        "http://me:/secret@:x/y",
        "http://me:?secret@:x/y",
        "http://127.0.0.1:x/y?sig=a@secret",
        "s3://secret:secret@bucket/x",
        "pipe:false --token secret {}",
        "pipe:false --token secret",
        "pipe:TOKEN=secret false {}",
        "pipe:T='a secret' false",
        "pipe:{false,secret}",
    ):
        with pytest.raises(ReportedError) as error:
            open_shards(location, remote)
        assert "secret" not in str(error.value)
    assert "secret" not in capfd.readouterr().err


def test_any_way_to_the_set_gives_the_same_bytes(
    shard_set: Manifest, remote: RemoteConfig, tmp_path: Path
) -> None:
    store = fsspec.filesystem("memory")
    store.put(f"{shard_set.folder}/", "/set/", recursive=True)
    for number, url in enumerate(
        ("memory://set", f"pipe:cat {shard_set.folder}/{{}}", f"file://{shard_set.folder}")
    ):
        here = dataclasses.replace(remote, cache=tmp_path / str(number), retries=0)
        manifest = open_shards(url, here)
        assert manifest == dataclasses.replace(shard_set, folder=manifest.folder)
        for shard in manifest.shards:
            assert manifest.path(shard).read_bytes() == (shard_set.folder / shard.file).read_bytes()
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("location", "file"),
    [
        ("trap://set", "train-0.tar"),
        ("TRAP://set", "train-0.tar"),
        ("memory://set::trap://set", "train-0.tar"),
        ("reference://::trap://set", "train-0.tar"),
        ("memory://set", "train-0.tar::trap"),
    ],
)
def test_no_other_scheme_reaches_fsspec(
    shard_set: Manifest,
    remote: RemoteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    location: str,
    file: str,
) -> None:
    """Neither of the location, which may stand in somebody's file, nor of a shard's name. The trap
    is a module that fsspec would import for its scheme."""
    (tmp_path / "trap_of_fsspec.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trap_of_fsspec", raising=False)
    for scheme in ("trap", "TRAP"):
        fsspec.register_implementation(scheme, "trap_of_fsspec.Store", clobber=True)
    fsspec.filesystem("memory").put(f"{shard_set.folder}/", "/set/", recursive=True)
    shard = dataclasses.replace(shard_set.shards[0], file=file)
    with pytest.raises(
        InputError,
        match="nothing here reads such URLs; |no file of such a name .*; rename the shard",
    ):
        open_shards(location, remote).path(shard)
    assert not (tmp_path / "ran").exists()


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


def test_a_manifest_that_is_none_names_its_url(
    own_shard_set: Manifest, remote: RemoteConfig
) -> None:
    manifest = own_shard_set.folder / "manifest.json"
    good = json.loads(manifest.read_text())
    with BadServer(own_shard_set.folder) as server:
        manifest.write_text(manifest.read_text()[:500])
        with pytest.raises(
            InputError, match=rf"^{server.url}/manifest.json, fetched as .* cannot be read"
        ):
            open_shards(server.url, remote)
        good["shards"][0]["sha256"] = "../../../x"
        manifest.write_text(json.dumps(good))
        with pytest.raises(
            InputError, match=r"train-0.tar has sha256 '../../../x', not 64 hex digits; rebuild"
        ):
            open_shards(server.url, remote)


def test_a_manifest_without_end_is_refused(
    remote: RemoteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_LONGEST_READ_BYTES", 5 << 20)
    with pytest.raises(
        InputError,
        match=r"^manifest.json from pipe:yes … cannot be fetched: it has more than 0.0\d+ "
        "GiB; check the address$",
    ):
        open_shards("pipe:yes {}", remote)


def test_a_redirect_to_no_host_is_one_clear_line(server: BadServer, remote: RemoteConfig) -> None:
    server.faults["manifest.json"] = [
        status(302, Location="http://a..b/"),
        status(302, Location="http://[x/"),
    ]
    for _ in range(2):
        with pytest.raises(
            InputError, match=rf"^{server.url}/manifest.json cannot be fetched: it is no URL"
        ):
            open_shards(server.url, remote)


def test_a_command_is_given_no_name_that_a_shell_would_read(
    own_shard_set: Manifest, remote: RemoteConfig
) -> None:
    shard = dataclasses.replace(own_shard_set.shards[0], file="$(touch x).tar")
    manifest = open_shards(f"pipe:cat {own_shard_set.folder}/{{}}", remote)
    with pytest.raises(InputError, match="a command can take no name with such characters"):
        manifest.path(shard)
