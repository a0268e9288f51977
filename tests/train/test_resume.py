"""Runs that are killed, stopped or find damaged files, and go on as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_shards, small_run
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from training_runs import Run, entries, losses, start_parent

from namr_dist.config import DataConfig
from namr_dist.data.read.select import training_images
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.model.backbones import build_backbone
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.resume import hash_images
from namr_dist.train.checkpoints.state import open_state, versions

pytestmark = pytest.mark.dist
STEPS = 60
Start = Callable[..., Run]


@pytest.fixture(scope="module", autouse=True)
def parent() -> None:
    start_parent()


@pytest.fixture(scope="module")
def start(shard_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start `namr train`: a checkpoint every 4 steps, ZeRO-2."""
    folder = tmp_path_factory.mktemp("said")

    def begin(run: Path, *more: object, ranks: int = 1, steps: int = STEPS) -> Run:
        words = [
            "homeware_conv4",
            "--run-dir",
            run,
            *small_run(shard_set, steps=steps),
            "--set.data.workers",
            0,
            "--set.train.checkpoint_every",
            4,
            "--set.train.zero_stage",
            2,
            *more,
        ]
        return Run(ranks, words, folder / f"{len(list(folder.iterdir()))}.txt")

    return begin


@pytest.fixture(scope="module")
def unbroken(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Finished runs on one and on two ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    for ranks in (1, 2):
        run = start(folder / str(ranks), ranks=ranks)
        assert run.wait() == [0] * ranks, run.said()
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


def same(run: Path, other: Path) -> None:
    """The same losses, one for each step, and the same network, bit for bit."""
    by_step = losses(run)
    assert by_step == losses(other)
    assert list(by_step) == list(range(1, len(by_step) + 1)) and {
        len(values) for values in by_step.values()
    } == {1}
    assert network(run) == network(other)


def network(run: Path) -> dict[str, bytes]:
    state = safetensors.torch.load_file(run / "checkpoints" / "final.safetensors")
    return {name: value.numpy().tobytes() for name, value in state.items()}


def refused(run: Run, *named: str) -> None:
    assert run.wait() == [2], run.said()
    lines = [line for line in run.said().splitlines() if line.startswith("namr: error: ")]
    assert len(lines) == 1 and "Traceback" not in run.said(), run.said()
    for word in named:
        assert word in lines[0]


# Five kills of each run: when, and whether of all ranks or of a random one.
KILLS = [("step", "all"), ("write", "all"), ("step", "one"), ("write", "one"), ("step", "one")]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0)])
def test_ten_kills(
    start: Start, unbroken: dict[int, Path], tmp_path: Path, ranks: int, workers: int
) -> None:
    """kill -9 after a random step or in the middle of writing a checkpoint, then the same command
    again."""
    rng = np.random.default_rng(ranks)
    folder, reached = tmp_path / "run", 0
    for moment, whom in KILLS:
        victims = [int(rng.integers(ranks))] if whom == "one" else list(range(ranks))
        done = max(losses(folder), default=0)
        if moment == "step":
            run = start(folder, "--resume", "--set.data.workers", workers, ranks=ranks)
            wanted = done + int(rng.integers(1, 8))
            run.until(lambda wanted=wanted: max(losses(folder), default=0) >= wanted)
            run.kill(*victims)
        else:
            run = start(
                folder,
                "--resume",
                "--set.data.workers",
                workers,
                "--set.train.checkpoint_every",
                1,
                ranks=ranks,
            )
            halt_inside_a_write(run, folder)
            run.kill(*victims)
            with contextlib.suppress(ProcessLookupError):  # it may have been a victim
                os.kill(run.pid(0), signal.SIGCONT)
        codes = run.wait()
        assert all(codes), "a rank ended as if nothing had been"
        kept = RunFolder(folder).checkpoints()
        for step, path in kept:
            assert open_state(path).step == step
        latest = kept[-1][0] if kept else 0
        assert latest >= reached, "a checkpoint was lost"
        reached = latest
    run = start(folder, "--resume", "--set.data.workers", workers, ranks=ranks)
    assert run.wait() == [0] * ranks, run.said()
    assert f"resumed   at step {reached} from" in run.said()
    same(folder, unbroken[ranks])
    assert not list(folder.rglob(".*.tmp")), "unfinished files stayed"
    assert len(RunFolder(folder).checkpoints()) == 2


