"""`namr reproduce` on real runs: kill -9, a signal and a loss that fails on the way to one table,
which is what metrics.json of its runs says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, alive
from training_runs import entries

from namr_dist.cli.main import main
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.train.signals import EXIT_CODE

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

STEPS = 30
# A memory is an option that one of the two losses refuses.
GRID = ["--losses", "triplet", "proxy_anchor", "--seeds", "0"]


def command(manifest: Manifest, folder: Path, *words: object) -> list[str]:
    settings = {
        "data.path": manifest.folder,
        "data.classes_per_batch": 6,
        "data.images_per_class": 3,
        "data.image_size": 32,
        "data.workers": 0,
        "model.width": 16,
        "model.structure_hidden": 24,
        "optim.steps": STEPS,
        "optim.warmup_steps": 2,
        "loss.memory.rows": 36,
        "loss.memory.start_step": 4,
        "train.tensorboard": False,
    }
    return [
        str(word)
        for word in (
            "reproduce",
            "homeware_conv4",
            *words,
            "--run-dir",
            folder,
            *(part for name, value in settings.items() for part in (f"--set.{name}", value)),
        )
    ]


class Held:
    """The command as a process of its own, with the run that it trains held still after a step or
    more."""

    def __init__(self, words: list[str], said: Path, *, run: Path) -> None:
        seen = sum(1 for _ in entries(run))
        with open(said, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "namr_dist.cli", *words],
                env=ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._said = said
        self.until(lambda: sum("loss" in entry for entry in entries(run)) > seen)
        listed = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        (self.run_pid,) = map(int, listed)
        os.kill(self.run_pid, signal.SIGSTOP)
        # Until then, a SIGTERM would still be heard, and never be seen to wait.
        status = Path(f"/proc/{self.run_pid}/status")
        self.until(lambda: "State:\tT" in status.read_text())

    def until(self, condition: Callable[[], bool], *, gone: bool = False) -> None:
        give_up = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < give_up and (gone or self.process.poll() is None), (
                self._said.read_text()
            )
            time.sleep(0.005)

    def go_on_once_signalled(self) -> None:
        """Let the run go on once a SIGTERM waits for it, and wait until it has ended."""
        bit = 1 << signal.SIGTERM - 1
        status = Path(f"/proc/{self.run_pid}/status")
        self.until(
            lambda: any(
                int(line.split()[1], 16) & bit
                for line in status.read_text().splitlines()
                if line.startswith("ShdPnd")
            ),
            gone=True,
        )
        os.kill(self.run_pid, signal.SIGCONT)
        self.until(lambda: not alive(self.run_pid), gone=True)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, shard_set: Manifest) -> tuple[Path, list[str]]:
    """The folder in which the tests, one after the other, find what those before have left; and the
    command's words."""
    folder = tmp_path_factory.mktemp("reproduce") / "runs"
    return folder, command(shard_set, folder, *GRID)


def steps_of(run: Path) -> list[int]:
    return [entry["step"] for entry in entries(run) if "loss" in entry]


