"""Pictures from the CSV alone: time and extra memory of forward and backward against B, one panel a
loss.

One pair of PNG files for each machine, set of versions, dtype and width in the file.  Of repeated
measurements the last counts.  Rows that do not agree with the definition are left out; dashed lines
differ from it by definition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import LOSSES, PASSES
from .providers import PROVIDERS
from .table import DIFFERS, WRONG, RefusedError, read

# Okabe and Ito's palette, distinct to colour-blind eyes; the markers say it again.
_STYLES = dict(
    zip(
        PROVIDERS,
        (
            ("#D55E00", "o"),
            ("#0072B2", "s"),
            ("#009E73", "^"),
            ("#CC79A7", "D"),
            ("#E69F00", "v"),
            ("#000000", "x"),
        ),
        strict=True,
    )
)
_LABELS = {
    "ours": "NAMR-dist",
    "eager": "PyTorch, matmuls",
    "compile": "torch.compile",
    "naive": "PyTorch, loops",
    "pml": "pytorch-metric-learning",
    "matmul": "bare X·Xᵀ",
}
_COLUMNS = 4


@dataclass(frozen=True)
class _Figure:
    """What all points of one picture share."""

    device: str
    platform: str
    torch: str
    triton: str
    dtype: str
    width: str

    @property
    def slug(self) -> str:
        words = f"{self.device}-{self.platform}-torch-{self.torch}-{self.dtype}-D{self.width}"
        return re.sub(r"[^A-Za-z0-9.+]+", "-", words)


def draw(csv: Path, out: Path) -> list[Path]:
    """Write the PNG files into `out`; returns their paths.  Raises RefusedError for a file without
    figures."""
    try:
        import matplotlib
    except ImportError:
        raise RefusedError("plots need matplotlib: pip install 'namr-dist[bench]'") from None
    matplotlib.use("Agg")
    figures: dict[_Figure, dict[tuple[str, str, int], dict[str, str]]] = {}
    for row in read(csv):
        if row["median_ms"] and row["agrees"] != WRONG and row["pass"] in (PASSES[-1], "forward"):
            key = _Figure(
                row["device"], row["platform"], row["torch"], row["triton"], row["dtype"], row["D"]
            )
            # The witness has a forward pass only; of the others the whole pass is drawn.
            if (row["pass"] == "forward") == (row["provider"] == "matmul"):
                figures.setdefault(key, {})[row["loss"], row["provider"], int(row["B"])] = row
    if not figures:
        raise RefusedError(
            f"{csv} holds no figures that agree with the definition; run the benchmark first"
        )
    out.mkdir(parents=True, exist_ok=True)
    return [
        _draw(figure, points, quantity, out / f"{quantity}-{figure.slug}.png")
        for figure, points in figures.items()
        for quantity in ("time", "memory")
    ]


def _draw(
    figure: _Figure, points: dict[tuple[str, str, int], dict[str, str]], quantity: str, path: Path
) -> Path:
    from matplotlib import pyplot

    losses = [loss for loss in LOSSES if any(key[0] == loss for key in points)]
    columns = min(_COLUMNS, len(losses))
    lines = -(-len(losses) // columns)
    canvas, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(3.6 * columns + 0.6, 3.1 * lines + 1.5),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    panels = grid.flatten()
    handles: dict[str, Any] = {}
    sizes = sorted({rows for _, _, rows in points})
    for panel, loss in zip(panels, losses, strict=False):
        for provider in PROVIDERS:
            rows = [row for key, row in sorted(points.items()) if key[:2] == (loss, provider)]
            line = _line(panel, provider, rows, quantity)
            if line is not None:
                handles.setdefault(provider, line)
        panel.set_title(
            loss.replace("-", " ").replace("multi ", "multi-").replace("proxy ", "proxy-"),
            fontsize=10,
        )
        _scale(panel, sizes)
    for panel in panels[len(losses) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(losses) - columns) : len(losses)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("batch size B (rows)")
    for row_panels in grid:
        row_panels[0].set_ylabel(
            "forward + backward (ms)" if quantity == "time" else "extra memory (MiB)"
        )
    what = (
        "Time, median with p20–p80"
        if quantity == "time"
        else "Peak extra memory of forward + backward"
    )
    commits = " ".join(_unique(row["commit"] for row in points.values()))
    canvas.suptitle(
        f"{what}; {figure.dtype}, D = {figure.width}\n{figure.device}, {figure.platform}, "
        f"torch {figure.torch}, triton {figure.triton}, commit {commits}",
        fontsize=10,
    )
    names = [name for name in PROVIDERS if name in handles]
    canvas.legend(
        [handles[name] for name in names],
        [_legend(name) for name in names],
        ncols=min(6, len(names)),
        loc="outside lower center",
        frameon=False,
        fontsize=9,
    )
    canvas.savefig(path, dpi=130)
    pyplot.close(canvas)
    return path


def _legend(provider: str) -> str:
    return _LABELS[provider] + (" (forward)" if provider == "matmul" else "")


def _line(panel: Any, provider: str, rows: list[dict[str, str]], quantity: str) -> Any:
    """One provider's points in one panel, or None where it has none."""
    column = "median_ms" if quantity == "time" else "peak_extra_mib"
    rows = [row for row in rows if row[column] and float(row[column]) > 0]
    if not rows:
        return None
    colour, marker = _STYLES[provider]
    sizes = [int(row["B"]) for row in rows]
    style = "--" if rows[-1]["agrees"] == DIFFERS else ":" if provider == "matmul" else "-"
    (line,) = panel.plot(
        sizes,
        [float(row[column]) for row in rows],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.5,
        linestyle=style,
    )
    if quantity == "time":
        low, high = ([float(row[name]) for row in rows] for name in ("p20_ms", "p80_ms"))
        panel.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.vlines(sizes, low, high, color=colour, linewidth=1)
    return line


def _scale(panel: Any, sizes: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    # Fixed limits: around a single batch size, automatic ones come out upside down on a logarithmic
    # axis.
    panel.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(True, which="major", linewidth=0.4, alpha=0.6)


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
