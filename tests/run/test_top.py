"""A run is watched from outside: what its folder says while it trains, stops, goes on and ends."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from conftest import small_run
from rich.console import Console
from training_runs import Run, start_parent

from namr_dist.config import Config, DataConfig, OptimConfig
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.errors import InputError
from namr_dist.run.folder import RunFolder
from namr_dist.run.state import RunReader, RunState
from namr_dist.run.top import duration, view

CONFIG = Config(
    recipe="sop",
    data=DataConfig(classes_per_batch=50, images_per_class=4),
    optim=OptimConfig(steps=1000),
)


def step_line(step: int, time_s: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step // 100,
        "loss": 3 / step,
        "metric_loss": 2 / step,
        "ranking_loss": 1 / step,
        "lr": 1e-4,
        "time_s": time_s,
    }


SPEED = {
    "step": 100,
    "img_per_s": 400.0,
    "mfu": 0.25,
    "damaged_images": 3,
    "replacements": 7,
    "time_s": 50.0,
    "data_s": 0.1,
    "forward_s": 0.2,
    "backward_s": 0.15,
    "slowest_rank": 5,
    "slowest_host": "node07",
    "slowest_s": 0.32,
    "gathered_mib": 2.04,
}


class Folder:
    """A run's folder, written as training writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "checkpoints").mkdir(parents=True)
        (path / "config.json").write_text(CONFIG.to_json())

    def log(self, *entries: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def age(self, seconds: float) -> None:
        for name in ("config.json", "metrics.jsonl"):
            os.utime(self.path / name, (time.time() - seconds,) * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


@contextmanager
def held_lock(run: Path) -> Iterator[BaseProcess]:
    """Another process holds the run's lock, as one that trains does."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def hold() -> None:
        lock = RunFolder(run).lock()
        there.send(lock is not None)
        time.sleep(600)

    process = fork.Process(target=hold)
    process.start()
    assert here.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def text_of(state: RunState, *, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view(state))
    return console.export_text()


def test_the_picture_has_what_the_log_says(folder: Folder) -> None:
    folder.log(
        *(step_line(step, step / 2) for step in range(1, 101)),
        SPEED,
        {"step": 50, "val": {"R@1": 71.26, "MAP@R": 40.1}, "time_s": 25.0},
        {"step": 100, "val": {"R@1": 70.0, "MAP@R": 41.0}, "time_s": 50.0},
    )
    for step in (50, 100):
        (folder.path / "checkpoints" / f"step-{step:08d}").mkdir()
    state = RunReader(folder.path).look()
    assert (state.step, state.steps, state.epoch, state.loss, state.metric_loss) == (
        100,
        1000,
        1,
        0.03,
        0.02,
    )
    assert state.step_s == 0.5 and state.phases_s == {"data": 0.1, "forward": 0.2, "backward": 0.15}
    assert (state.slowest_rank, state.slowest_host, state.checkpoint_step) == (5, "node07", 100)
    assert (
        state.best_validation
        and state.best_validation.step == 50
        and state.left_s == pytest.approx(450, abs=1)
    )
    lines = {line[:13].strip(): " ".join(line[13:].split()) for line in text_of(state).splitlines()}
    assert lines["step"] == "100 of 1,000, 10.0 %, epoch 1"
    assert lines["loss"] == "0.0300 (metric 0.0200, ranking 0.0100), lr 1.0e-04"
    assert lines["speed"] == "400 img/s, 25 % of peak, 2.04 MiB gathered a step"
    assert lines["a step"].startswith("data 100.0 ms 20 % ████▊")
    assert lines["slowest"] == "rank 5 on node07, 320 ms of its own a step"
    assert lines["validation"] == "R@1 70.0 MAP@R 41.0 at step 100"
    assert lines["best so far"] == "R@1 71.3 MAP@R 40.1 at step 50"
    assert lines["damaged"] == "3 images, replaced 7 times"
    assert " rest 50.0 ms 10 % " in " ".join(text_of(state).split())


def test_time_left_counts_pauses_and_only_steps_since_the_last_start(folder: Folder) -> None:
    """Of 200 steps since the restart, the later 100 took 1 s each and a validation of 60 s: 1.6 s a
    step."""
    folder.log(
        *(step_line(step, 9.0 * step) for step in range(1, 101)),
        {"step": 100, "resumed": "x", "time_s": 900.0},
        *(step_line(100 + step, 900.0 + step + 60 * (step > 150)) for step in range(1, 201)),
    )
    state = RunReader(folder.path).look()
    assert state.resumed_from == (100,) and state.state == "training"
    assert state.left_s == pytest.approx(700 * 1.6, abs=2) and state.elapsed_s == pytest.approx(
        1160, abs=2
    )
    assert "restarts" in text_of(state) and "1, from step 100" in text_of(state)


def test_a_line_that_is_being_written_waits_for_its_end(folder: Folder) -> None:
    reader = RunReader(folder.path)
    assert reader.look().step == 0 and reader.look().last_line_age_s is None
    line = json.dumps(step_line(2, 2.0)) + "\n"
    folder.log(step_line(1, 1.0))
    for part, step in ((line[:20], 1), (line[20:-1], 1), (line[-1:], 2)):
        with open(folder.path / "metrics.jsonl", "a") as file:
            file.write(part)
        assert reader.look().step == step


def test_bad_lines_are_counted(folder: Folder) -> None:
    reader = RunReader(folder.path)
    folder.log(step_line(1, 1.0))
    assert reader.look().unreadable_lines == 0 and "cannot be read" not in text_of(reader.look())
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "lo{"step": 2, "loss": 9.0}\n\xff\n' + b'{"step": 3, "lo')
    folder.log(step_line(4, 4.0))  # behind the half line, and lost with it
    assert (reader.look().step, reader.look().unreadable_lines) == (1, 3)
    assert "3 lines cannot be read" in text_of(reader.look())
    (folder.path / "metrics.jsonl").unlink()
    assert reader.look().unreadable_lines == 0


@pytest.mark.parametrize(
    "wrong", [None, "x", [1], {"a": 1}, True, float("nan"), float("inf"), -1, 10**17, 1e300]
)
def test_values_of_wrong_types_are_not_shown(folder: Folder, wrong: Any) -> None:
    """In every field of every kind of line."""
    folder.log(
        step_line(1, 1.0),
        *(
            {**line, name: wrong}
            for line in (step_line(2, 2.0), SPEED)
            for name in line
            if name != "step"
        ),
        {"step": 2, "val": wrong},
        {"step": 2, "val": {"R@1": wrong}},
        {"step": 2, "resumed": wrong},
        dict.fromkeys([*step_line(3, 3.0), *SPEED], wrong) | {"step": 3},
    )
    state = RunReader(folder.path).look()
    text_of(state)
    json.dumps(dataclasses.asdict(state))
    assert state.step == 2 and state.unreadable_lines == 0
    if not isinstance(wrong, (int, float)) or isinstance(wrong, bool):
        assert state.img_per_s is None and state.phases_s == {} and state.slowest_rank is None


def test_a_log_that_was_cut_or_replaced_is_read_anew(folder: Folder) -> None:
    reader = RunReader(folder.path)
    folder.log(
        *(step_line(step, step) for step in range(1, 21)),
        {"step": 20, "val": {"R@1": 50.0}, "time_s": 20.0},
    )
    assert reader.look().step == 20
    kept = [json.dumps(step_line(step, step)) + "\n" for step in range(1, 11)]
    new = folder.path / "new"
    # A longer file in its place: its size alone would not tell.
    new.write_text(
        "".join(kept)
        + json.dumps({"step": 10, "resumed": "x", "time_s": 10.0, "note": "x" * 3000})
        + "\n"
    )
    assert new.stat().st_size > (folder.path / "metrics.jsonl").stat().st_size
    os.replace(new, folder.path / "metrics.jsonl")
    state = reader.look()
    assert (state.step, state.validation, state.resumed_from) == (10, None, (10,))
    (folder.path / "metrics.jsonl").write_text(kept[0])
    assert (reader.look().step, reader.look().resumed_from) == (1, ())
    (folder.path / "metrics.jsonl").unlink()
    assert reader.look().step == 0


def test_only_what_was_added_is_read(folder: Folder) -> None:
    reader = RunReader(folder.path)
    folder.log(step_line(1, 1.0), step_line(2, 2.0))
    assert reader.look().loss == 1.5
    path = folder.path / "metrics.jsonl"
    with open(path, "r+b") as file:  # what was read already is no JSON any more
        file.write(b"#" * (path.stat().st_size - 1))
    folder.log(step_line(3, 3.0))
    assert reader.look().loss == 1.0 and reader.look().left_s == pytest.approx(997, abs=1)


def test_a_held_lock_means_training_and_a_free_one_stopped(folder: Folder) -> None:
    # No lock to ask, and a fresh config.json.
    assert RunReader(folder.path).look().state == "training"
    with held_lock(folder.path) as process:
        assert RunReader(folder.path).look().state == "training"
        folder.log(step_line(1, 1.0), step_line(2, 2.0))
        folder.age(3600)
        state = RunReader(folder.path).look()
        assert state.state == "training" and state.silent_s == pytest.approx(3600, abs=5)
        assert "training, silent for 1 h 00 min" in text_of(state)
        with pytest.raises(InputError, match="in use"):  # being looked at, it stays locked
            RunFolder(folder.path).lock()
        process.kill()
        process.join()
        state = RunReader(folder.path).look()
        assert state.state == "stopped" and state.silent_s is None
        assert "stopped; goes on with --resume" in text_of(state)
    folder.age(0)  # a lock that is not seen from here: fresh lines tell
    assert RunReader(folder.path).look().state == "training"


def test_without_a_lock_the_age_of_the_last_line_decides(folder: Folder) -> None:
    folder.log(step_line(1, 1.0), step_line(2, 2.0))
    assert RunReader(folder.path).look().state == "training"
    folder.age(59)
    assert RunReader(folder.path).look().state == "training"
    # Five times the ten steps between two writes are 50 s, and a minute is the least.
    folder.age(150)
    assert RunReader(folder.path).look().state == "stopped"


def test_nothing_begun_finished_and_evaluated(folder: Folder) -> None:
    RunFolder(folder.path).lock().close()
    os.utime(folder.path / "config.json", (0, 0))
    assert RunReader(folder.path).look().state == "not started"
    (folder.path / "checkpoints" / "final.safetensors").touch()
    assert RunReader(folder.path).look().state == "finished"
    (folder.path / "metrics.json").touch()
    assert RunReader(folder.path).look().state == "evaluated"


def test_looking_never_turns_away_a_run_that_starts(folder: Folder) -> None:
    RunFolder(folder.path).lock().close()
    code = (
        "import sys; from pathlib import Path; from namr_dist.run.state import RunReader\n"
        "print('looking', flush=True)\nwhile True: RunReader(Path(sys.argv[1])).look()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "looking\n"
        for _ in range(2000):
            RunFolder(folder.path).lock().close()
        assert process.poll() is None
        process.kill()


def test_looking_needs_no_torch() -> None:
    code = "import sys, namr_dist.run.top; print(sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_durations_are_told_in_two_units() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 7380, 3 * 86400 + 4 * 3600)] == [
        "0 s",
        "1 min 00 s",
        "2 h 03 min",
        "3 d 04 h",
    ]


def test_the_command_prints_once_and_as_json(folder: Folder, namr: Callable[..., Any]) -> None:
    folder.log(step_line(1, 1.0), SPEED)
    plain = namr("top", folder.path)
    assert plain.returncode == 0 and plain.stdout.count("400 img/s") == 1
    facts = json.loads(namr("top", folder.path, "--json").stdout)
    assert facts["unreadable_lines"] == 0
    assert (
        facts["img_per_s"] == 400.0
        and facts["state"] == "training"
        and facts["phases_s"]["data"] == 0.1
    )
    nowhere = namr("top", folder.path / "checkpoints")
    assert (
        nowhere.returncode == 2
        and nowhere.stderr.count("\n") == 1
        and "--run-dir" in nowhere.stderr
    )


def on_terminal(run: Path) -> tuple[int, int]:
    """`namr top` on a terminal of its own; its process and the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        # Ignored in what a script starts in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-m", "namr_dist.cli", "top", str(run)])
    return pid, terminal


def until(terminal: int, words: str) -> str:
    """What the terminal shows, up to these words; or to its end."""
    shown = ""
    with suppress(OSError):  # Linux's end of a terminal
        while words not in shown and (part := os.read(terminal, 4096)):
            shown += part.decode(errors="replace")
    return shown


def test_on_a_terminal_it_goes_on_until_the_run_is_finished(folder: Folder) -> None:
    folder.log(step_line(1, 1.0))
    pid, terminal = on_terminal(folder.path)
    assert "1 of 1,000" in until(terminal, "1 of 1,000")
    folder.log(step_line(2, 2.0))
    assert "2 of 1,000" in until(terminal, "2 of 1,000")
    (folder.path / "checkpoints" / "final.safetensors").touch()
    assert "finished" in until(terminal, "finished")
    until(terminal, "\0")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_ctrl_c_on_a_terminal_ends_it_with_code_0(folder: Folder) -> None:
    folder.log(step_line(1, 1.0))
    pid, terminal = on_terminal(folder.path)
    until(terminal, "1 of 1,000")
    os.write(terminal, b"\x03")
    assert "Traceback" not in until(terminal, "\0")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


@pytest.mark.dist
@pytest.mark.slow
def test_a_real_run_is_seen_training_and_killed(tmp_path: Path, shard_set: Manifest) -> None:
    start_parent()
    run = tmp_path / "run"
    training = Run(
        1,
        [
            "homeware_conv4",
            "--run-dir",
            run,
            "--resume",
            *small_run(shard_set, steps=100_000),
            "--set.train.checkpoint_every",
            10,
        ],
        tmp_path / "said.txt",
    )
    try:
        state = watch_until(
            run, lambda state: state.checkpoint_step is not None and state.img_per_s is not None
        )
        assert state.state == "training" and state.steps == 100000 and state.left_s
        assert state.slowest_rank == 0 and state.slowest_host == os.uname().nodename
        assert set(state.phases_s) == {
            "data",
            "forward",
            "heads",
            "gather",
            "loss",
            "backward",
            "step",
        }
        assert sum(state.phases_s.values()) < 1.1 * (state.step_s or 0)
    finally:
        training.kill()
    stopped = watch_until(run, lambda state: state.state != "training")
    training.wait()
    assert stopped.state == "stopped" and stopped.checkpoint_step is not None


def watch_until(run: Path, condition: Callable[[RunState], bool]) -> RunState:
    """Look at a run, from before it has a folder, until it stands as wanted."""
    reader, give_up = RunReader(run), time.monotonic() + 120
    while time.monotonic() < give_up:
        with suppress(InputError):  # it has not begun
            if condition(state := reader.look()):
                return state
        time.sleep(0.05)
    raise TimeoutError(f"{run} did not come to stand so")