@pytest.mark.whole
def test_a_signal_ends_the_command_with_a_checkpoint(shard_set: Manifest, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "triplet-0-0"
    held = Held(command(shard_set, tmp_path / "runs", *GRID), tmp_path / "interrupted", run=run)
    held.process.send_signal(signal.SIGINT)
    held.go_on_once_signalled()
    assert held.process.wait(60) == EXIT_CODE
    assert "stopped at triplet-0-0, as a signal asked for" in (tmp_path / "interrupted").read_text()
    assert len(list((run / "checkpoints").glob("step-*.safetensors"))) == 1


def test_a_grid_that_was_killed_ends_in_the_table_of_its_runs(
    grid: tuple[Path, list[str]], tmp_path: Path, namr: Callable
) -> None:
    folder, words = grid
    first = folder / "triplet-0-0"
    held = Held(words, tmp_path / "killed", run=first)
    held.process.kill()
    held.process.wait()
    held.go_on_once_signalled()  # by its parent's death
    assert not (first / "metrics.json").exists()
    [saved] = (first / "checkpoints").glob("step-*.safetensors")

    done = namr(*words, timeout=600)
    assert done.returncode == 1, done.stderr
    for weight in "02":
        line = next(line for line in done.stderr.splitlines() if f"proxy_anchor-{weight}-0" in line)
        assert (
            "FAILED: training ended with code 2: namr: error: loss.memory.rows is 36, but proxy_anchor"
            in line
        )
    assert done.stderr.splitlines()[-1] == "2 of 4 runs failed: proxy_anchor-0-0, proxy_anchor-2-0"
    assert next(entry["resumed"] for entry in entries(first) if "resumed" in entry) == saved.name
    assert steps_of(first) == steps_of(folder / "triplet-2-0") == list(range(1, STEPS + 1))

    rows = [
        line.split()
        for line in done.stdout.split("What multi")[0].splitlines()
        if line.split()[:1] in (["0"], ["2"])
    ]
    measured = {
        weight: json.loads((folder / f"triplet-{weight}-0" / "metrics.json").read_text())["test"][
            "sample"
        ]
        for weight in "02"
    }
    assert [row[0] for row in rows] == ["0", "2"]
    for weight, _, recall, *_ in rows:
        assert float(recall) == pytest.approx(measured[weight]["R@1"], abs=0.006)
    assert (
        done.stdout.splitlines()[-1] == str(folder / "report.html")
        and (folder / "report.html").exists()
    )


def test_a_loss_meets_the_same_batches_and_weights_with_ranking_and_without(
    grid: tuple[Path, list[str]],
) -> None:
    """The metric loss of the first step, before any weight has changed, is the same number."""
    folder, _ = grid
    without, with_ranking = (
        next(entry for entry in entries(folder / f"triplet-{weight}-0") if "loss" in entry)
        for weight in "02"
    )
    assert without["metric_loss"] == with_ranking["metric_loss"] and without["ranking_loss"] == 0.0
    assert with_ranking["loss"] == pytest.approx(
        with_ranking["metric_loss"] + 2 * with_ranking["ranking_loss"]
    )


def test_runs_that_are_done_are_kept(
    grid: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, words = grid
    before = {
        path: path.stat().st_mtime_ns for path in folder.glob("triplet-*/**/*") if path.is_file()
    }
    assert main([*words, "--losses", "triplet", "--json"]) == 0
    said = capfd.readouterr()
    assert "2 runs of 30 steps on 1 rank(s), 2 of them there already" in said.err
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) > 10
    table = json.loads(said.out)
    measured = [
        json.loads((folder / f"triplet-{weight}-0" / "metrics.json").read_text())["test"]["sample"]
        for weight in "02"
    ]
    assert [one["figures"]["sample"]["MAP@R"]["mean"] for one in table["settings"]] == [
        pytest.approx(one["MAP@R"]) for one in measured
    ]
    [difference] = table["differences"]
    assert difference["paired"] and difference["gains"]["R@1"]["mean"] == pytest.approx(
        measured[1]["R@1"] - measured[0]["R@1"]
    )


def test_other_settings_than_those_of_the_runs_there_are_refused_before_any_starts(
    grid: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = grid
    before = (folder / "triplet-0-0" / "log.txt").read_bytes()
    assert main([*words, "--set.optim.head_lr", "0.5"]) == 2
    assert (
        "triplet-0-0/config.json belongs to another run: optim.head_lr is 0.5"
        in capsys.readouterr().err
    )
    assert (folder / "triplet-0-0" / "log.txt").read_bytes() == before


def test_the_dry_run_names_every_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    assert main(["reproduce", "--dry-run", "--ranks", "1", "--run-dir", str(folder)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "24 runs of 450 steps" in head and not folder.exists()
    assert [row.split()[:2] for row in rows] == [
        [f"{loss}-{weight}-{seed}", "begins"]
        for seed in range(3)
        for weight in "02"
        for loss in ("triplet", "margin", "multi_similarity", "proxy_anchor")
    ]
    assert rows[-1].endswith(
        "--set.optim.steps 450 --set.loss.metric proxy_anchor --set.loss.ranking.weight 2.0 "
        "--set.train.seed 2"
    )
    assert (
        main(
            [
                "reproduce",
                "--dry-run",
                "--ranks",
                "2",
                "--run-dir",
                str(folder),
                "--losses",
                "margin",
                "--weights",
                "0.5",
                "--seeds",
                "7",
                "--set.optim.steps",
                "9",
            ]
        )
        == 0
    )
    head, row = capsys.readouterr().out.splitlines()
    assert "1 runs of 9 steps on 2 rank(s)" in head and row.startswith("margin-0.5-7 ")
    assert (
        "namr_dist.launchers.torchrun --standalone --nproc-per-node 2 --module namr_dist.launchers.train"
        in row
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["--seeds", "1", "1"], "triplet-0-1 is asked for twice"),
        (["--set.loss.metric", "margin"], "give --losses margin"),
        (["--set.train.seed", "4"], "give --seeds 4"),
        (["--ranks", "0"], "--ranks is 0"),
        (["--ranks", "3"], "which 3 ranks cannot share"),
    ],
)
def test_what_no_grid_can_be_made_of_is_refused_in_a_line(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "--run-dir", str(tmp_path / "runs"), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()
