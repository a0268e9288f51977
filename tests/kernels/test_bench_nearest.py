"""The benchmark of nearest centres: a row for every provider and pass, and none for a wrong one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from namr_dist.kernels.bench import nearest

CASE = nearest.Case(rows=300, centres=20, width=16, k=3, dtype="float32", device="cpu")


def test_rows_of_every_provider_and_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "peak_mib", lambda *_: 1.5)
    path = tmp_path / "new" / "nearest.csv"
    sizes = ["--size", "300", "20", "16", "--k", "3", "--samples", "4"]
    providers = ["--providers", *nearest.FORMS]
    assert nearest.main([*sizes, *providers, "--device", "cpu", "--csv", str(path)]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["provider"], row["pass"]) for row in rows] == [
        (provider, part) for provider in nearest.FORMS for part in nearest.PASSES
    ]
    for row in rows:
        assert (row["N"], row["M"], row["D"], row["k"]) == ("300", "20", "16", "3")
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert 1 <= int(row["samples"]) <= 4 and float(row["distance_error"]) < 1e-4
        assert (row["peak_extra_mib"] != "") == (row["pass"] == "forward+backward")
    assert [row["ratio_to_ours"] for row in rows[:2]] == ["1.0", "1.0"]
    assert not list(path.parent.glob("*.part"))


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nearest.FORMS, "matmul", lambda z, c, k: 1.001 * nearest.cdist(z, c, k))
    with pytest.raises(RuntimeError, match="matmul does not agree"):
        nearest.measure(CASE, ["ours", "matmul"], rounds=2, budget_s=1)


@pytest.mark.slow
def test_memory_of_a_process_of_its_own() -> None:
    """The eager form holds a matrix of distances and, for its gradient, another: 61 MiB each."""
    case = nearest.Case(rows=4000, centres=4000, width=8, k=3, dtype="float32", device="cpu")
    peaks = {name: nearest.peak_mib(case, name, nearest.FORMS[name]) for name in ("ours", "matmul")}
    assert peaks["ours"] < 30 < 61 < peaks["matmul"]