def test_one_process_trains_in_a_folder(start: Start, tmp_path: Path) -> None:
    """A job that is queued again while its predecessor still dies must not touch its files."""
    folder = tmp_path / "run"
    run = start(folder)
    run.until(lambda: max(losses(folder), default=0) >= 1)
    for way in ("--resume", "--overwrite"):
        refused(start(folder, way), "is in use: another process trains there", "--run-dir")
    run.kill(0)
    run.wait()
    again = start(folder, "--resume")
    assert again.wait() == [0], again.said()
    assert list(losses(folder)) == list(range(1, STEPS + 1))


def halt_inside_a_write(run: Run, folder: Path) -> None:
    """Stop the first rank while the temporary file of a checkpoint is there."""

    def unfinished() -> bool:
        return any((folder / "checkpoints").glob(".step-*.tmp"))

    left_behind = set((folder / "checkpoints").glob(".step-*.tmp"))
    run.until(lambda: not left_behind & set((folder / "checkpoints").glob(".step-*.tmp")))
    while True:
        run.until(unfinished)
        os.kill(run.pid(0), signal.SIGSTOP)
        if unfinished():
            return
        os.kill(run.pid(0), signal.SIGCONT)


@pytest.mark.parametrize(
    ("ranks", "number", "target"), [(1, signal.SIGINT, 0), (2, signal.SIGHUP, 1)]
)
def test_signals_stop_and_resume(
    start: Start,
    unbroken: dict[int, Path],
    tmp_path: Path,
    ranks: int,
    number: signal.Signals,
    target: int,
) -> None:
    """To any rank, and first to its worker processes, for terminals and launchers signal the whole
    process group."""
    folder = tmp_path / "run"
    run = start(folder, "--set.data.workers", 1, "--set.train.checkpoint_every", 0, ranks=ranks)
    run.until(lambda: len(losses(folder)) >= 3)
    workers = Path(f"/proc/{run.pid(target)}/task/{run.pid(target)}/children").read_text().split()
    assert workers
    for worker in workers:
        os.kill(int(worker), number)
    later = len(losses(folder)) + 8  # more than the batches that workers have made ahead
    run.until(lambda: len(losses(folder)) >= later)
    os.killpg(run.pid(target), number)
    assert run.wait() == [75] * ranks, run.said()
    stopped = len(losses(folder))
    assert [step for step, _ in RunFolder(folder).checkpoints()] == [
        stopped
    ] and later <= stopped < STEPS
    (line,) = [line for line in run.said().splitlines() if "stopped" in line]
    assert f"after step {stopped}, as {number.name} asked for" in line and "--resume" in line
    run = start(folder, "--set.train.checkpoint_every", 0, "--resume", ranks=ranks)
    assert run.wait() == [0] * ranks, run.said()
    same(folder, unbroken[ranks])
    assert [
        (entry["step"], entry["resumed"]) for entry in entries(folder) if "resumed" in entry
    ] == [(stopped, f"step-{stopped:08d}")]


def test_a_stop_whose_checkpoint_cannot_be_written(start: Start, tmp_path: Path) -> None:
    """All ranks end together, and a launcher's signal to them changes no exit code."""
    folder = tmp_path / "run"
    run = start(folder, "--set.train.checkpoint_every", 0, "--set.optim.steps", 10**6, ranks=2)
    run.until(lambda: len(losses(folder)) >= 3)
    (folder / "checkpoints").write_text("")  # no folder, and so no place for one
    os.kill(run.pid(0), signal.SIGTERM)
    while "namr: error: " not in run.said() and any(rank.is_alive() for rank in run.ranks):
        time.sleep(0.01)
    time.sleep(1.2)  # longer than signals are one request
    for rank in run.ranks:
        rank.terminate()
    assert run.wait() == [74, 74], run.said()
    assert run.said().count("namr: error: a signal asked for an end after step") == 1
    assert "Traceback" not in run.said() and "SIGTERM again" not in run.said()


