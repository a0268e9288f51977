"""`namr preflight` on two nodes that are processes of this machine: what it names, and that it ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import small_run

from namr_dist.data.manifest import Manifest

pytestmark = pytest.mark.dist

# The limit is counted once torch is imported: tests share few cores. Where it is waited for, it is shorter.
_PROGRAM = """
import os, sys
from pathlib import Path
os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
import namr_dist.cluster.preflight
from namr_dist import cli
cli._PREFLIGHT_S = float(os.environ.get("LIMIT_S", "30"))
sys.exit(cli.main(["preflight", *sys.argv[1:]]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun_like(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "SLURMD_NODENAME": f"node{rank + 1}"}


def slurm_like(rank: int, port: int) -> dict[str, str]:
    return {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURMD_NODENAME": f"node{rank + 1}",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start(variables: dict[str, str], *words: object) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TRITON"))}
    return subprocess.Popen([sys.executable, "-c", _PROGRAM, *map(str, words)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**environment, "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
                                                         "CUDA_VISIBLE_DEVICES": "", **variables})


def end(*nodes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit code and stderr of each node; nothing is on stdout."""
    ended = []
    for node in nodes:
        out, said = node.communicate(timeout=120)
        assert out == ""
        ended.append((node.returncode, said))
    return ended


def words(manifest: Manifest, run: Path, *more: object) -> list[object]:
    return ["homeware_conv4", "--run-dir", run, *small_run(manifest), *more]


@pytest.fixture
def own_copy(shard_set: Manifest, tmp_path: Path) -> Manifest:
    """The shard set again, for the second node."""
    return replace(shard_set, folder=Path(shutil.copytree(shard_set.folder, tmp_path / "copy")))


def test_two_good_nodes_pass_and_leave_nothing(shard_set: Manifest, tmp_path: Path) -> None:
    port = free_port()
    nodes = [start(slurm_like(rank, port), *words(shard_set, tmp_path / "run")) for rank in range(2)]
    (code, said), other = end(*nodes)
    assert code == 0, said
    assert other == (0, "")
    assert "preflight: 2 nodes in" in said.splitlines()[-1]
    rows = [line for line in said.splitlines() if "node1" in line or "node2" in line]
    assert len(rows) == 2
    for row in rows:
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1:5] == ["ok", "none", "6, 0.0 GiB", "random"]
        assert cells[6] == "faiss-cpu" and int(cells[7]) > 0
    assert list(tmp_path.iterdir()) == []


def test_every_difference_is_named_with_its_node(shard_set: Manifest, own_copy: Manifest, tmp_path: Path) -> None:
    """Another version, another manifest, a missing shard, a run folder that is not shared, GPUs that torch lacks."""
    installed = tmp_path / "site" / "timm-0.0.7.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.7\n")
    manifest = own_copy.folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    (other / "run").write_text("in the way")
    port = free_port()
    first = start(torchrun_like(0, port), *words(shard_set, mine / "run", "--set.data.classes_per_batch", 5))
    second = start({**torchrun_like(1, port), "PYTHONPATH": str(installed.parent), "SLURM_GPUS_ON_NODE": "2"},
                   *words(own_copy, other / "run"))
    (code, said), (other_code, other_said) = end(first, second)
    assert (code, other_code, other_said) == (2, 2, "")
    errors = [line for line in said.splitlines() if line.startswith("namr: error: ")]
    expected = ["node2: timm is 0.0.7, on node1 ", "node2: its shard set's manifest.json is another than on node1",
                f"node2: run folder {other / 'run'} cannot be written",
                "node2: Slurm gave 2 GPUs, torch opens 0 of 2 (no nvidia-smi; torch",
                "node1: data.classes_per_batch is 5, which 2 ranks cannot share equally"]
    for text in expected:
        assert sum(line.startswith(f"namr: error: preflight: {text}") for line in errors) == 1, said
    assert len(errors) == len(expected)


def test_a_shard_that_one_node_lacks_and_a_folder_that_is_not_shared(
        shard_set: Manifest, own_copy: Manifest, tmp_path: Path) -> None:
    (own_copy.folder / "test-1.tar").unlink()
    with open(own_copy.folder / "train-0.tar", "ab") as file:
        file.write(b"x")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    port = free_port()
    first = start(torchrun_like(0, port), *words(shard_set, hidden / "run"))
    # In a mount namespace of its own, the second has another, empty folder of that name.
    second_words = words(own_copy, hidden / "run")
    program = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', hidden, sys.executable, "-c",
               _PROGRAM, *second_words]
    second = subprocess.Popen(list(map(str, program)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={**os.environ, **torchrun_like(1, port), "CUDA_VISIBLE_DEVICES": ""})
    (code, said), (other_code, _) = end(first, second)
    assert (code, other_code) == (2, 2)
    assert f"node2: shard {own_copy.folder / 'train-0.tar'} has" in said and "2 of 6 shards are so" in said
    assert f"node2: a file that the first node wrote into {hidden} is not seen" in said
    assert said.count("namr: error: ") == 2
    assert list(hidden.iterdir()) == []


def test_a_mistake_in_the_settings_is_told_once(shard_set: Manifest, tmp_path: Path) -> None:
    port = free_port()
    nodes = [start(torchrun_like(rank, port), *words(shard_set, tmp_path / "run", "--set.data.pth", "x"))
             for rank in range(2)]
    (code, said), other = end(*nodes)
    assert (code, other) == (2, (2, ""))
    assert "namr: error: preflight: all nodes: Unrecognized options" in said and "--set.data.pth" in said
    assert said.count("namr: error: ") == 1


def test_a_port_that_is_taken_is_named_by_the_first_node(shard_set: Manifest, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (code, said), = end(start(torchrun_like(0, port), *words(shard_set, tmp_path / "run")))
    assert (code, said) == (2, f"namr: error: preflight: port {port} of 127.0.0.1 is taken by another program; set "
                               "NAMR_PORT to a free port, or leave it unset\n")


def test_a_node_that_never_comes_is_named(shard_set: Manifest, tmp_path: Path) -> None:
    (code, said), = end(start({**slurm_like(0, free_port()), "LIMIT_S": "10"}, *words(shard_set, tmp_path / "run")))
    assert code == 2
    assert f"namr: error: preflight: node2: did not report; look there whether {sys.executable} starts" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stopped", [True, False])
def test_a_node_that_hangs_is_named_with_what_it_was_doing(
        shard_set: Manifest, own_copy: Manifest, tmp_path: Path, stopped: bool) -> None:
    """Its manifest is a pipe that nobody writes to; the process can be stopped as well, and says nothing then."""
    (own_copy.folder / "manifest.json").unlink()
    os.mkfifo(own_copy.folder / "manifest.json")
    port = free_port()
    first, second = (start({**torchrun_like(rank, port), "LIMIT_S": "16"}, *words(manifest, tmp_path / "run"))
                     for rank, manifest in enumerate((shard_set, own_copy)))
    writer = None
    while writer is None and second.poll() is None:
        try:
            writer = os.open(own_copy.folder / "manifest.json", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.05)
    assert writer is not None
    if stopped:
        second.send_signal(signal.SIGSTOP)
    (code, said), = end(first)
    if stopped:
        second.kill()
    (other_code, _), = end(second)
    os.close(writer)
    assert (code, other_code) == (2, -signal.SIGKILL if stopped else 2)
    lines = [line for line in said.splitlines() if line.startswith("namr: error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("namr: error: preflight: node2: " + ("has not answered for" if stopped else ""))
    assert f"checking shards ({own_copy.folder})" in lines[0] and lines[0].endswith("is that file system hung?")
