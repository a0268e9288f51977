"""Training from a URL, over a network that fails, is training from the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_server import BadServer, drop, flip, stall, status
from conftest import small_run
from training_runs import Run, losses, start_parent

from namr_dist.config import Config
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.resume import check_same
from namr_dist.train.checkpoints.state import open_state

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
    """Nor does it leave the URL's credentials anywhere but in its config.json, for this user's eyes
    alone."""
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
            server.url.replace("http://", "http://me:hunter2@") + "?X-Amz-Signature=hunter2",
            "--set.data.verify",
            "False",
            "--set.train.checkpoint_every",
            4,
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
    run = RunFolder(tmp_path / "remote")
    written = [path for path in run.path.rglob("*") if path.is_file()]
    assert {run.final, run.checkpoint(4) / "index.json", run.log, run.config} <= {*written}
    assert [path for path in written if b"hunter2" in path.read_bytes()] == [run.config]
    assert run.config.stat().st_mode & 0o777 == 0o600 and "hunter2" not in remote.said()
    config = Config.load(run.config)
    saved = open_state(run.checkpoint(4))
    assert config != saved.config and saved.config.data.path
    check_same(saved.path, saved.config, config)  # as resuming does
    of_local = RunFolder(tmp_path / "local").config
    assert of_local.stat().st_mode == (tmp_path / "local.txt").stat().st_mode, "kept from others"


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