@pytest.fixture
def half(start: Start, unbroken: dict[int, Path], tmp_path: Path) -> Path:
    """The run on one rank, as a kill after step 58 would have left it: checkpoints at 52 and 56."""
    run = tmp_path / "half"
    shutil.copytree(unbroken[1], run)
    (run / "checkpoints" / "final.safetensors").unlink()
    lines = [json.dumps(entry) for entry in entries(run) if entry["step"] <= 58]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 59, "lo')
    return run


def test_damaged_checkpoints(start: Start, unbroken: dict[int, Path], half: Path) -> None:
    older, newest = (path for _, path in RunFolder(half).checkpoints())
    part = newest / "rank-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    run = start(half, "--resume")
    assert run.wait() == [0], run.said()
    assert f"WARNING: {newest} is damaged" in run.said() and "resumed   at step 52" in run.said()
    assert f"WARNING: 1 line of {half / 'metrics.jsonl'} could not be read; dropped" in run.said()
    same(half, unbroken[1])

    (half / "checkpoints" / "final.safetensors").unlink()
    for _, path in RunFolder(half).checkpoints():
        part = path / "rank-00000.safetensors"
        part.write_bytes(part.read_bytes()[:-1])
    refused(
        start(half, "--resume"),
        "no checkpoint in",
        "is whole",
        "is damaged (rank-00000.safetensors: its SHA-256",
        "--overwrite",
    )
    safetensors.torch.save_file({"weight": torch.ones(1)}, older / "rank-00000.safetensors")
    refused(start(half, "--resume"), "no checkpoint in", "it has no SHA-256 of itself")
    for _, path in RunFolder(half).checkpoints():
        shutil.rmtree(path)
    (half / "checkpoints" / "step-00000052.safetensors").touch()
    refused(start(half, "--resume"), "was written by an older version of namr-dist")


def test_a_checkpoint_of_another_run(start: Start, half: Path) -> None:
    """Copied in by mistake: its own configuration is in it, and so is its step."""
    newest = RunFolder(half).checkpoints()[-1][1]
    renamed = RunFolder(half).checkpoint(57)
    shutil.copytree(newest, renamed)
    refused(start(half, "--resume"), str(renamed), "holds step 56")
    shutil.rmtree(renamed)
    about = json.loads((half / "config.json").read_text())
    about["train"]["seed"] = 7
    (half / "config.json").write_text(json.dumps(about))
    refused(start(half, "--resume", "--set.train.seed", 7), str(newest), "train.seed is 7, there 0")


def test_a_damaged_final_network_is_made_again(
    start: Start, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken[1], run)
    final = run / "checkpoints" / "final.safetensors"
    final.write_bytes(final.read_bytes()[:100])
    again = start(run, "--resume")
    assert again.wait() == [0], again.said()
    assert f"WARNING: {final} is damaged" in again.said()
    same(run, unbroken[1])


def test_a_run_goes_on_without_its_initial_weights_and_past_damaged_images(
    start: Start, own_shard_set: Manifest, tmp_path: Path
) -> None:
    """Both are as an unbroken run's: the weights are in the checkpoint, and no image was replaced
    before. Finished, the run needs them as little."""
    torch.manual_seed(0)
    weights, run, unbroken = tmp_path / "weights.pt", tmp_path / "run", tmp_path / "unbroken"
    small = build_backbone(
        "timm:test_resnet", batchnorm="train", pretrained=False, weights=None, image_size=32
    )
    torch.save(small.layers.state_dict(), weights)
    words = [
        *("--set.model.backbone", "timm:test_resnet", "--set.model.weights", weights),
        *("--set.data.path", own_shard_set.folder),
    ]
    done = start(unbroken, *words, steps=8)
    assert done.wait() == [0], done.said()
    shutil.copytree(unbroken, run)
    weights.unlink()
    (run / "checkpoints" / "final.safetensors").unlink()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries(run) if entry["step"] <= 4)
    )
    words += ["--resume", "--set.data.damaged_images", "replace"]
    again = start(run, *words, steps=8)
    assert again.wait() == [0], again.said()
    assert "resumed   at step 4" in again.said() and "WARNING" not in again.said()
    same(run, unbroken)
    checkpoint = RunFolder(run).checkpoint(4)
    assert open_state(checkpoint).versions == versions()
    shutil.rmtree(checkpoint)
    finished = start(run, *words, steps=8)
    assert finished.wait() == [0] and "is finished" in finished.said(), finished.said()


