"""The benchmark itself: that it measures what it says, refuses what it must, and lets no wrong result through."""

import csv
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from namr_dist import cli
from namr_dist.kernels.bench import eager, gate, measure, memory, providers, table
from namr_dist.kernels.bench.cases import LOSSES, PASSES, Case, make_batch
from namr_dist.kernels.bench.run import measure as measure_case

DOCS = Path(__file__).parents[2] / "docs"
_SETTINGS = ["--rows", "32", "--width", "16", "--samples", "2", "--device", "cpu"]
_PROVIDERS = ["ours", "eager", "naive", "pml", "matmul"]


def _bench(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "namr_dist.kernels.bench", *words], env=environment, text=True,
                          capture_output=True, check=False)


def _case(loss: str, *, rows: int = 32, width: int = 16, dtype: str = "float32") -> Case:
    return Case(loss=loss, rows=rows, width=width, dtype=dtype, device="cpu")


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]], str]:
    """One run of every loss by every provider but torch.compile: its CSV, its JSON rows, its progress."""
    path = tmp_path_factory.mktemp("bench") / "new folder" / "kernels.csv"
    ended = _bench(*_SETTINGS, "--providers", *_PROVIDERS, "--csv", str(path), "--json")
    assert ended.returncode == 0, ended.stderr
    return path, json.loads(ended.stdout), ended.stderr


@pytest.mark.slow
def test_one_row_for_every_loss_provider_and_pass(measured) -> None:
    path, printed, progress = measured
    rows = table.read(path)
    assert path.read_text().splitlines()[0] == ",".join(table.COLUMNS)
    wanted = {(loss, provider, part) for loss in LOSSES for provider in ("ours", "eager", "naive", "pml")
              for part in PASSES if (provider, loss) != ("pml", "multi-cluster-ranking")}
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
        assert row["samples"] == "2" and (row["B"], row["D"], row["dtype"]) == ("32", "16", "float32")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["matmul_ms"]) == median[loss, "matmul", "forward"]
        if part == "backward":
            assert row["ratio_to_ours"] == ""  # ours has done that work in its forward pass
            assert row["note"].startswith("in forward") == (provider == "ours")
        else:
            assert float(row["ratio_to_ours"]) == median[loss, provider, part] / median[loss, "ours", part]
        assert (row["peak_extra_mib"] != "") == (part == "forward+backward")
        if provider == "matmul":
            continue
        # 2 FLOPs a product in the witness; the rest of the count is the loss's.
        products = {"multi-cluster-ranking": 14, "multi-similarity": 6, "proxy-anchor": 6 / 4}.get(loss, 2)
        if part == "forward+backward":
            assert float(row["floor_share"]) == pytest.approx(products / 2 * float(row["matmul_ms"])
                                                              / median[loss, provider, part])


@pytest.mark.slow
def test_all_agree_that_can(measured) -> None:
    for row in table.read(measured[0]):
        provider, loss = row["provider"], row["loss"]
        sampled = loss in ("margin", "triplet-distance-weighted")
        if provider == "matmul":
            assert row["agrees"] == "witness"
        elif provider != "ours" and (sampled or (provider, loss) == ("pml", "triplet-semihard")):
            assert row["agrees"] == "differs by definition" and row["loss_error"] == "" and row["note"]
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
    assert [(yardstick.name, yardstick.rows) for yardstick in against] == [("reference", 16), ("eager float64", 32)]

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
    assert [(yardstick.name, yardstick.rows) for yardstick in against] == [("reference", 16), ("blocked float64", 64)]
    assert gate.judge(providers.OURS["margin"], case, batch, against).agrees
    # Other draws are another loss.
    assert not gate.judge(eager.FORMS["margin"], case, batch, against).agrees


def test_compiled_form_is_judged_at_the_size_it_is_timed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "GATE_ROWS", 16)
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    monkeypatch.setitem(providers._FINDERS, "compile", eager.FORMS.__getitem__)
    rows, _ = measure_case(_case("triplet-hardest"), ["eager", "compile"], passes=["forward+backward"], samples=1)
    assert {row["provider"]: row["gate"] for row in rows} == {
        "eager": "reference B 16 + eager float64 B 32", "compile": "eager float64 B 32"}


