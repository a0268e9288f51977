"""The benchmark itself: that it measures what it says, refuses what it must, and lets no wrong
result through."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from namr_dist.cli.main import main
from namr_dist.kernels.bench import eager, gate, library, measure, memory, naive, providers, table
from namr_dist.kernels.bench.__main__ import main as bench_main
from namr_dist.kernels.bench.cases import LOSSES, PASSES, Case, make_batch
from namr_dist.kernels.bench.run import measure as measure_case

_SETTINGS = ["--rows", "32", "--width", "16", "--samples", "2", "--device", "cpu"]
_PROVIDERS = ["ours", "eager", "naive", "pml", "matmul"]


def _bench(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "namr_dist.kernels.bench", *words],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def _case(loss: str, *, rows: int = 32, width: int = 16, dtype: str = "float32") -> Case:
    return Case(loss=loss, rows=rows, width=width, dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]], str]:
    """One run of every loss by every provider but torch.compile: its CSV, its JSON rows, its
    progress."""
    path = tmp_path_factory.mktemp("bench") / "new folder" / "kernels.csv"
    ended = _bench(*_SETTINGS, "--providers", *_PROVIDERS, "--csv", str(path), "--json")
    assert ended.returncode == 0, ended.stderr
    return path, json.loads(ended.stdout), ended.stderr


@pytest.mark.slow
def test_one_row_for_every_loss_provider_and_pass(measured) -> None:
    path, printed, progress = measured
    rows = table.read(path)
    assert path.read_text().splitlines()[0] == ",".join(table.COLUMNS)
    wanted = {
        (loss, provider, part)
        for loss in LOSSES
        for provider in ("ours", "eager", "naive", "pml")
        for part in PASSES
        if (provider, loss) != ("pml", "multi-cluster-ranking")
    }
    wanted |= {(loss, "matmul", "forward") for loss in LOSSES}
    keys = [(row["loss"], row["provider"], row["pass"]) for row in rows]
    assert set(keys) == wanted and len(keys) == len(wanted) == 7 * 13 - 3
    assert [row["loss"] for row in printed] == [row["loss"] for row in rows]
    assert len(re.findall(r"^\[\d/7\] ", progress, re.M)) == 7


@pytest.mark.slow
def test_figures_hang_together(measured) -> None:
    rows = table.read(measured[0])
    median = {(row["loss"], row["provider"], row["pass"]): float(row["median_ms"]) for row in rows}
    for row in rows:
        loss, provider, part = row["loss"], row["provider"], row["pass"]
        assert row["samples"] == "2" and (row["B"], row["D"], row["dtype"]) == (
            "32",
            "16",
            "float32",
        )
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["matmul_ms"]) == median[loss, "matmul", "forward"]
        if part == "backward":
            assert row["ratio_to_ours"] == ""  # ours has done that work in its forward pass
            assert row["note"].startswith("in forward") == (provider == "ours")
        else:
            assert (
                float(row["ratio_to_ours"])
                == median[loss, provider, part] / median[loss, "ours", part]
            )
        assert (row["peak_extra_mib"] != "") == (part == "forward+backward")
        if provider == "matmul":
            continue
        # 2 FLOPs a product in the witness; the rest of the count is the loss's.
        products = {"multi-cluster-ranking": 14, "multi-similarity": 6, "proxy-anchor": 6 / 4}.get(
            loss, 2
        )
        if part == "forward+backward":
            assert float(row["floor_share"]) == pytest.approx(
                products / 2 * float(row["matmul_ms"]) / median[loss, provider, part]
            )


@pytest.mark.slow
def test_all_agree_that_can(measured) -> None:
    for row in table.read(measured[0]):
        provider, loss = row["provider"], row["loss"]
        sampled = loss in ("margin", "triplet-distance-weighted")
        if provider == "matmul":
            assert row["agrees"] == "witness"
        elif provider != "ours" and (sampled or (provider, loss) == ("pml", "triplet-semihard")):
            assert (
                row["agrees"] == "differs by definition" and row["loss_error"] == "" and row["note"]
            )
        else:
            assert row["agrees"] == "yes", row
            assert float(row["loss_error"]) < 1e-5 and float(row["gradient_error"]) < 1e-4
            assert row["gate"] == "reference B 32"


@pytest.mark.parametrize("loss", LOSSES)
def test_data_set_every_loss_to_work(loss: str) -> None:
    # A loss of 0, or one whose mining keeps everything, would make every provider agree.
    truth = gate.yardsticks(_case(loss, rows=64), make_batch(_case(loss, rows=64)))[0].answer
    assert float(truth.loss) > 1e-3
    assert all(float(gradient.abs().max()) > 1e-5 for gradient in truth.gradients)


def test_gate_on_all_rows_where_there_are_more_than_512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "GATE_ROWS", 16)
    case = _case("multi-similarity")
    batch = make_batch(case)
    against = gate.yardsticks(case, batch)
    assert [(yardstick.name, yardstick.rows) for yardstick in against] == [
        ("reference", 16),
        ("eager float64", 32),
    ]

    def right_on_few_rows(labels_B, x_BD):
        return eager.multi_similarity(labels_B, x_BD) * (1 if len(labels_B) == 16 else 1.001)

    assert gate.judge(eager.multi_similarity, case, batch, against).agrees
    verdict = gate.judge(right_on_few_rows, case, batch, against)
    assert not verdict.agrees and verdict.loss_error == pytest.approx(1e-3, rel=1e-3)


def test_gate_on_all_rows_of_a_loss_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "GATE_ROWS", 16)
    case = _case("margin", rows=64)
    batch = make_batch(case)
    against = gate.yardsticks(case, batch)
    assert [(yardstick.name, yardstick.rows) for yardstick in against] == [
        ("reference", 16),
        ("blocked float64", 64),
    ]
    assert gate.judge(providers.OURS["margin"], case, batch, against).agrees
    # Other draws are another loss.
    assert not gate.judge(eager.FORMS["margin"], case, batch, against).agrees


def test_compiled_form_is_judged_at_the_size_it_is_timed_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate, "GATE_ROWS", 16)
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    monkeypatch.setitem(providers._FINDERS, "compile", eager.FORMS.__getitem__)
    rows, _ = measure_case(
        _case("triplet-hardest"), ["eager", "compile"], passes=["forward+backward"], samples=1
    )
    assert {row["provider"]: row["gate"] for row in rows} == {
        "eager": "reference B 16 + eager float64 B 32",
        "compile": "eager float64 B 32",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        lambda labels_B, z_BD: 1.0001 * eager.triplet_hardest(labels_B, z_BD),
        # The value is right, the gradient is not.
        lambda labels_B, z_BD: (
            eager.triplet_hardest(labels_B, z_BD) + 0.001 * (z_BD - z_BD.detach()).sum()
        ),
        lambda labels_B, z_BD: math.nan * eager.triplet_hardest(labels_B, z_BD),
    ],
)
def test_wrong_provider_is_caught(wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(eager.FORMS, "triplet-hardest", wrong)
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    rows, remarks = measure_case(_case("triplet-hardest"), ["ours", "eager"], samples=2)
    told = {row["provider"]: row for row in rows if row["pass"] == "forward+backward"}
    assert told["ours"]["agrees"] == "yes" and told["ours"]["ratio_to_ours"] == 1
    assert told["eager"]["agrees"] == "no" and told["eager"]["ratio_to_ours"] is None
    assert told["eager"]["median_ms"] and remarks == ["eager does NOT agree"]
    assert re.search(r"eager    forward\+backward.*  no \(", table.render(rows))


def test_when_ours_is_wrong_nobody_has_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        providers.OURS, "triplet-hardest", lambda labels, z: 2 * eager.triplet_hardest(labels, z)
    )
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    rows, _ = measure_case(_case("triplet-hardest"), ["ours", "eager", "matmul"], samples=2)
    assert [row["ratio_to_ours"] for row in rows] == [None] * 7


def test_broken_provider_is_told_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(labels_B, z_BD):
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setitem(eager.FORMS, "triplet-hardest", broken)
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    rows, remarks = measure_case(_case("triplet-hardest"), ["ours", "eager"], samples=2)
    failed = [row for row in rows if row["provider"] == "eager"]
    assert [row["note"] for row in failed] == ["first call failed: RuntimeError: no such kernel"]
    assert failed[0]["median_ms"] is None and failed[0]["samples"] == 0
    assert sum(row["samples"] == 2 for row in rows) == 3 and "no such kernel" in remarks[0]


def test_a_loss_without_other_forms_is_measured_alone_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for forms in (eager.FORMS, naive.FORMS, library.forms()):
        monkeypatch.delitem(forms, "triplet-hardest")
    monkeypatch.setattr(gate, "GATE_ROWS", 16)
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    rows, remarks = measure_case(
        _case("triplet-hardest"), ["ours", "eager", "compile", "naive", "pml", "matmul"], samples=2
    )
    assert remarks == [
        *(
            f"without {name} (no such form of this loss is written)"
            for name in ("eager", "compile", "naive")
        ),
        "without pml (pytorch-metric-learning has no such loss)",
    ]
    assert {row["provider"] for row in rows} == {"ours", "matmul"}
    assert rows[0]["agrees"] == "yes" and rows[0]["gate"] == "reference B 16 + blocked float64 B 32"


def test_few_rows_beside_near_ties_may_stand_apart_many_may_not() -> None:
    want_BD = torch.ones(100, 4, dtype=torch.float64)
    got_BD = want_BD.clone()
    got_BD[[3, 50]] += 1
    assert (~gate._keep(got_BD, want_BD, bound=1e-4, spare=2)).nonzero().flatten().tolist() == [
        3,
        50,
    ]
    assert gate._keep(got_BD, want_BD, bound=1e-4, spare=1).all()
    got_BD[7] = math.nan
    assert gate._keep(got_BD, want_BD, bound=1e-4, spare=3).all()


def test_passes_are_turned_and_counted() -> None:
    called: list[str] = []

    def form(name: str):
        def loss(labels_B, z_BD):
            called.append(name + ("" if torch.is_grad_enabled() else "'"))
            return z_BD.sum()

        return loss

    batch = make_batch(_case("triplet-hardest", rows=8))
    watch = measure.Stopwatch(torch.device("cpu"))
    timed = measure.interleave(
        {"a": form("a"), "b": form("b")}, form("w"), batch, watch, rounds=3, shares={"a": 3, "b": 3}
    )
    # Each provider: forward without gradients, forward before backward, forward and backward.
    assert " ".join(called) == "a' a a b' b b w' b' b b w' a' a a w' a' a a b' b b"
    assert {key: len(values) for key, values in timed.timings.items()} == {
        (n, p): 3 for n in "ab" for p in PASSES
    }
    assert len(timed.witnessed) == 3 and all(leaf.grad is None for leaf in batch.leaves)
    called.clear()
    timed = measure.interleave(
        {"a": form("a"), "b": form("b")},
        form("w"),
        batch,
        watch,
        rounds=4,
        shares={"a": 4, "b": 2},
        passes=["forward+backward"],
    )
    # Fewer rounds are spread over all of them.
    assert " ".join(called) == "a w' b w' a w' a a b w'"
    assert {key: len(values) for key, values in timed.timings.items()} == {
        ("a", "forward+backward"): 4,
        ("b", "forward+backward"): 2,
    }


def test_one_that_breaks_in_the_rounds_falls_out_alone() -> None:
    called = 0

    def breaks(labels_B, z_BD):
        nonlocal called
        called += 1
        if called == 3:
            raise torch.OutOfMemoryError("full\nand more")
        return z_BD.sum()

    batch = make_batch(_case("triplet-hardest", rows=8))
    timed = measure.interleave(
        {"a": lambda labels_B, z_BD: z_BD.sum(), "b": breaks},
        lambda labels_B, z_BD: z_BD.sum(),
        batch,
        measure.Stopwatch(torch.device("cpu")),
        rounds=5,
        shares={"a": 5, "b": 5},
        passes=["forward+backward"],
    )
    assert called == 3 and timed.failures == {"b": "OutOfMemoryError: full"}
    assert set(timed.timings) == {("a", "forward+backward")} and len(timed.witnessed) == 5


def test_rounds_that_a_slow_provider_can_afford() -> None:
    assert measure.affordable(100, passes=3, rounds=30, budget_s=10) == 30
    assert measure.affordable(1000, passes=3, rounds=30, budget_s=10) == 3
    assert measure.affordable(60_000, passes=3, rounds=30, budget_s=10) == 1


def test_slow_provider_is_measured_in_fewer_rounds_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    monkeypatch.setitem(
        eager.FORMS, "triplet-hardest", lambda labels, z: (time.sleep(0.2), z.sum() * 0)[1]
    )
    rows, _ = measure_case(
        _case("triplet-hardest"),
        ["ours", "eager", "matmul"],
        passes=["forward+backward"],
        samples=4,
        budget_s=0.5,
    )
    samples = {(row["provider"], row["pass"]): row["samples"] for row in rows}
    assert samples["eager", "forward+backward"] == 2 and samples["matmul", "forward"] == 4
    assert set(samples) == {
        ("ours", "forward+backward"),
        ("eager", "forward+backward"),
        ("matmul", "forward"),
    }


def test_quantiles() -> None:
    spread = measure.spread([float(value) for value in range(11)])
    assert (spread.p20, spread.median, spread.p80) == pytest.approx((2, 5, 8))


def test_memory_sees_a_known_allocation() -> None:
    # In a process of its own, after a peak twice as high that must be forgotten.
    script = (
        "import torch; from namr_dist.kernels.bench.memory import resident_peak_mib\n"
        "torch.ones(32 * 2**20)\n"
        "def call():\n    x = torch.ones(16 * 2**20); del x; torch.ones(2**20)\n"
        "print(resident_peak_mib(call))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert float(ended.stdout) == pytest.approx(64, rel=0.2)


def test_memory_of_a_pass_in_a_fresh_process() -> None:
    case = _case("triplet-hardest", rows=1024, width=8)
    extra_mib = memory.peak_extra_mib(case, "eager", eager.triplet_hardest, make_batch(case))
    # (B, B) float32 is 4 MiB; distances, slopes and masks.
    assert 3 * 4 < extra_mib < providers._PAIR_TENSORS * 4


@pytest.mark.slow
def test_rows_are_appended_under_one_header(measured, tmp_path: Path) -> None:
    rows = table.read(measured[0])
    path = tmp_path / "twice.csv"
    for row in rows[:2]:
        table.append(path, [row])
    assert path.read_text().count("timestamp") == 1 and table.read(path) == rows[:2]
    with path.open("a") as file:
        file.write("torn,li")
    table.append(path, [rows[2]])
    assert table.read(path) == rows[:3]
    assert path.read_text().splitlines()[3] == "torn,li"


def test_file_with_other_columns_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.csv"
    path.write_text("kernel,ms\nours,1\n")
    assert bench_main([*_SETTINGS, "--csv", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert str(path) in said.err and "--csv" in said.err
    assert path.read_text() == "kernel,ms\nours,1\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rows", "6"], "multiple of 4"),
        (["--rows", "4"], "two classes"),
        (["--samples", "0"], "whole number from 1"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--out", "somewhere"], "--plot"),
        (["--plot", "nowhere.csv"], "there is no file nowhere.csv"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["bench", "kernels", *words])
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("namr") and told in last


@pytest.mark.slow
def test_table_is_at_most_120_columns_wide(measured) -> None:
    _, printed, _ = measured
    text = table.render([{**row, "note": "word " * 40} for row in printed])
    assert max(len(line) for line in text.splitlines()) == 120


@pytest.mark.slow
def test_plots_from_the_csv_alone(
    measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sizes.csv"
    rows = table.read(measured[0])
    table.append(path, [row for row in rows] + [{**row, "B": "64"} for row in rows])
    assert bench_main(["--plot", str(path), "--out", str(tmp_path / "plots")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [file.name.split("-")[0] for file in files] == ["time", "memory"]
    for file in files:
        with Image.open(file) as image:
            image.verify()
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):  # ours, eager
            assert (pixels == colour).all(2).sum() > 20


@pytest.mark.slow
def test_plot_leaves_out_what_does_not_agree(
    measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.csv"
    with measured[0].open(newline="") as file:
        table.append(path, [{**row, "agrees": "no"} for row in csv.DictReader(file)])
    assert bench_main(["--plot", str(path)]) == 2
    assert "holds no figures" in capsys.readouterr().err