def test_the_other_ranks_end_with_the_first(
    start: Start, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    """What only the first rank sees ends all, told once, and before anything is lost."""
    run = tmp_path / "run"
    shutil.copytree(unbroken[2], run)
    refused = start(run, ranks=2)
    assert refused.wait() == [2, 2], refused.said()
    assert refused.said().count("already holds a run") == 1
    same(run, unbroken[2])


def test_other_settings_and_images(
    start: Start, unbroken: dict[int, Path], half: Path, shard_set: Manifest, tmp_path: Path
) -> None:
    refused(start(half), "already holds a run", "--resume", "--overwrite")
    refused(
        start(half, "--resume", "--set.optim.head_lr", 0.5, "--set.train.seed", 3),
        "optim.head_lr is 0.5, there 0.001",
        "train.seed is 3, there 0",
    )
    other = make_shards(tmp_path / "other", classes={"train": 12, "val": 4, "test": 6}, images=7)
    refused(
        start(half, "--resume", "--set.data.path", other.folder),
        "trained on other images than",
        "data.path",
    )
    moved = shutil.copytree(shard_set.folder, tmp_path / "moved")
    run = start(
        half,
        "--resume",
        "--set.data.path",
        moved,
        "--set.train.zero_stage",
        3,
        "--set.train.log_every",
        1,
    )
    assert run.wait() == [0], run.said()
    same(half, unbroken[1])
    run = start(half, "--resume")
    assert run.wait() == [0] and f"{half} is finished" in run.said()
    assert "resumed" not in run.said()


def test_the_images_that_are_trained_on_name_a_run(shard_set: Manifest, tmp_path: Path) -> None:
    """A class list is a file, and may have changed under its name."""
    path = tmp_path / "classes.txt"
    hashes = []
    for words in ("1 2 3", "1 2 4", "1 2 3"):
        path.write_text("\n".join(words.split()))
        hashes.append(
            hash_images(shard_set, training_images(shard_set, DataConfig(class_list=path), seed=0))
        )
    assert hashes[0] == hashes[2] != hashes[1]


def test_disk_full_at_a_checkpoint(start: Start, unbroken: dict[int, Path], tmp_path: Path) -> None:
    """Files over 2 MiB are refused from some moment on: the run goes on with the checkpoint it
    has."""
    folder = tmp_path / "run"
    run = start(folder)
    run.until(lambda: bool(RunFolder(folder).checkpoints()))
    resource.prlimit(run.pid(0), resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
    assert run.wait() == [0], run.said()
    kept = RunFolder(folder).checkpoints()
    assert 1 <= len(kept) <= 2 and kept[-1][0] < 56
    assert f"WARNING: no checkpoint at step {kept[-1][0] + 4}: File too large" in run.said()
    assert f"goes on from step {kept[-1][0]}" in run.said()
    for _, path in kept:
        open_state(path)
    same(folder, unbroken[1])


def test_a_disk_that_refuses_logs_for_a_while(
    start: Start, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    """Files over a few KiB are refused from some moment on, and later no more: each line of
    metrics.jsonl and each record of TensorBoard is there in the end, once and whole."""
    folder = tmp_path / "run"
    run = start(folder, "--set.train.tensorboard", "True", "--set.train.log_every", 3)
    run.until(lambda: max(losses(folder), default=0) >= 5)
    log = folder / "metrics.jsonl"
    whole, open_end = (log.stat().st_size + 700, resource.RLIM_INFINITY)
    resource.prlimit(run.pid(0), resource.RLIMIT_FSIZE, (whole, open_end))
    run.until(lambda: f"WARNING: {log} cannot be written (File too large)" in run.said())
    assert log.read_bytes().endswith(b"}\n"), "a torn line"
    run.until(lambda: "WARNING: no checkpoint at step" in run.said())
    resource.prlimit(run.pid(0), resource.RLIMIT_FSIZE, (open_end, open_end))
    assert run.wait() == [0], run.said()
    same(folder, unbroken[1])
    (events,) = (folder / "tensorboard").iterdir()
    rest, again = events.read_bytes(), RecordWriter(str(tmp_path / "again"))
    steps = []
    while rest:
        (length,) = struct.unpack("<Q", rest[:8])
        body, rest = rest[12 : 12 + length], rest[16 + length :]
        again.write(body)
        event = Event.FromString(body)
        steps += [event.step for value in event.summary.value if value.tag == "train/loss"]
    again.close()
    assert steps == list(range(1, STEPS + 1))
    assert (tmp_path / "again").read_bytes() == events.read_bytes(), "tensorboardX writes another"


def test_a_killed_worker_ends_all_ranks_with_a_code_that_is_queued_again(
    start: Start, unbroken: dict[int, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = start(folder, "--set.data.workers", 1, ranks=2)
    run.until(lambda: bool(RunFolder(folder).checkpoints()))
    path = Path(f"/proc/{run.pid(1)}/task/{run.pid(1)}/children")
    os.kill(int(path.read_text().split()[0]), signal.SIGKILL)
    assert run.wait() == [74, 74], run.said()
    (line,) = [line for line in run.said().splitlines() if line.startswith("namr: error: ")]
    assert "a data worker process" in line and "(rank 1 on " in line
    assert "Traceback" not in run.said()
    run = start(folder, "--resume", ranks=2)
    assert run.wait() == [0, 0], run.said()
    same(folder, unbroken[2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set.data.classes_per_batch", 5), "which 2 ranks cannot share"),
        (("--set.data.path", "nowhere"), "no shard set at nowhere"),
        (("--set.optim.stepps", 5), "Unrecognized options"),
    ],
)
def test_a_mistake_is_said_once_by_all_ranks(
    start: Start, tmp_path: Path, words: tuple, said: str
) -> None:
    run = start(tmp_path / "run", *words, ranks=2)
    assert run.wait() == [2, 2], run.said()
    assert run.said().count("namr: error: ") == 1 and said in run.said()


def test_checkpoints_by_time(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ("--set.train.checkpoint_every", 0, "--set.train.checkpoint_minutes", 1e-6)
    run = start(folder, *words, ranks=2, steps=4)
    assert run.wait() == [0, 0], run.said()
    assert [step for step, _ in RunFolder(folder).checkpoints()] == [2, 3]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_other_number_of_ranks(start: Start, tmp_path: Path, before: int, after: int) -> None:
    """The same batches go on to the same losses; at learning rates at which training amplifies no
    rounding."""
    words = (
        "--set.data.classes_per_batch",
        4,
        "--set.loss.metric",
        "multi_similarity",
        "--set.optim.backbone_lr",
        1e-5,
        "--set.optim.head_lr",
        1e-5,
        "--set.train.validate_every",
        1000,
    )
    folder = tmp_path / "run"
    run = start(folder, *words, ranks=before, steps=12)
    assert run.wait() == [0] * before, run.said()
    expected = losses(folder)
    (folder / "checkpoints" / "final.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    run = start(folder, *words, "--resume", ranks=after, steps=12)
    assert run.wait() == [0] * after, run.said()
    assert "resumed   at step 4 from" in run.said()  # epochs have three steps
    by_step = losses(folder)
    assert [by_step[step] for step in range(1, 5)] == [expected[step] for step in range(1, 5)]
    assert [by_step[step][0] for step in range(5, 13)] == pytest.approx(
        [expected[step][0] for step in range(5, 13)], rel=1e-6
    )


def test_the_memory_goes_on(start: Start, tmp_path: Path) -> None:
    """Bit for bit, with what a cross-batch memory holds and the drift it sees; ZeRO-2 on two
    ranks."""
    words = (
        "--set.loss.metric",
        "margin",
        "--set.loss.memory.rows",
        40,
        "--set.loss.memory.start_step",
        2,
    )
    folder = tmp_path / "run"
    run = start(folder, *words, ranks=2, steps=12)
    assert run.wait() == [0, 0], run.said()
    expected = steps_of(folder)
    (folder / "checkpoints" / "final.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    run = start(folder, *words, "--resume", ranks=2, steps=12)
    assert run.wait() == [0, 0] and "resumed   at step 4 from" in run.said(), run.said()
    assert steps_of(folder) == expected
    assert any("drift" in entry for entry in expected[4:]) and len(expected) == 12


def steps_of(folder: Path) -> list[dict]:
    """The step lines, but for the clock."""
    return [
        {name: value for name, value in entry.items() if name != "time_s"}
        for entry in entries(folder)
        if "loss" in entry
    ]
