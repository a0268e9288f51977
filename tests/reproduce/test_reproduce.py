"""`namr reproduce` on real runs: kill -9, a signal and a loss that fails on the way to one table,
which is what metrics.json of its runs says; and cells that are done wherever they lie."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, alive, small_run
from training_runs import entries

from namr_dist import recipes
from namr_dist.cli.main import main
from namr_dist.config import Config
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.recipes.overrides import configure
from namr_dist.reproduce.features import FEATURES, VARIANTS
from namr_dist.reproduce.images import RIVALS, plan
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
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


def test_a_grid_that_was_killed_ends_in_the_table_of_its_runs(
    grid: tuple[Path, list[str]], tmp_path: Path, forked_namr: Callable
) -> None:
    folder, words = grid
    first = folder / "triplet-0-0"
    held = Held(words, tmp_path / "killed", run=first)
    held.process.kill()
    held.process.wait()
    held.go_on_once_signalled()  # by its parent's death
    assert not (first / "metrics.json").exists()
    [saved] = (first / "checkpoints").glob("step-*")

    done = forked_namr(*words, timeout=600)
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
        words for line in done.stdout.splitlines() if (words := line.split())[:1] == ["triplet"]
    ]
    for row, figure in zip(rows, ("R@1", "MAP@R"), strict=True):
        without, with_ranking = (
            json.loads((folder / f"triplet-{weight}-0" / "metrics.json").read_text())["test"]
            for weight in "02"
        )
        shown = [without["sample"], with_ranking["sample"]]
        shown += [without["structure"], with_ranking["structure"]]
        assert row[1] == "1"  # seed
        assert [float(cell) for cell in row[2:6]] == [
            pytest.approx(one[figure], abs=0.006) for one in shown
        ]
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
    told = json.loads(said.out)
    assert list(told) == ["triplet"]
    without, with_ranking = (
        json.loads((folder / f"triplet-{weight}-0" / "metrics.json").read_text())["test"]
        for weight in "02"
    )
    means = {
        "alone": without["sample"],
        "ranking": with_ranking["sample"],
        "structure": without["structure"],
        "namr": with_ranking["structure"],
    }
    assert list(told["triplet"]) == [*means, "gain", "gain over classes"]
    for name, figures in means.items():
        assert told["triplet"][name] == {
            figure: [pytest.approx(figures[figure]), None, None] for figure in ("R@1", "MAP@R")
        }
    assert list(told["triplet"]["gain"]) == [
        "namr - alone",
        "ranking - alone",
        "structure - one",
        "structure - shuffled",
        "namr - ranking",
        "namr - shuffled",
    ]
    assert told["triplet"]["gain"].keys() == told["triplet"]["gain over classes"].keys()
    assert told["triplet"]["gain"]["ranking - alone"]["R@1"] == [
        pytest.approx(with_ranking["sample"]["R@1"] - without["sample"]["R@1"]),
        None,
        None,
    ]
    mean, low, high = told["triplet"]["gain over classes"]["structure - shuffled"]["MAP@R"]
    assert low <= mean <= high


CELL = {"cell.json", "classes.json", "config.json", "metrics.json", "metrics.jsonl"}


def test_finished_cells_are_copied_without_places_and_are_done_anywhere(
    grid: tuple[Path, list[str]],
    tmp_path: Path,
    shard_set: Manifest,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, words = grid
    results = tmp_path / "results"
    assert main([*words, "--losses", "triplet", "--results", str(results), "--json"]) == 0
    first = json.loads(capfd.readouterr().out)
    assert {path.name for path in results.iterdir()} == {"triplet-0-0", "triplet-2-0"}
    for cell in results.iterdir():
        assert {path.name for path in cell.iterdir()} == CELL
        content = "".join(path.read_text() for path in cell.iterdir())
        for place in (str(folder), str(shard_set.folder.parent), str(Path.home())):
            assert place not in content
        assert "slowest_host" not in content and f'"{socket.gethostname()}"' not in content
        assert steps_of(cell) == steps_of(folder / cell.name)
        for name in ("metrics.json", "classes.json"):
            assert (cell / name).read_bytes() == (folder / cell.name / name).read_bytes()

    # A copy that was cut short is made again, and one that is whole is left alone.
    (results / "triplet-0-0" / "metrics.json").unlink()
    before = (results / "triplet-2-0" / "metrics.json").stat().st_mtime_ns
    assert main([*words, "--losses", "triplet", "--results", str(results), "--json"]) == 0
    assert (results / "triplet-0-0" / "metrics.json").exists()
    assert (results / "triplet-2-0" / "metrics.json").stat().st_mtime_ns == before
    capfd.readouterr()

    # Each is copied before the next is looked at: here, before the next one fails.
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "triplet-2-0").touch()
    assert main([*words, "--losses", "triplet", "--results", str(blocked)]) != 0
    assert {path.name for path in (blocked / "triplet-0-0").iterdir()} == CELL
    capfd.readouterr()

    # Elsewhere, with nothing but these files, nothing is left to do.
    clean = command(shard_set, tmp_path / "clean", "--losses", "triplet", "--seeds", "0")
    assert main([*clean, "--results", str(results), "--json"]) == 0
    said = capfd.readouterr()
    assert "2 of them there already" in said.err and json.loads(said.out) == first
    assert not list((tmp_path / "clean").glob("triplet-*"))
    assert (tmp_path / "clean" / "report.html").exists()
    shutil.copytree(results / "triplet-0-0", tmp_path / "clean" / "triplet-0-0")
    assert main([*clean, "--dry-run"]) == 0
    rows = [line.split()[:2] for line in capfd.readouterr().out.splitlines()[1:]]
    assert rows == [["triplet-0-0", "is"], ["triplet-2-0", "begins"]]

    # Its figures of each class are part of it.
    (tmp_path / "clean" / "triplet-0-0" / "classes.json").unlink()
    assert main([*clean, "--dry-run"]) == 0
    assert "1 of them" not in capfd.readouterr().out.splitlines()[0]

    other = [*words, "--results", str(results), "--run-dir", str(tmp_path / "other")]
    assert main([*other, "--set.optim.head_lr", "0.5"]) == 2
    error = capfd.readouterr().err
    assert "triplet-0-0/config.json belongs to another run: optim.head_lr is 0.5" in error
    assert "another folder with --results" in error and not (tmp_path / "other").exists()


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
    words = ["reproduce", "--dry-run", "--ranks", "1", "--run-dir", str(folder)]
    assert main([*words, "--set.data.path", "https://me:secret@host/set?sig=secret"]) == 0
    said = capsys.readouterr().out
    assert "https://…@host/set?…" in said and "secret" not in said
    assert main(words) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "24 runs of 450 steps" in head and not folder.exists()
    assert [row.split()[:2] for row in rows] == [
        [f"{loss}-{weight}-{seed}", "begins"]
        for seed in range(3)
        for weight in "02"
        for loss in ("triplet", "margin", "multi_similarity", "proxy_anchor")
    ]
    assert rows[-1].endswith(
        "--set.train.validate_every 450 --set.loss.ranking.rise_passes 0 --set.optim.steps 450 "
        "--set.loss.metric proxy_anchor "
        "--set.loss.ranking.weight 2.0 --set.train.seed 2"
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


def test_rivals_change_what_they_are_named_for(tmp_path: Path) -> None:
    base = recipes.find("homeware")
    runs = plan(
        "homeware",
        base,
        [],
        tmp_path,
        losses=["margin"],
        weights=[],
        seeds=[3],
        rivals=list(RIVALS),
    )
    expected = {
        "margin-lower_rate-3": {
            "loss.ranking.weight": 0.0,
            "optim.backbone_lr": 0.3 * 2e-4,
            "optim.head_lr": 0.3 * 1e-3,
        },
        "margin-early_stop-3": {"loss.ranking.weight": 0.0, "optim.steps": 36},
        "margin-one_centre-3": {"loss.ranking.floor": 1.0, "model.delta": 1e-6},
    }
    old = flat(base)
    for run in runs:
        new = flat(run.config)
        assert {name: value for name, value in new.items() if value != old[name]} == pytest.approx(
            {"loss.metric": "margin", "train.seed": 3, **expected.pop(run.folder.name)}
        )
        # What the run is trained with is what the plan says.
        assert configure("homeware", run.words[4:]) == run.config
    assert not expected


def flat(config: Config) -> dict[str, object]:
    def fields(prefix: str, section: dict[str, object]) -> Iterator[tuple[str, object]]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from fields(f"{prefix}{name}.", value)
            else:
                yield prefix + name, value

    return dict(fields("", json.loads(config.to_json())))


def test_a_rivals_cell_bears_its_name(
    grid: tuple[Path, list[str]], tmp_path: Path, forked_namr: Callable
) -> None:
    _, words = grid
    results = tmp_path / "results"
    words = [*words, "--losses", "triplet", "--weights", "0", "--rivals", "early_stop"]
    done = forked_namr(*words, "--results", results, "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    cell = results / "triplet-early_stop-0"
    assert json.loads((cell / "cell.json").read_text()) == {
        "loss": "triplet",
        "variant": "early_stop",
        "seed": 0,
    }
    assert steps_of(cell) == list(range(1, 10))  # 0.3 of them
    assert len(steps_of(results / "triplet-0-0")) == STEPS
    measured = json.loads((cell / "metrics.json").read_text())["test"]["sample"]
    told = json.loads(done.stdout)["triplet"]
    assert told["early_stop"]["MAP@R"] == [pytest.approx(measured["MAP@R"]), None, None]


def test_a_short_grid_has_few_steps_two_seeds_and_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", "--short", "--dry-run", "--ranks", "1", "--set.train.validate_every", "7"]
    assert main(words) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "→ runs/reproduce-homeware-short: 16 runs of 20 steps" in head and len(rows) == 16
    # The command line's own settings come later, so they hold.
    assert (
        "--set.train.validate_every 20 --set.loss.ranking.rise_passes 0 --set.optim.steps 20 "
        "--set.optim.warmup_steps 2 --set.train.validate_every 7 --set.loss" in rows[0]
    )


def test_the_features_track_keeps_its_cells_and_prints_them_in_the_same_way(
    shard_set: Manifest, forked_namr: Callable, tmp_path: Path
) -> None:
    words = ["reproduce", "homeware_conv4", "--track", "features", "--short", "--json"]
    words += ["--losses", "margin", *small_run(shard_set, steps=6)]
    words += ["--rivals", "--results", tmp_path / "results", "--run-dir"]
    done = forked_namr(*words, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told["margin"])[:4] == ["alone", "ranking", "structure", "namr"]
    assert {"early_stop - alone", "namr - alone", "structure - one"} <= told["margin"][
        "gain"
    ].keys()
    cells = {path.name for path in (tmp_path / "results").iterdir()}
    assert (
        cells == {f"margin-{variant}-{seed}" for variant in VARIANTS for seed in (0, 1)}
        and "variance" in VARIANTS
    )
    # What is there already is neither trained nor embedded again.
    again = forked_namr(*words, tmp_path / "two")
    assert again.returncode == 0 and json.loads(again.stdout) == told
    assert "12 of them there already" in again.stderr
    assert not (tmp_path / "two" / FEATURES).exists()
    other = forked_namr(*words, tmp_path / "two", "--set.optim.steps", 7)
    assert other.returncode == 2 and "optim.steps" in other.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["--weights", "0", "1", "2"], "--weights is 0 1 2, of which more than one is not 0"),
        (["--seeds", "1", "1"], "triplet-0-1 is asked for twice"),
        (["--set.loss.metric", "margin"], "give --losses margin"),
        (["--set.train.seed", "4"], "give --seeds 4"),
        (["--set.evaluation.recall_at", "2", "4"], "give --set.evaluation.recall_at 1 2 4"),
        (
            ["--rivals", "variance"],
            "'variance'; --track images has lower_rate early_stop one_centre",
        ),
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
