"""Training from a URL, over a network that fails, is training from the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_server import BadServer, drop, flip, stall, status
from conftest import small_run
from training_runs import Run, losses, start_parent

from namr_dist.data.shardset.manifest import Manifest

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", autouse=True)
def parent() -> None:
    start_parent()


def train(manifest: Manifest, run: Path, *more: object) -> Run:
    return Run(
        1,
        ["homeware_conv4", "--run-dir", run, *small_run(manifest), *more],
        run.with_suffix(".txt"),
    )


def test_a_run_over_a_bad_network_has_the_losses_of_a_local_one(
    shard_set: Manifest, tmp_path: Path
) -> None:
    first, second = shard_set.shards_of("train")
    with BadServer(shard_set.folder) as server:
        server.faults["manifest.json"] = [status(502)]
        server.faults[first.file] = [stall(40_000), flip(60_000)]
        server.faults[second.file] = [drop(50_000)]
        # Without hashing beforehand, it is the loader's workers that fetch.
        remote = train(
            shard_set,
            tmp_path / "remote",
            "--set.data.path",
            server.url,
            "--set.data.verify",
            "False",
            "--set.data.remote.cache",
            tmp_path / "cache",
            "--set.data.remote.stall_seconds",
            5,
        )
        assert remote.wait() == [0], remote.said()
    local = train(shard_set, tmp_path / "local")
    assert local.wait() == [0], local.said()
    remote_losses = losses(tmp_path / "remote")
    assert remote_losses == losses(tmp_path / "local") and len(remote_losses) == 6
    fetched = server.completed
    assert {fetched[shard.file] for shard in shard_set.shards_of("train", "val")} == {1}, fetched


def test_a_run_whose_shards_are_gone_ends_in_one_line(shard_set: Manifest, tmp_path: Path) -> None:
    first, _ = shard_set.shards_of("train")
    with BadServer(shard_set.folder) as server:
        server.faults[first.file] = [status(404)] * 20
        run = train(
            shard_set,
            tmp_path / "run",
            "--set.data.path",
            server.url,
            "--set.data.remote.cache",
            tmp_path / "cache",
        )
        assert run.wait() == [2], run.said()
    said = run.said()
    assert said.count("namr: error: ") == 1 and "Traceback" not in said, said
    assert (
        f"namr: error: {server.url}/{first.file} cannot be fetched: the server answers 404 Not Found; check"
        in said
    )
