"""Charts as inline SVG that takes its colours and fonts from the page around it.

Hand-made rather than drawn by matplotlib: colours come from the page's style sheet (classes c0, c1,
…), so one drawing serves light and dark; text stays text; a point costs some twenty bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from namr_dist.retrieval.arrays import Float64

HUES = 6
"""point colours in the page's style sheet"""
SHAPES = 2
_WIDTH, _HEIGHT = 360, 230
_LEFT, _TOP, _BOTTOM = 42, 8, 40
_MAP_SIDE = 640
_LOG_FROM_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; points that are not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    css: str
    dots: bool = False
    """mark every point, with its value as a hover title"""
    label: bool = False
    """write the name at the right end"""


def smoothed(ys: Sequence[float], *, weight: float = 0.9) -> list[float]:
    """Exponential moving average without the pull to the first value; gaps stay NaN."""
    result, total, norm = [], 0.0, 0.0
    for y in ys:
        if math.isfinite(y):
            total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        result.append(total / norm if math.isfinite(y) else math.nan)
    return result


def thinned(values: Sequence[float], most: int = 400) -> list[float]:
    """At most `most` values: means of equal stretches (NaN left out)."""
    if len(values) <= most:
        return list(values)
    result = []
    for i in range(most):
        part = values[i * len(values) // most : (i + 1) * len(values) // most]
        finite = [value for value in part if math.isfinite(value)]
        result.append(sum(finite) / len(finite) if finite else math.nan)
    return result


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span [low, high]."""
    # As good as equal: ticks that near would be the same number.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = abs(low) * 0.1 or 0.5
        low, high = low - half, high + half
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(powers) > 4:
        return [10.0**power for power in powers]
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[first : last + 1]


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.0f}" y="{:.0f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, allow_log: bool = False
) -> Markup | None:
    """A chart of curves over a common x axis, or None where no point is finite.

    With `allow_log` the y axis is logarithmic once the values are positive and span a factor of 20;
    the axis then says so.
    """
    curves = [
        (line, [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)])
        for line in lines
    ]
    values = [y for _, points in curves for _, y in points]
    if not values:
        return None
    log = allow_log and min(values) > 0 and max(values) / min(values) > _LOG_FROM_RATIO
    ticks = _log_ticks(min(values), max(values)) if log else nice_ticks(min(values), max(values))
    steps = [x for _, points in curves for x, _ in points]
    x_low, x_high = min(steps), max(steps)
    x_ticks = nice_ticks(x_low, x_high, count=6)
    if x_low == x_high:
        x_ticks, x_low, x_high = [x_low], x_low - 1, x_high + 1
    right = 60 if any(line.label for line in lines) else 14

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - right)

    def scale(y: float) -> float:
        return math.log10(y) if log else y

    def down(y: float) -> float:
        share = (scale(y) - scale(ticks[0])) / (scale(ticks[-1]) - scale(ticks[0]))
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        y = down(tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, _WIDTH - right, y, y
            )
        )
        parts.append(_text(_LEFT - 7, y + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(_text(across(tick), _HEIGHT - _BOTTOM + 17, f"{tick:g}", "middle"))
    axis = x_label + (" (vertical axis logarithmic)" if log else "")
    parts.append(_text((_LEFT + _WIDTH - right) / 2, _HEIGHT - 3, axis, "middle"))
    labels: list[tuple[float, Line]] = []
    for line, points in curves:
        if not points:
            continue
        path = "M" + "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in points)
        parts.append(Markup('<path class="line {}" d="{}"/>').format(line.css, path))
        if line.dots:
            dot = (
                '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>'
            )
            for x, y in points:
                hint = f"{line.name}, {x_label} {x:g}: {y:.2f}"
                parts.append(Markup(dot).format(line.css, across(x), down(y), hint))
        if line.label:
            labels.append((down(points[-1][1]), line))
    previous = -math.inf
    for y, line in sorted(labels, key=lambda entry: entry[0]):
        previous = max(y, previous + 14)  # names of curves that end together would overprint
        parts.append(
            Markup('<text class="name {}" x="{}" y="{:.0f}">{}</text>').format(
                line.css, _WIDTH - right + 8, previous + 4, line.name
            )
        )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, title, Markup("").join(parts)
    )


def swatch(css: str) -> Markup:
    """A piece of a curve, for a legend."""
    return Markup(
        '<svg viewBox="0 0 28 12" class="swatch" aria-hidden="true">'
        '<path class="line {}" d="M1 6h26"/></svg>'
    ).format(css)


def marker(group: int) -> Markup:
    """A group's symbol alone, for a legend: hue and shape together tell the groups apart."""
    return Markup('<svg viewBox="-6 -6 12 12" class="marker" aria-hidden="true">{}</svg>').format(
        _symbol(0, 0, group, 4.5)
    )


def _symbol(x: float, y: float, group: int, r: float, hint: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(hint) if hint else Markup("")
    css = f"p{group % HUES}"
    if group // HUES % SHAPES == 0:
        circle = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{:g}">{}</circle>')
        return circle.format(css, x, y, r, title)
    path = f"M{x:.1f} {y - 1.3 * r:.1f}l{1.2 * r:.1f} {2.1 * r:.1f}h{-2.4 * r:.1f}z"
    return Markup('<path class="{}" d="{}">{}</path>').format(css, path, title)


def scatter(
    points_N2: Float64, groups: Sequence[int], hints: Sequence[str], *, title: str
) -> Markup:
    """A map without axes: symbol by group, a hover title on every point, both directions at one
    scale."""
    low_2, high_2 = points_N2.min(axis=0), points_N2.max(axis=0)
    span = float((high_2 - low_2).max()) or 1.0
    placed_N2 = (points_N2 - low_2) / span * (_MAP_SIDE - 16) + 8
    width, height = (high_2 - low_2) / span * (_MAP_SIDE - 16) + 16
    radius = 4.5 if len(points_N2) < 300 else 3.2 if len(points_N2) < 1200 else 2.4
    symbols = Markup("").join(
        _symbol(x, y, group, radius, hint)
        for (x, y), group, hint in zip(placed_N2, groups, hints, strict=True)
    )
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, symbols
    )