@pytest.mark.parametrize("wrong", [
    lambda labels_B, z_BD: 1.0001 * eager.triplet_hardest(labels_B, z_BD),
    # The value is right, the gradient is not.
    lambda labels_B, z_BD: eager.triplet_hardest(labels_B, z_BD) + 0.001 * (z_BD - z_BD.detach()).sum(),
    lambda labels_B, z_BD: math.nan * eager.triplet_hardest(labels_B, z_BD),
])
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
    monkeypatch.setitem(providers.OURS, "triplet-hardest", lambda labels, z: 2 * eager.triplet_hardest(labels, z))
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


def test_few_rows_beside_near_ties_may_stand_apart_many_may_not() -> None:
    want_BD = torch.ones(100, 4, dtype=torch.float64)
    got_BD = want_BD.clone()
    got_BD[[3, 50]] += 1
    assert (~gate._keep(got_BD, want_BD, bound=1e-4, spare=2)).nonzero().flatten().tolist() == [3, 50]
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
    found = measure.interleave({"a": form("a"), "b": form("b")}, form("w"), batch, watch, rounds=3,
                               shares={"a": 3, "b": 3})
    # Each provider: forward without gradients, forward before backward, forward and backward.
    assert " ".join(called) == "a' a a b' b b w' b' b b w' a' a a w' a' a a b' b b"
    assert {key: len(values) for key, values in found.timings.items()} == {(n, p): 3 for n in "ab" for p in PASSES}
    assert len(found.witnessed) == 3 and all(leaf.grad is None for leaf in batch.leaves)
    called.clear()
    found = measure.interleave({"a": form("a"), "b": form("b")}, form("w"), batch, watch, rounds=4,
                               shares={"a": 4, "b": 2}, passes=["forward+backward"])
    # Fewer rounds are spread over all of them.
    assert " ".join(called) == "a w' b w' a w' a a b w'"
    assert {key: len(values) for key, values in found.timings.items()} == {
        ("a", "forward+backward"): 4, ("b", "forward+backward"): 2}


def test_one_that_breaks_in_the_rounds_falls_out_alone() -> None:
    called = 0

    def breaks(labels_B, z_BD):
        nonlocal called
        called += 1
        if called == 3:
            raise torch.OutOfMemoryError("full\nand more")
        return z_BD.sum()

    batch = make_batch(_case("triplet-hardest", rows=8))
    found = measure.interleave({"a": lambda labels_B, z_BD: z_BD.sum(), "b": breaks}, lambda labels_B, z_BD: z_BD.sum(),
                               batch, measure.Stopwatch(torch.device("cpu")), rounds=5, shares={"a": 5, "b": 5},
                               passes=["forward+backward"])
    assert called == 3 and found.failures == {"b": "OutOfMemoryError: full"}
    assert set(found.timings) == {("a", "forward+backward")} and len(found.witnessed) == 5


def test_rounds_that_a_slow_provider_can_afford() -> None:
    assert measure.affordable(100, passes=3, rounds=30, budget_s=10) == 30
    assert measure.affordable(1000, passes=3, rounds=30, budget_s=10) == 3
    assert measure.affordable(60_000, passes=3, rounds=30, budget_s=10) == 1


def test_slow_provider_is_measured_in_fewer_rounds_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("namr_dist.kernels.bench.run.peak_extra_mib", lambda *_: 1.0)
    monkeypatch.setitem(eager.FORMS, "triplet-hardest", lambda labels, z: (time.sleep(0.2), z.sum() * 0)[1])
    rows, _ = measure_case(_case("triplet-hardest"), ["ours", "eager", "matmul"], passes=["forward+backward"],
                           samples=4, budget_s=0.5)
    samples = {(row["provider"], row["pass"]): row["samples"] for row in rows}
    assert samples["eager", "forward+backward"] == 2 and samples["matmul", "forward"] == 4
    assert set(samples) == {("ours", "forward+backward"), ("eager", "forward+backward"), ("matmul", "forward")}


