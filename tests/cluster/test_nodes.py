"""`namr preflight` on nodes that are processes of this machine: what it names, that it ends, and
leaves nothing."""

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
from conftest import ENVIRONMENT, small_run
from nodes import Node, free_port, slurm_like, torchrun_like

from namr_dist.cli.main import main
from namr_dist.cluster import checks
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError

pytestmark = pytest.mark.dist

_GENEROUS = ("--limit", 200)


def words(manifest: Manifest, run: Path, *more: object) -> list[object]:
    return ["homeware_conv4", "--run-dir", run, *small_run(manifest), *more]


def copy(manifest: Manifest, folder: Path) -> Manifest:
    """The shard set again, for another node."""
    return replace(manifest, folder=Path(shutil.copytree(manifest.folder, folder)))


def hung(manifest: Manifest, folder: Path) -> Manifest:
    """The same on a file system that hangs: the manifest is a pipe that nobody writes to."""
    there = copy(manifest, folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    return there


def await_reader(manifest: Manifest, node: Node) -> int:
    """Wait until a node hangs there; the pipe's other end, which stays open until it is closed."""
    while node.process.is_alive():
        try:
            return os.open(manifest.folder / "manifest.json", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            time.sleep(0.02)
    raise AssertionError(node.end())


def errors(said: str) -> list[str]:
    start = "namr: error: preflight: "
    lines = [line for line in said.splitlines() if line.startswith("namr: error: ")]
    assert all(line.startswith(start) for line in lines), said
    return [line.removeprefix(start) for line in lines]


def table_rows(said: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in said.splitlines()
        if line[:1] == "│"
    ]


def test_two_good_nodes_pass_and_leave_nothing(shard_set: Manifest, tmp_path: Path) -> None:
    """Started as srun starts them, imports included."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "namr_dist.cli",
        "preflight",
        *words(shard_set, tmp_path / "run", *_GENEROUS),
    ]
    nodes = [
        subprocess.Popen(
            list(map(str, command)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**ENVIRONMENT, **slurm_like(rank, port)},
        )
        for rank in range(2)
    ]
    (out, said), other = (node.communicate(timeout=240) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (out, other) == ("", ("", ""))
    assert said.splitlines()[-1].startswith("preflight: 2 nodes in ")
    rows = table_rows(said)
    assert [row[0] for row in rows] == ["node1", "node2"]
    for row in rows:
        assert row[1:5] == ["ok", "none", "6, 0.0 GiB", "random"]
        assert row[6] == "torch-cpu" and int(row[7]) > 0
    assert list(tmp_path.iterdir()) == []


def test_one_node_has_no_bandwidth(shard_set: Manifest, tmp_path: Path) -> None:
    code, said = Node(
        tmp_path / "node", {}, *words(shard_set, tmp_path / "runs" / "run", *_GENEROUS)
    ).end()
    assert code == 0 and said.splitlines()[-1].startswith("preflight: 1 node in ")
    (row,) = table_rows(said)
    assert row[1:5] == ["ok", "none", "6, 0.0 GiB", "random"] and row[7] == "–"


def test_every_difference_is_named_with_its_node(shard_set: Manifest, tmp_path: Path) -> None:
    """Another version, another manifest, a file in the run folder's place, GPUs that torch lacks,
    too few ranks, a loss of the user's own that is on one node alone."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "here_only.py").write_text("def spread(z, labels):\n    return z.square().mean()\n")
    named = ("--set.loss.metric", "here_only:spread")
    installed = tmp_path / "site" / "timm-0.0.7.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.7\n")
    there = copy(shard_set, tmp_path / "copy")
    manifest = there.folder / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    in_the_way = tmp_path / "run"
    in_the_way.write_text("")
    port = free_port()
    first = Node(
        tmp_path / "first",
        {**torchrun_like(0, port), "PYTHONPATH": str(own)},
        *words(shard_set, tmp_path / "mine", *_GENEROUS, *named, "--set.data.classes_per_batch", 5),
    )
    second = Node(
        tmp_path / "second",
        {**torchrun_like(1, port), "PYTHONPATH": str(installed.parent), "SLURM_GPUS_ON_NODE": "2"},
        *words(there, in_the_way, *_GENEROUS, *named),
    )
    (code, said), other = first.end(), second.end()
    assert (code, other) == (2, (2, ""))
    expected = [
        "node2: loss.metric is here_only:spread, but here_only cannot be imported (ModuleNotFound",
        "node2: timm is 0.0.7, on node1 ",
        "node2: its shard set's manifest.json is another than on node1",
        f"node2: run folder {in_the_way} cannot be written",
        "node2: Slurm gave 2 GPUs, torch opens 0 of 2 (",
        "node1: data.classes_per_batch is 5, which 2 ranks cannot share equally",
    ]
    for text in expected:
        assert sum(line.startswith(text) for line in errors(said)) == 1, said
    assert len(errors(said)) == len(expected)


def test_a_shard_that_one_node_lacks_and_a_folder_that_is_not_shared(
    shard_set: Manifest, tmp_path: Path
) -> None:
    there = copy(shard_set, tmp_path / "copy")
    (there.folder / "test-1.tar").unlink()
    with open(there.folder / "train-0.tar", "ab") as file:
        file.write(b"x")
    run = Path("/proc/self/cwd/run")  # one name, and another folder for each process
    port = free_port()
    first = Node(tmp_path / "first", torchrun_like(0, port), *words(shard_set, run, *_GENEROUS))
    second = Node(tmp_path / "second", torchrun_like(1, port), *words(there, run, *_GENEROUS))
    (code, said), other = first.end(), second.end()
    assert (code, other) == (2, (2, ""))
    shards, folder = errors(said)
    assert (
        shards.startswith(f"node2: shard {there.folder / 'train-0.tar'} has")
        and "2 of 6 shards are so" in shards
    )
    assert folder.startswith(
        f"node2: a file that the first node wrote into {run.parent} is not seen"
    )
    for node in (first, second):
        assert {path.name for path in node.folder.iterdir()} == {"stdout", "stderr"}


def test_a_mistake_in_the_settings_is_told_once(shard_set: Manifest, tmp_path: Path) -> None:
    port = free_port()
    nodes = [
        Node(
            tmp_path / str(rank),
            torchrun_like(rank, port),
            *words(shard_set, tmp_path / "run", *_GENEROUS, "--set.data.pth", "x"),
        )
        for rank in range(2)
    ]
    (code, said), other = (node.end() for node in nodes)
    assert (code, other) == (2, (2, ""))
    (line,) = errors(said)
    assert line.startswith("all nodes: Unrecognized options") and "--set.data.pth" in line


def test_a_node_reports_all_its_problems_at_once_in_the_words_of_a_job(
    shard_set: Manifest, tmp_path: Path
) -> None:
    job = {**slurm_like(0, free_port(), size=1), "NAMR_LAUNCH": "torchrun"}
    wrong = words(shard_set, Path("/proc/run"), *_GENEROUS, "--set.data.pth", "x")
    code, said = Node(tmp_path / "node", job, *wrong).end()
    assert code == 2
    settings, folder = sorted(errors(said), key=lambda line: "run folder" in line)
    assert "Unrecognized options" in settings
    assert "run folder /proc/run" in folder and "with NAMR_RUN_DIR" in folder
    assert "--run-dir" not in said


def test_missing_compilers_are_named() -> None:
    """As Triton looks for them."""
    with pytest.raises(InputError, match="CC is no-such, .* set CC .*; ptxas is not at /none; .*"):
        checks.compilers({"CC": "no-such", "TRITON_PTXAS_PATH": "/none"})
    there = {"CC": sys.executable, "TRITON_PTXAS_PATH": sys.executable}
    assert checks.compilers(there) == f"{sys.executable}, {sys.executable}"


def test_a_port_that_is_taken_is_named_by_the_first_node(
    shard_set: Manifest, tmp_path: Path
) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ended = Node(
            tmp_path / "node",
            torchrun_like(0, port),
            *words(shard_set, tmp_path / "run", *_GENEROUS),
        ).end()
    assert ended == (
        2,
        f"namr: error: preflight: port {port} of 127.0.0.1 is taken by another program; set NAMR_PORT "
        "to a free port, or leave it unset\n",
    )


def test_nodes_that_hang_freeze_or_never_come_are_named_with_what_they_did(
    shard_set: Manifest, tmp_path: Path
) -> None:
    """node2's file system hangs, node3 does the same and then stops as a whole, node4 is not
    started."""
    sets = [shard_set, hung(shard_set, tmp_path / "hangs"), hung(shard_set, tmp_path / "freezes")]
    port = free_port()
    first, second, third = (
        Node(
            tmp_path / str(rank),
            slurm_like(rank, port, size=4),
            *words(manifest, tmp_path / "run", "--limit", 14, "--set.data.classes_per_batch", 8),
        )
        for rank, manifest in enumerate(sets)
    )
    ends = [await_reader(sets[1], second), await_reader(sets[2], third)]
    third.send(signal.SIGSTOP)
    code, said = first.end()
    third.send(signal.SIGKILL)
    assert (code, second.end(), third.end()) == (2, (2, ""), (-signal.SIGKILL, ""))
    for end in ends:
        os.close(end)
    hangs, freezes, missing = errors(said)
    assert hangs.startswith(f"node2: checking shards ({sets[1].folder}) has not ended after ")
    assert freezes.startswith("node3: has not answered for ")
    assert f", still checking shards ({sets[2].folder}): is that file system hung? (" in freezes
    assert missing.startswith(f"node4: did not report; look there whether {sys.executable} starts")
    for line in (hangs, freezes, missing):
        assert line.endswith("give it time with --limit, in a Slurm job NAMR_PREFLIGHT_SECONDS)")
    assert not list(tmp_path.glob(".namr-*"))


def test_sigterm_ends_every_wait_and_leaves_no_file(shard_set: Manifest, tmp_path: Path) -> None:
    """One node waits for a file system, another for a node."""
    there = hung(shard_set, tmp_path / "hangs")
    nodes = []
    for name, manifest in (("file", there), ("node", shard_set)):
        run = tmp_path / f"runs-{name}" / "run"
        run.parent.mkdir()
        nodes.append(
            Node(tmp_path / name, torchrun_like(0, free_port()), *words(manifest, run, *_GENEROUS))
        )
    end = await_reader(there, nodes[0])
    for node in nodes:
        runs = tmp_path / f"runs-{node.folder.name}"
        while node.process.is_alive() and not list(runs.glob(".namr-preflight-*")):
            time.sleep(0.02)
        node.send(signal.SIGTERM)
        assert node.end() == (128 + signal.SIGTERM, "")
        assert list(runs.iterdir()) == []
    os.close(end)


def test_the_limit_ends_a_process_whatever_it_does() -> None:
    """Also one that still imports."""
    code = (
        "import sys, time; from namr_dist.cluster.deadline import Deadline; Deadline(0.1)\n"
        "print('torch' in sys.modules); time.sleep(600)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, "SLURMD_NODENAME": "node1"},
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(
        "namr: error: preflight: node1: not done after 0.1 s, still importing torch: is the "
    )


@pytest.mark.parametrize("limit", [4, 100_000])
def test_a_limit_that_is_none_is_refused(limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "homeware", "--limit", str(limit)]) == 2
    assert capsys.readouterr().err == (
        f"namr: error: --limit is {limit}; set it to at least 5 seconds, and at most 86400\n"
    )
