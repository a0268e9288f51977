"""The histogram of images per class as a picture: SVG that follows the viewer's choice of light or
dark."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from namr_dist.text import printable

_WIDTH, _PANEL, _PLOT, _EDGE, _HEAD = 720, 190, 110, 24, 52
_STYLE = """
svg { --page: #ffffff; --ink: #1b1f24; --soft: #59616b; --rule: #dfe1dd; --bar: #0b6e75; }
@media (prefers-color-scheme: dark) {
  svg { --page: #14171a; --ink: #e8eaec; --soft: #a3acb5; --rule: #333a41; --bar: #52c3cb; }
}
text { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--soft); text-anchor: middle; }
.title { font-size: 16px; font-weight: 600; } .split { font-size: 13px; }
.title, .split { text-anchor: start; fill: var(--ink); }
.page { fill: var(--page); } .bar { fill: var(--bar); } .axis { stroke: var(--rule); }
"""


def bin_name(first: int, last: int) -> str:
    """ "6" or "10–19"."""
    return f"{first}" if first == last else f"{first}–{last}"


def histogram_svg(figures: dict[str, Any]) -> str:
    """The `histogram` of statistics(), a panel for each split, each to its own height."""
    histogram, name = figures["histogram"], escape(printable(figures["name"]))
    height = _HEAD + _PANEL * len(histogram["classes"])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img"><title>Images per class of {name}</title>'
        f'<style>{_STYLE}</style><rect class="page" width="100%" height="100%"/>'
        f'<text class="title" x="{_EDGE}" y="34">{name}: classes by number of images</text>'
    ]
    for number, (split, counts) in enumerate(histogram["classes"].items()):
        row = figures["splits"][split]
        parts.append(
            f'<g transform="translate({_EDGE} {_HEAD + _PANEL * number})"><text class="split" y="16">'
            f"{escape(printable(split))}: {row['classes']:,} classes, {row['images']:,} images</text>"
        )
        parts += _bars(histogram["bins"], counts)
        parts.append("</g>")
    return "".join(parts) + "</svg>\n"


def _bars(bins: list[tuple[int, int]], counts: list[int]) -> Iterator[str]:
    across = _WIDTH - 2 * _EDGE
    # A single bar as wide as the page would not look like one.
    pitch = min(across / len(bins), 64)
    floor = 40 + _PLOT
    for position, ((first, last), count) in enumerate(zip(bins, counts, strict=True)):
        middle, tall = pitch * (position + 0.5), _PLOT * count / max(counts)
        yield f'<text x="{middle:.1f}" y="{floor + 17}">{first}</text>'
        if last > first:  # on a line of its own: sixteen ranges side by side would overprint
            yield f'<text x="{middle:.1f}" y="{floor + 31}">–{last}</text>'
        if count:
            yield (
                f'<rect class="bar" x="{middle - 0.4 * pitch:.1f}" y="{floor - tall:.1f}" width="{0.8 * pitch:.1f}" '
                f'height="{tall:.1f}"/><text x="{middle:.1f}" y="{floor - tall - 5:.1f}">{count:,}</text>'
            )
    yield f'<line class="axis" x2="{across}" y1="{floor}" y2="{floor}"/>'
