"""What evaluation costs at the size of Stanford Online Products' test set, compared with plain
faiss + numpy and with pytorch-metric-learning: seconds, CPU-seconds and peak memory of R@1, R@10,
R@100, R@1000 and MAP@R, and whether the figures are equal.

    python tools/make_evaluation_bench.py              # measures, and writes the JSON and the table
    python tools/make_evaluation_bench.py --table      # writes the table again

Rows are random: class means, and images around them, of 2 to 12 images a class and 5.35 on average
as in Stanford Online Products. Each contender runs in a fresh process, in turn, with two threads.
Time is counted from rows in memory to figures; peak memory is that of the whole process, with its
imports and rows. CPU-seconds are the ones to compare on a machine that has other work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from namr_dist.atomic import write_atomic
from namr_dist.provenance import provenance
from namr_dist.retrieval.arrays import Float32, Int64
from namr_dist.retrieval.evaluate import evaluate_sample

DOCS = Path(__file__).parents[1] / "docs"
RESULT = DOCS / "results" / "evaluation.json"
PAGE = DOCS / "retrieval.md"
CUT_OFFS = (1, 10, 100, 1000)
WIDTH = 512
NOISE = 2.3  # of an image around its class's mean, whose entries have variance 1
THREADS = 2
SIZES = {60_502: 1, 20_000: 3}
"""N → repeats."""

Figures = dict[str, float]


def draw(items: int) -> tuple[Float32, Int64]:
    """(N, D) fp32 rows of length 1 and their (N,) labels, in random order; every class has two or
    more."""
    rng = np.random.default_rng(0)
    sizes_C = 2 + rng.binomial(10, 0.3347, size=items // 2)
    labels_N = np.repeat(np.arange(len(sizes_C)), sizes_C)[:items]
    labels_N[-1] = labels_N[-2]
    means_CD = rng.standard_normal((labels_N[-1] + 1, WIDTH), dtype=np.float32)
    rows_ND = means_CD[labels_N]
    rows_ND += np.float32(NOISE) * rng.standard_normal((items, WIDTH), dtype=np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    order_N = rng.permutation(items)
    return rows_ND[order_N], labels_N[order_N]


def ours(rows_ND: Float32, labels_N: Int64) -> Figures:
    """The whole of evaluate_sample."""
    figures = evaluate_sample(rows_ND, labels_N, ks=CUT_OFFS)
    return {name: value for name, value in figures.items() if name != "R-precision"}


def faiss_and_numpy(rows_ND: Float32, labels_N: Int64) -> Figures:
    """The shortest thing that gives these figures: lists of a thousand neighbours, and their
    labels."""
    import faiss

    faiss.omp_set_num_threads(THREADS)
    index: Any = faiss.IndexFlatL2(WIDTH)
    index.add(rows_ND)
    ids_NK = index.search(rows_ND, CUT_OFFS[-1] + 1)[1]
    own_NK = ids_NK == np.arange(len(rows_ND))[:, None]
    own_NK[~own_NK.any(axis=1), -1] = True  # more copies than neighbours
    right_NK = (labels_N[ids_NK] == labels_N[:, None])[~own_NK].reshape(len(rows_ND), -1)
    figures = {f"R@{k}": 100 * float(right_NK[:, :k].any(axis=1).mean()) for k in CUT_OFFS}
    relevant_N = np.bincount(labels_N)[labels_N] - 1
    rank_R = np.arange(1, relevant_N.max() + 1)
    hit_NR = right_NK[:, : len(rank_R)] & (rank_R <= relevant_N[:, None])
    precision_NR = np.cumsum(hit_NR, axis=1) / rank_R
    figures["MAP@R"] = 100 * float(((precision_NR * hit_NR).sum(axis=1) / relevant_N).mean())
    return figures


def pytorch_metric_learning(rows_ND: Float32, labels_N: Int64) -> Figures:
    """Its AccuracyCalculator, given recall at k in the way that its documentation shows."""
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    faiss.omp_set_num_threads(THREADS)

    def recall_at(k: int) -> Callable[..., float]:
        def recall(
            self: Any, knn_labels: torch.Tensor, query_labels: torch.Tensor, **_: Any
        ) -> float:
            return float((knn_labels[:, :k] == query_labels[:, None]).any(dim=1).double().mean())

        return recall

    longer = {f"calculate_recall_at_{k}": recall_at(k) for k in CUT_OFFS[1:]}
    calculator = type("Calculator", (AccuracyCalculator,), longer)(
        include=(
            "precision_at_1",
            "mean_average_precision_at_r",
            *(f"recall_at_{k}" for k in CUT_OFFS[1:]),
        ),
        k=CUT_OFFS[-1],
        device=torch.device("cpu"),
    )
    found = calculator.get_accuracy(torch.from_numpy(rows_ND), torch.from_numpy(labels_N))
    return {
        "R@1": 100 * found["precision_at_1"],
        **{f"R@{k}": 100 * found[f"recall_at_{k}"] for k in CUT_OFFS[1:]},
        "MAP@R": 100 * found["mean_average_precision_at_r"],
    }


CONTENDERS: dict[str, Callable[[Float32, Int64], Figures]] = {
    "namr-dist": ours,
    "faiss + numpy": faiss_and_numpy,
    "pytorch-metric-learning": pytorch_metric_learning,
}


def run_one(name: str, folder: Path) -> None:
    """Measure a contender in this process, and print its figures and costs as JSON."""
    torch.set_num_threads(THREADS)
    rows_ND, labels_N = np.load(folder / "rows.npy"), np.load(folder / "labels.npy")
    began, used = time.perf_counter(), time.process_time()
    figures = CONTENDERS[name](rows_ND, labels_N)
    print(
        json.dumps(
            {
                "cpu_s": time.process_time() - used,
                "wall_s": time.perf_counter() - began,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
                "figures": figures,
            }
        )
    )


def measure(items: int, repeats: int) -> list[dict[str, Any]]:
    """All contenders at one size."""
    environ = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        rows_ND, labels_N = draw(items)
        np.save(Path(folder) / "rows.npy", rows_ND)
        np.save(Path(folder) / "labels.npy", labels_N)
        del rows_ND, labels_N
        for _ in range(repeats):
            for name, of_one in runs.items():
                load = os.getloadavg()[0]
                said = subprocess.run(
                    [sys.executable, __file__, "--one", name, folder],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=environ,
                ).stdout
                of_one.append(json.loads(said.splitlines()[-1]) | {"load_before": load})
                print(f"{items:,} {name}: {of_one[-1]}", flush=True)
    expected = runs["namr-dist"][0]["figures"]
    return [
        {
            "items": items,
            "contender": name,
            "repeats": repeats,
            **{
                cost: round(statistics.median(run[cost] for run in of_one), 1)
                for cost in ("cpu_s", "wall_s", "peak_mib", "load_before")
            },
            "figures": of_one[0]["figures"],
            "largest_difference": max(
                abs(run["figures"][figure] - value)
                for run in of_one
                for figure, value in expected.items()
            ),
        }
        for name, of_one in runs.items()
    ]


def measure_all() -> None:
    """All sizes; the file is written after each."""
    names = ("faiss-cpu", "numpy", "pytorch-metric-learning")
    result: dict[str, Any] = {
        **provenance(),
        "libraries": ", ".join(f"{name} {version(name)}" for name in names),
        "threads": THREADS,
        "width": WIDTH,
        "cut_offs": list(CUT_OFFS),
        "cases": [],
    }
    for items, repeats in SIZES.items():
        result["cases"] += measure(items, repeats)
        write_atomic(RESULT, json.dumps(result, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    """The page's table and where it was made."""
    lines = [
        "| images | | CPU s | wall s | peak memory, GiB | largest difference of a figure |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in result["cases"]:
        apart = case["largest_difference"]
        own = case["contender"] == "namr-dist"
        lines.append(
            f"| {case['items']:,} | {case['contender']} | {case['cpu_s']:.1f} | {case['wall_s']:.1f} | "
            f"{case['peak_mib'] / 1024:.1f} | {'–' if own else f'{apart:.1e}' if apart else '0'} |"
        )
    repeats = {case["items"]: case["repeats"] for case in result["cases"]}
    loads = [case["load_before"] for case in result["cases"]]
    return "\n".join(
        [
            *lines,
            "",
            f"{result['machine']}; {result['versions']}, {result['libraries']}; commit {result['commit']}; "
            f"{result['threads']} threads. Random rows, {result['width']} wide, 5.35 images a class; each in a "
            "fresh process, in turn; medians of "
            + " and ".join(f"{count} at {items:,}" for items, count in repeats.items())
            + f" images. The load average before the runs was {min(loads)} to {max(loads)}: compare CPU-seconds, "
            "which other work on the machine changes least. Differences are in percentage points.",
        ]
    )


def main() -> None:
    """Measure, or write the table again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="from the JSON that is there")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given.one[0], Path(given.one[1]))
        return
    if not given.table:
        measure_all()
    begin, end = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    shown = table(json.loads(RESULT.read_text(encoding="utf-8")))
    write_atomic(PAGE, f"{before}{begin}\n{shown}\n{end}{after}")


if __name__ == "__main__":
    main()
