"""Write the kernels' figures into docs/kernels.md and README.md, from what these wrote on each
machine:

    namr bench kernels --csv docs/results/kernels-cpu.csv    (tools/measure_on_gpu.sh: -h200.csv)
    namr bench kernels --csv docs/results/kernels-h200-cold.csv    (a loss a process, empty cache)
    python tools/largest_batch.py --csv docs/results/largest-batch-h200.csv
    python tools/make_performance.py

That of the CPU was made with `--device cpu --rows 4096 --width 128 --passes forward+backward
--samples 7 --budget 30`, multi-cluster ranking beside eager, compile and matmul, the others beside
eager, pml and matmul.

A section appears once its file is there. Of a measurement that was repeated the last counts.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from namr_dist.kernels.bench.cases import LOSSES
from namr_dist.kernels.bench.table import DIFFERS, WRONG, read

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
NAMES = {
    "triplet-hardest": "triplet, hardest",
    "triplet-semihard": "triplet, semi-hard",
    "triplet-distance-weighted": "triplet, distance-weighted",
    "multi-cluster-ranking": "multi-cluster ranking",
}
OTHERS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "naive": "loops over anchors",
    "pml": "pytorch-metric-learning",
}
WHOLE = "forward+backward"

Row = dict[str, str]
Size = tuple[str, int, int]
"""(dtype, B, D)."""


class Figures:
    """The rows of one file that agree with the definition, or differ from it by definition, by what
    they measure."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[tuple[str, str, str, int, int, str], Row] = {}
        self.wrong: dict[tuple[str, str, int, int, str], None] = {}
        for row in read(path):
            key = (row["loss"], row["dtype"], int(row["B"]), int(row["D"]), row["provider"])
            self.wrong.pop(key, None)
            if row["agrees"] == WRONG:
                self.wrong[key] = None
            elif row["median_ms"]:
                self.rows[(row["provider"], *key[:4], row["pass"])] = row
        self.any = next(iter(self.rows.values()))
        self.gpu = any(row["host_ms"] for row in self.rows.values())

    def get(self, provider: str, loss: str, size: Size, part: str = WHOLE) -> Row | None:
        """A row, or None where it was not measured."""
        return self.rows.get((provider, loss, *size, part))

    def sizes(self, dtype: str | None = None) -> list[Size]:
        """All sizes that ours was measured at, in order."""
        return sorted(
            {
                (key[2], key[3], key[4])
                for key in self.rows
                if key[0] == "ours" and key[5] == WHOLE and dtype in (None, key[2])
            }
        )