def test_quantiles() -> None:
    found = measure.spread([float(value) for value in range(11)])
    assert (found.p20, found.median, found.p80) == pytest.approx((2, 5, 8))


def test_memory_sees_a_known_allocation() -> None:
    # In a process of its own, after a peak twice as high that must be forgotten.
    script = ("import torch; from namr_dist.kernels.bench.memory import resident_peak_mib\n"
              "torch.ones(32 * 2**20)\n"
              "def call():\n    x = torch.ones(16 * 2**20); del x; torch.ones(2**20)\n"
              "print(resident_peak_mib(call))")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(ended.stdout) == pytest.approx(64, rel=0.2)


def test_memory_of_a_pass_in_a_fresh_process() -> None:
    case = _case("triplet-hardest", rows=1024, width=8)
    found = memory.peak_extra_mib(case, "eager", eager.triplet_hardest, make_batch(case))
    assert 3 * 4 < found < providers._PAIR_TENSORS * 4  # (B, B) float32 is 4 MiB; distances, slopes and masks


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


def test_file_with_other_columns_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("kernel,ms\nours,1\n")
    ended = _bench(*_SETTINGS, "--csv", str(path))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and str(path) in ended.stderr and "--csv" in ended.stderr
    assert path.read_text() == "kernel,ms\nours,1\n"


