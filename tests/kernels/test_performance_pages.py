"""The scripts in tools/ that turn the kernels' figures into tables and look for the largest
batch."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from namr_dist.kernels.bench import providers, table
from namr_dist.kernels.bench.cases import Case

DOCS = Path(__file__).parents[2] / "docs"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS.parent / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_documents_show_what_the_files_hold() -> None:
    performance = _script("make_performance")
    for page, content in (
        (DOCS / "kernels.md", performance.kernels_page()),
        (DOCS.parent / "README.md", performance.readme()),
    ):
        between = (
            page.read_text()
            .split("<!-- performance:begin -->\n")[1]
            .split("\n<!-- performance:end -->")[0]
        )
        assert between == content, (
            f"run tools/make_performance.py: {page.name} does not show its figures"
        )


def _gpu_row(
    provider: str,
    part: str,
    median: float,
    *,
    agrees: str = "yes",
    loss: str = "multi-similarity",
    **others: object,
) -> dict[str, object]:
    return {
        **dict.fromkeys(table.COLUMNS, ""),
        "device": "A GPU",
        "platform": "driver 1",
        "torch": "2",
        "triton": "3",
        "commit": "abc",
        "dtype": "float32",
        "loss": loss,
        "provider": provider,
        "B": 1024,
        "D": 64,
        "pass": part,
        "samples": 30,
        "median_ms": median,
        "p20_ms": median,
        "p80_ms": median,
        "host_ms": 0.1,
        "floor_share": 0.5,
        "agrees": agrees,
        "loss_error": 1e-7,
        "gradient_error": 2e-6,
        **others,
    }


def test_figures_of_a_gpu_in_words(tmp_path: Path) -> None:
    performance = _script("make_performance")
    whole, path = "forward+backward", tmp_path / "kernels-h200.csv"
    table.append(
        path,
        [
            _gpu_row(
                "ours", whole, 99.0, peak_extra_mib=9
            ),  # measured again below: the last counts
            _gpu_row("ours", whole, 2.0, peak_extra_mib=1.5),
            _gpu_row("ours", "forward", 0.6),
            _gpu_row("eager", whole, 24.6, peak_extra_mib=30),
            _gpu_row("matmul", "forward", 0.8, agrees="witness"),
            _gpu_row("pml", whole, 50.0, agrees="differs by definition"),
            _gpu_row("compile", whole, 9.0, agrees="no"),
            _gpu_row("ours", whole, 0.105, loss="margin", peak_extra_mib=1),
        ],
    )
    text = "\n".join(performance.section("On a GPU", path))
    assert (
        "| multi-similarity | 1,024 × 64 | 2.00 [2.00–2.00] | 1.50 | 50 % | 12.3×, 20.0× | 25.0×* |"
        in text
    )
    assert "| margin | 1,024 × 64 | 0.105 [0.105–0.105]† | 1.00 | 50 % | – | – |" in text
    assert (
        "| multi-similarity | float32 | 1,024 × 64 | 0.600 [0.600–0.600] | 0.800 [0.800–0.800] | 0.75 |"
        in text
    )
    # 1024 rows of 64 numbers in float32 are 0.25 MiB.
    assert "takes at most 1.25 MiB (multi-similarity)" in text
    assert (
        "Left out, for it did not agree with the definition: compile, multi-similarity, 1,024 × 64"
        in text
    )
    assert "here 1e-07 of the loss, 2e-06 of a gradient; eager PyTorch 1e-07" in text


@pytest.mark.parametrize("loss", ["triplet-hardest", "multi-similarity", "multi-cluster-ranking"])
def test_sampled_rows_of_a_large_batch_beside_float64(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = _script("largest_batch")
    case = Case(loss=loss, rows=128, width=16, dtype="float32", device="cpu")
    good = largest.measure(case)
    assert (
        good.rows_compared == 32 * (2 if loss == "multi-cluster-ranking" else 1)
        and good.rows_apart <= 1
    )
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
        (1000, 200, [(100, ""), (200, "more not tried")]),
    ):
        kept: list[tuple[int, str]] = []
        largest.double(
            "triplet-hardest",
            width=8,
            dtype="float32",
            rows=100,
            most_rows=most_rows,
            limit_s=limit_s,
            device="cpu",
            keep=lambda one, kept=kept: kept.append((one.B, one.note)),
        )
        assert kept == wanted


def test_largest_batches_and_first_calls_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, performance = _script("largest_batch"), _script("make_performance")
    path = tmp_path / "largest-batch-h200.csv"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "largest_batch.py",
            "--device",
            "cpu",
            "--losses",
            "triplet-hardest",
            "--width",
            "16",
            "--rows",
            "64",
            "--most-rows",
            "128",
            "--dtype",
            "float32",
            "--seconds",
            "1e9",
            "--csv",
            str(path),
        ],
    )
    largest.main()
    (line,) = [line for line in performance.largest(path) if line.startswith("| triplet, hardest")]
    assert re.fullmatch(
        r"\| triplet, hardest \| float32 \| 128 × 16 \| [\d.,]+ \| [\d.,]+ \| \de-\d\d \| 0 of 32 \| "
        r"more not tried \|",
        line,
    ), line
    cold = tmp_path / "cold.csv"
    table.append(
        cold, [_gpu_row("ours", "forward", 1.0, cold_start_s=seconds) for seconds in (3.21, 12.5)]
    )
    assert "nothing compiled before: 3.2 to 12.5 s" in performance.cold(cold)[0]