def number(value: float) -> str:
    """Three digits, two after the point at least below 1."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×" if value >= 10 else f"{value:.2f}×"


def time_text(row: Row) -> str:
    """Median with its quantiles; a dagger where launching sets the pace."""
    median, low, high = (number(float(row[name])) for name in ("median_ms", "p20_ms", "p80_ms"))
    spread = " (one pass)" if row["samples"] == "1" else f" [{low}–{high}]"
    bound = row["host_ms"] and float(row["host_ms"]) > 0.9 * float(row["median_ms"])
    return median + spread + ("†" if bound else "")


def ratio_text(row: Row | None, ours: Row) -> str:
    """How many times the time and the memory of ours."""
    if row is None:
        return "–"
    text = [
        times(float(row[name]) / float(ours[name]))
        for name in ("median_ms", "peak_extra_mib")
        if row[name] and ours[name]
    ]
    return ", ".join(text) + "*" * (row["agrees"] == DIFFERS)


def table(heading: list[str], lines: list[list[str]], words: int) -> list[str]:
    """A Markdown table whose first columns, so many, are words and the rest figures."""
    marks = ["---" if column < words else "---:" for column in range(len(heading))]
    return [f"| {' | '.join(cells)} |" for cells in (heading, marks, *lines)]


def comparison(figures: Figures, sizes: list[Size], *, short: bool) -> list[str]:
    """Ours beside the others, a line a loss and size; short: without the size and the floor."""
    others = [
        name
        for name in OTHERS
        if any(figures.get(name, loss, size) for loss in LOSSES for size in sizes)
    ]
    lines = []
    for loss in LOSSES:
        for size in sizes:
            ours = figures.get("ours", loss, size)
            if ours is not None:
                where = [] if short else [f"{size[1]:,} × {size[2]}"]
                share = [] if short else [f"{100 * float(ours['floor_share']):.0f} %"]
                memory = number(float(ours["peak_extra_mib"])) if ours["peak_extra_mib"] else "–"
                lines.append(
                    [
                        NAMES.get(loss, loss),
                        *where,
                        time_text(ours),
                        memory,
                        *share,
                        *(ratio_text(figures.get(name, loss, size), ours) for name in others),
                    ]
                )
    return table(
        [
            "loss",
            *(["B × D"] if not short else []),
            "here, ms",
            "here, MiB",
            *(["of the floor"] if not short else []),
            *(OTHERS[name] for name in others),
        ],
        lines,
        1 if short else 2,
    )


def legend(figures: Figures, sizes: list[Size]) -> str:
    """What the columns and marks of a comparison mean."""

    def rows(*names: str) -> list[Row]:
        return [
            row
            for name in names
            for loss in LOSSES
            for size in sizes
            if (row := figures.get(name, loss, size))
        ]

    text = "Forward and backward; other columns: times the time, times the extra memory."
    if any(row["agrees"] == DIFFERS for row in rows(*OTHERS)):
        text += (
            " * Another loss in part: it draws other negatives, or takes one semi-hard negative an anchor; timed "
            "all the same."
        )
    if any("†" in time_text(row) for row in rows("ours")):
        text += " † The host takes as long to launch it: with other work queued on the GPU before it, it takes less."
    return text


def protocol(figures: Figures) -> str:
    """Where and how the figures were made."""
    rows = [row for key, row in figures.rows.items() if key[5] == WHOLE]
    commits = " ".join(dict.fromkeys(row["commit"] for row in rows))
    rounds = sorted({int(row["samples"]) for row in rows})
    spread = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0])
    memory = "the allocator's peak" if figures.gpu else "the peak of a process of its own"
    return (
        f"{figures.any['device']}, {figures.any['platform']}, torch {figures.any['torch']}, Triton "
        f"{figures.any['triton']}, commit {commits}. Providers in turn within one process, medians of {spread} "
        f"rounds [20th–80th percentile]; memory is {memory} during one forward and backward pass beyond what was "
        "held before, the gradients included."
    )


def errors(figures: Figures, dtype: str) -> str:
    """Errors against the definition in float64, of ours and of eager PyTorch."""
    parts = []
    for provider, name in (("ours", "here"), ("eager", "eager PyTorch")):
        rows = [
            row
            for key, row in figures.rows.items()
            if key[::2][:2] == (provider, dtype) and row["loss_error"]
        ]
        if rows:
            loss, gradient = (
                max(float(row[column]) for row in rows)
                for column in ("loss_error", "gradient_error")
            )
            parts.append(f"{name} {loss:.0e} of the loss, {gradient:.0e} of a gradient")
    return f"Largest error against the definition in float64: {'; '.join(parts)}."


def left_out(figures: Figures) -> list[str]:
    """What did not agree with the definition and is therefore not shown."""
    names = [
        f"{provider}, {NAMES.get(loss, loss)}, {B:,} × {D} in {dtype}"
        for loss, dtype, B, D, provider in figures.wrong
    ]
    return (
        [f"Left out, for it did not agree with the definition: {'; '.join(names)}.", ""]
        if names
        else []
    )


def beside_product(figures: Figures) -> list[str]:
    """Forward passes beside the library's bare product of the same rows."""
    lines = []
    for loss in LOSSES:
        for size in figures.sizes():
            ours, bare = (
                figures.get("ours", loss, size, "forward"),
                figures.get("matmul", loss, size, "forward"),
            )
            if ours and bare:
                lines.append(
                    [
                        NAMES.get(loss, loss),
                        size[0],
                        f"{size[1]:,} × {size[2]}",
                        time_text(ours),
                        time_text(bare),
                        f"{float(ours['median_ms']) / float(bare['median_ms']):.2f}",
                    ]
                )
    if not lines:
        return []
    return [
        "The loss alone, without gradients, beside the library's bare product X·Xᵀ of the same rows in the same "
        "type, which it writes to memory:",
        "",
        *table(["loss", "type", "B × D", "here, ms", "X·Xᵀ, ms", "ratio"], lines, 3),
        "",
    ]