@pytest.mark.parametrize(("words", "told"), [
    (["--rows", "6"], "multiple of 4"),
    (["--rows", "4"], "two classes"),
    (["--samples", "0"], "whole number from 1"),
    (["--device", "tpu"], "cpu or cuda"),
    (["--out", "somewhere"], "--plot"),
    (["--plot", "nowhere.csv"], "there is no file nowhere.csv"),
])
def test_mistakes_end_with_one_line_and_code_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = cli.main(["bench", "kernels", *words])
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
def test_plots_from_the_csv_alone(measured, tmp_path: Path) -> None:
    path = tmp_path / "sizes.csv"
    rows = table.read(measured[0])
    table.append(path, [row for row in rows] + [{**row, "B": "64"} for row in rows])
    ended = _bench("--plot", str(path), "--out", str(tmp_path / "plots"))
    assert ended.returncode == 0, ended.stderr
    files = [Path(line) for line in ended.stdout.split("\n") if line]
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
def test_plot_leaves_out_what_does_not_agree(measured, tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    with measured[0].open(newline="") as file:
        table.append(path, [{**row, "agrees": "no"} for row in csv.DictReader(file)])
    ended = _bench("--plot", str(path))
    assert ended.returncode == 2 and "holds no figures" in ended.stderr


def test_documents_show_what_the_files_hold() -> None:
    performance = _script("make_performance")
    for page, content in ((DOCS / "kernels.md", performance.kernels_page()),
                          (DOCS.parent / "README.md", performance.readme())):
        between = page.read_text().split("<!-- performance:begin -->\n")[1].split("\n<!-- performance:end -->")[0]
        assert between == content, f"run docs/make_performance.py: {page.name} does not show its figures"


def _gpu_row(provider: str, part: str, median: float, *, agrees: str = "yes", loss: str = "multi-similarity",
             **others: object) -> dict[str, object]:
    return {**dict.fromkeys(table.COLUMNS, ""), "device": "A GPU", "platform": "driver 1", "torch": "2", "triton": "3",
            "commit": "abc", "dtype": "float32", "loss": loss, "provider": provider, "B": 1024, "D": 64, "pass": part,
            "samples": 30, "median_ms": median, "p20_ms": median, "p80_ms": median, "host_ms": 0.1,
            "floor_share": 0.5, "agrees": agrees, "loss_error": 1e-7, "gradient_error": 2e-6, **others}


def test_figures_of_a_gpu_in_words(tmp_path: Path) -> None:
    performance = _script("make_performance")
    whole, path = "forward+backward", tmp_path / "kernels-h200.csv"
    table.append(path, [
        _gpu_row("ours", whole, 99.0, peak_extra_mib=9),  # measured again below: the last counts
        _gpu_row("ours", whole, 2.0, peak_extra_mib=1.5), _gpu_row("ours", "forward", 0.6),
        _gpu_row("eager", whole, 24.6, peak_extra_mib=30), _gpu_row("matmul", "forward", 0.8, agrees="witness"),
        _gpu_row("pml", whole, 50.0, agrees="differs by definition"), _gpu_row("compile", whole, 9.0, agrees="no"),
        _gpu_row("ours", whole, 0.105, loss="margin", peak_extra_mib=1)])
    text = "\n".join(performance.section("On a GPU", path))
    assert "| multi-similarity | 1,024 × 64 | 2.00 [2.00–2.00] | 1.50 | 50 % | 12.3×, 20.0× | 25.0×* |" in text
    assert "| margin | 1,024 × 64 | 0.105 [0.105–0.105]† | 1.00 | 50 % | – | – |" in text
    assert "| multi-similarity | float32 | 1,024 × 64 | 0.600 [0.600–0.600] | 0.800 [0.800–0.800] | 0.75 |" in text
    # 1024 rows of 64 numbers in float32 are 0.25 MiB.
    assert "takes at most 1.25 MiB (multi-similarity)" in text
    assert "Left out, for it did not agree with the definition: compile, multi-similarity, 1,024 × 64" in text
    assert "here 1e-07 of the loss, 2e-06 of a gradient; eager PyTorch 1e-07" in text


@pytest.mark.parametrize("loss", ["triplet-hardest", "multi-similarity", "multi-cluster-ranking"])
def test_sampled_rows_of_a_large_batch_beside_float64(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = _script("largest_batch")
    case = _case(loss, rows=128)
    good = largest.measure(case)
    assert good.rows_compared == 32 * (2 if loss == "multi-cluster-ranking" else 1) and good.rows_apart <= 1
    assert 0 < good.gradient_error < 1e-4 and 0 < good.exchanged_error < 1e-4
    right = providers.OURS[loss]
    monkeypatch.setitem(providers.OURS, loss, lambda *given: 1.01 * right(*given))
    assert largest.measure(case).rows_apart > 16


def test_batches_double_until_memory_is_full_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = _script("largest_batch")

    def fake(case: Case) -> object:
        if case.rows > 400:
            raise torch.OutOfMemoryError("full")
        return largest.Measured(case.loss, case.dtype, case.rows, case.width, case.rows / 100)

    monkeypatch.setattr(largest, "measure", fake)
    for limit_s, most_rows, wanted in (
            (1000, 2000, [(100, ""), (200, ""), (400, ""), (800, "out of memory")]),
            (7, 2000, [(100, ""), (200, "400 rows would take some 8 s")]),
            (1000, 200, [(100, ""), (200, "more not tried")])):
        kept: list[tuple[int, str]] = []
        largest.double("triplet-hardest", width=8, dtype="float32", rows=100, most_rows=most_rows, limit_s=limit_s,
                       device="cpu", keep=lambda one, kept=kept: kept.append((one.B, one.note)))
        assert kept == wanted


def test_largest_batches_and_first_calls_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest, performance = _script("largest_batch"), _script("make_performance")
    path = tmp_path / "largest-batch-h200.csv"
    monkeypatch.setattr(sys, "argv", [
        "largest_batch.py", "--device", "cpu", "--losses", "triplet-hardest", "--width", "16", "--rows", "64",
        "--most-rows", "128", "--dtype", "float32", "--seconds", "1e9", "--csv", str(path)])
    largest.main()
    line, = [line for line in performance.largest(path) if line.startswith("| triplet, hardest")]
    assert re.fullmatch(r"\| triplet, hardest \| float32 \| 128 × 16 \| [\d.,]+ \| [\d.,]+ \| \de-\d\d \| 0 of 32 \| "
                        r"more not tried \|", line), line
    cold = tmp_path / "cold.csv"
    table.append(cold, [_gpu_row("ours", "forward", 1.0, cold_start_s=seconds) for seconds in (3.21, 12.5)])
    assert "nothing compiled before: 3.2 to 12.5 s" in performance.cold(cold)[0]


def test_tuning_compiles_ahead_what_is_then_timed() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", """
import torch
from namr_dist.kernels import aot, tune
from namr_dist.kernels.gpu.launch import recording
for kind, cases in tune.KINDS.items():
    for task in tune.tasks([kind], ['float32', 'bfloat16'], [128, 512], 90):
        marked = task.table._replace(config=tune.Config(64, 64, 32, 4, 7))
        for case in cases:
            with tune.trial(marked), recording(90) as seen:
                aot.CASES[case](tune.MetaInputs(task.width, aot.DTYPES[task.dtype]))
            assert any(launch.config == marked.config for launch in seen.launches), (task, case)
assert {task.kind for task in tune.tasks(list(tune.KINDS), ['float32', 'bfloat16'], [128, 512], 90)} == set(tune.KINDS)
tune.KINDS['scan'] = ('proxy_sums',)
tune.stand_in(90)
row = tune.Task('scan', 90, 'bfloat16', 128).table
assert tune.compile_ahead(row, 'bfloat16') == ''
assert 'shared memory' in tune.compile_ahead(row._replace(config=tune.Config(128, 128, 64, 8, 8)), 'bfloat16')
with recording(90) as seen:
    aot.CASES['proxy_sums'](tune.MetaInputs(128, torch.bfloat16))
launch, = seen.launches
real = {name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()}
size = {'num_warps': launch.config.warps, 'num_stages': launch.config.stages}
started = [launch.kernel.run(grid=(1,), warmup=True, **given, **size) for given in (launch.arguments, real)]
assert started[0] is started[1], 'with numbers in them it is another kernel'
"""], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_tuning_takes_the_fastest_that_agrees_and_is_within_the_limits(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", """
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
import torch
from namr_dist.kernels import tune
from namr_dist.kernels.gpu import configs
task = tune.Task('rank', 90, 'bfloat16', 128)
rows = task.rows
assert rows[0] == task.table and len(rows) == len(set(rows)) > 20
wrong, broken, spills, best = rows[5:9]
def run(case, inputs, watch):
    now = tune.config('rank', 90, 128, torch.bfloat16)
    if now == broken.config:
        raise RuntimeError('out of resources')
    order = {wrong.config: 1.0, spills.config: 2.0, best.config: 3.0}
    return order.get(now, 10.0), [torch.ones(4) * (2 if now == wrong.config else 1)]
tune.run, tune.Stopwatch, tune.RealInputs = run, lambda device: None, lambda *given: None
tune.fits = lambda row, case, dtype: row != spills
compiled = [Future() for row in rows]
for place, future in enumerate(compiled):
    future.set_result('takes too much' if place == 9 else '')
with ThreadPoolExecutor(1) as pool:
    chosen, tried = tune.search(task, compiled, pool, 5)
assert chosen == best, chosen
tune.log(Path(sys.argv[1]), task, chosen, tried)
""", str(tmp_path / "tune.csv")], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    with (tmp_path / "tune.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == "ranking"]
    notes = [row["note"] for row in rows[5:10]]
    assert notes == ["ranking: other results than the table's tiles", "RuntimeError: out of resources",
                     "beyond a limit of kernels/aot.py", "", "takes too much"]
    # All are timed three times, finalists five times more; the table's own is one of them, wherever it stands.
    assert [row["samples"] for row in rows[5:10]] == ["0", "0", "8", "8", "0"] and rows[0]["samples"] == "8"
    assert [row["chosen"] for row in rows[7:9]] == ["", "yes"] and rows[8]["median_ms"] == "3.0"
    assert rows[-1]["samples"] == "3"