def beyond_gradients(figures: Figures) -> list[str]:
    """Extra memory less the gradients that a pass returns, at the largest size."""
    size = max(figures.sizes(), key=lambda size: (size[1] * size[2], size[0]))
    dtype, B, D = size
    width = 4 if dtype == "float32" else 2
    extras = []
    for name, loss in LOSSES.items():
        row = figures.get("ours", name, size)
        if row and row["peak_extra_mib"]:
            rows = B + {"weights": B, "proxies": B // 4}.get(loss.second, 0)
            extras.append(
                (float(row["peak_extra_mib"]) - rows * D * width / 2**20, NAMES.get(name, name))
            )
    if not extras:
        return []
    most, where = max(extras)
    return [
        f"Beyond the gradients that it returns, a pass at {B:,} × {D} in {dtype} takes at most {number(most)} MiB "
        f"({where}).",
        "",
    ]


def largest(path: Path) -> list[str]:
    """The largest batches that finished."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    finished = {(row["loss"], row["dtype"], row["D"]): row for row in rows if row["seconds"]}
    ended = {(row["loss"], row["dtype"], row["D"]): row["note"] for row in rows}
    lines = [
        [
            NAMES.get(loss, loss),
            dtype,
            f"{int(row['B']):,} × {D}",
            number(float(row["seconds"])),
            number(float(row["peak_extra_mib"])),
            f"{float(row['gradient_error']):.0e}",
            f"{row['rows_apart']} of {row['rows_compared']}",
            ended[loss, dtype, D],
        ]
        for (loss, dtype, D), row in finished.items()
    ]
    return [
        "The largest batch that finished, rows doubled until memory was full or a pass would have taken too long; "
        "the gradient of sampled rows beside float64, rows beside a near tie apart (`tools/largest_batch.py`, "
        "[results/largest-batch-h200.csv](results/largest-batch-h200.csv)):",
        "",
        *table(["loss", "type", "B × D", "s", "MiB", "error", "rows apart", "ended by"], lines, 2),
        "",
    ]


def cold(path: Path) -> list[str]:
    """Seconds of a process's first call."""
    seconds = [
        float(row["cold_start_s"])
        for row in read(path)
        if row["provider"] == "ours" and row["cold_start_s"]
    ]
    return [
        f"The first call in a process, with nothing compiled before: {min(seconds):.1f} to {max(seconds):.1f} s "
        "([results/kernels-h200-cold.csv](results/kernels-h200-cold.csv)).",
        "",
    ]


def section(heading: str, path: Path) -> list[str]:
    """A section of docs/kernels.md."""
    figures = Figures(path)
    text = [
        f"## {heading}",
        "",
        f"{protocol(figures)} Figures: [results/{path.name}](results/{path.name}).",
        "",
    ]
    for dtype in sorted({size[0] for size in figures.sizes()}, reverse=True):  # float32 first
        sizes = figures.sizes(dtype)
        text += [
            f"{legend(figures, sizes)} {dtype}:",
            "",
            *comparison(figures, sizes, short=False),
            "",
            errors(figures, dtype),
            "",
        ]
    text += [
        "The floor is the loss's necessary matrix products at the speed of the library's product in that type. "
        "On a GPU that one uses no matrix units for float32 and ours does, in three parts, so that more than "
        "100 % is possible."
        if figures.gpu
        else "The floor is the loss's necessary matrix products at the speed of the library's product.",
        "",
    ]
    text += left_out(figures)
    if figures.gpu:
        text += [*beside_product(figures), *beyond_gradients(figures)]
        text += (
            cold(RESULTS / "kernels-h200-cold.csv")
            if (RESULTS / "kernels-h200-cold.csv").is_file()
            else []
        )
        text += (
            largest(RESULTS / "largest-batch-h200.csv")
            if (RESULTS / "largest-batch-h200.csv").is_file()
            else []
        )
    return text


def kernels_page() -> str:
    """What stands between the marks of docs/kernels.md."""
    text = []
    for heading, name in (("On a GPU", "kernels-h200.csv"), ("On a CPU", "kernels-cpu.csv")):
        if (RESULTS / name).is_file():
            text += section(heading, RESULTS / name)
    return "\n".join(text).rstrip()


def readme() -> str:
    """What stands between README's marks: the size at which most was measured, on the best
    machine."""
    path = next(
        path
        for path in (RESULTS / "kernels-h200.csv", RESULTS / "kernels-cpu.csv")
        if path.is_file()
    )
    figures = Figures(path)

    def measured(size: Size) -> tuple[int, int, bool]:
        pairs = [
            name for name in ("ours", *OTHERS) for loss in LOSSES if figures.get(name, loss, size)
        ]
        return len(pairs), size[1] * size[2], size[0] == "float32"

    size = max(figures.sizes(), key=measured)
    return "\n".join(
        [
            f"A batch of {size[1]:,} rows, D = {size[2]}, {size[0]}; {figures.any['device']}, "
            f"{figures.any['platform']}, torch {figures.any['torch']}:",
            "",
            *comparison(figures, [size], short=True),
            "",
            f"{legend(figures, [size])} How it was measured, other sizes, errors: "
            "[docs/kernels.md](docs/kernels.md).",
        ]
    )


def put(page: Path, content: str) -> None:
    """Replace what stands between the page's marks."""
    text = page.read_text(encoding="utf-8")
    page.write_text(
        re.sub(
            r"(<!-- performance:begin -->\n).*?(\n<!-- performance:end -->)",
            lambda match: match[1] + content + match[2],
            text,
            flags=re.DOTALL,
        ),
        encoding="utf-8",
    )


def main() -> None:
    """Replace what stands between the marks of both pages."""
    put(DOCS / "kernels.md", kernels_page())
    put(DOCS.parent / "README.md", readme())


if __name__ == "__main__":
    main()
