"""Line charts and scatter plots as inline SVG: no picture files, sharp at any size, colours from the page (light or
dark)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlm.report.page import text as escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 560, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 30, 44
_MAX_POINTS = 400  # per line; longer ones are averaged in equal groups, more would not be seen
NUM_COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """A chart of one or more lines.

    Attributes:
        title: heading above the chart.
        series: name of a line -> its (x, y) points in the order of x. Points that are not finite are left out.
        x_label, y_label: axis names; say the unit.
        log_y: logarithmic y axis; points with y <= 0 are left out then.
        marks: (x, label) of vertical lines, such as the start of a stage.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_label: str = "step"
    y_label: str = ""
    log_y: bool = False
    marks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Dot:
    """A named point of a scatter plot, with a whisker from `low` to `high` where they are given.

    Attributes:
        each: values behind `y`, such as one per seed, drawn as small marks beside it.
    """

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    each: Sequence[float] = ()


@dataclass(frozen=True)
class Scatter:
    """A chart of named points, such as quality against cost.

    Attributes:
        title: heading above the chart.
        dots: one per name; those of one x are set side by side, so that all whiskers are seen. The y axis is made for
            `y` and `each`: whiskers much wider than these are cut at the frame, and have no cap there.
        x_label, y_label: axis names; say the unit.
    """

    title: str
    dots: Sequence[Dot]
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True)
class _Axis:
    """One axis: data range, pixel range, ticks as (value, text)."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[tuple[float, str]]

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw(curve: Curve) -> str:
    """The chart as a self-contained `<svg>` element followed by its legend."""
    lines = {name: _clean(points, curve.log_y) for name, points in curve.series.items()}
    shown = [point for points in lines.values() for point in points]
    if not shown:
        return '<p class="empty">no points to draw</p>'
    # On a logarithmic axis the lines are drawn in log10(y); only the tick labels know.
    x_axis = _axis([x for x, _ in shown], _LEFT, _WIDTH - _RIGHT)
    y_values = [y for _, y in shown]
    y_axis = (_log_axis if curve.log_y else _axis)(y_values, _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_axis, y_axis, curve)]
    for index, points in enumerate(lines.values()):
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
        colour = f"var(--line-{index % NUM_COLOURS})"
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) <= 20:
            parts += [
                f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3" fill="{colour}"/>' for x, y in points
            ]
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(curve.title)}">{"".join(parts)}</svg>'
    return svg + _legend(list(lines))


def draw_scatter(scatter: Scatter) -> str:
    """The chart as a self-contained `<svg>` element followed by its legend."""
    if not scatter.dots:
        return '<p class="empty">no points to draw</p>'
    core = [y for dot in scatter.dots for y in (dot.y, *dot.each)]
    room = max(max(core) - min(core), 0.02 * max(map(abs, core)))
    floor, ceiling = min(core) - room, max(core) + room
    if min(core) >= 0:  # scores that cannot be negative
        floor = max(0.0, floor)
    ends = [y for dot in scatter.dots for y in (dot.low, dot.high) if y is not None]
    heights = [*core, *(min(max(y, floor), ceiling) for y in ends)]
    xs = [dot.x for dot in scatter.dots]
    margin = (max(xs) - min(xs)) * 0.06  # so that no point sits on the frame
    x_axis = _axis([min(xs) - margin, max(xs) + margin], _LEFT, _WIDTH - _RIGHT)
    y_axis = _axis(heights, _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_axis, y_axis, Curve(scatter.title, {}, scatter.x_label, scatter.y_label))]
    for index, (dot, x) in enumerate(zip(scatter.dots, _side_by_side([x_axis.at(x) for x in xs]), strict=True)):
        if dot.low is not None and dot.high is not None:
            parts.append(_whisker(index, x, y_axis, dot.low, dot.high))
        parts += [
            f'<circle cx="{x + 9:.1f}" cy="{y_axis.at(y):.1f}" r="2" fill="{_colour(index)}" opacity=".7"/>'
            for y in dot.each
        ]
        parts.append(_symbol(index, x, y_axis.at(dot.y)))
    label = escape(scatter.title)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    keys = (
        f'<span><svg class="key" viewBox="0 0 14 14">{_symbol(index, 7, 7)}</svg>{escape(dot.name)}</span>'
        for index, dot in enumerate(scatter.dots)
    )
    return svg + f'<div class="legend">{"".join(keys)}</div>'


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential running mean over about a fiftieth of the values, corrected for its start."""
    keep = 1 - 1 / max(1, len(values) // 50)
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def _whisker(index: int, x: float, axis: _Axis, low: float, high: float) -> str:
    """A line between two values; an end outside the frame has no cap."""
    top, bottom = axis.at(min(high, axis.high)), axis.at(max(low, axis.low))
    line = f"M{x:.1f},{top:.1f}V{bottom:.1f}"
    for value, y in ((high, top), (low, bottom)):
        if axis.low <= value <= axis.high:
            line += f"M{x - 4:.1f},{y:.1f}h8"
    return f'<path d="{line}" stroke="{_colour(index)}" stroke-width="1.5" fill="none"/>'


def _side_by_side(places: Sequence[float], gap: float = 22) -> list[float]:
    """Pixels moved apart where several are closer than `gap`, each group around its middle."""
    moved, order = list(places), sorted(range(len(places)), key=lambda i: places[i])
    group: list[int] = []
    for index in [*order, -1]:
        if group and (index < 0 or places[index] - places[group[-1]] >= gap):
            middle = sum(places[i] for i in group) / len(group)
            for rank, member in enumerate(group):
                moved[member] = middle + gap * (rank - (len(group) - 1) / 2) if len(group) > 1 else places[member]
            group = []
        group.append(index)
    return moved


def _colour(index: int) -> str:
    return f"var(--line-{index % NUM_COLOURS})"


def _symbol(index: int, x: float, y: float) -> str:
    """A filled mark; when the colours are used up, the next shape."""
    shape, fill = index // NUM_COLOURS % 3, f'fill="{_colour(index)}"'
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" {fill}/>'
    if shape == 1:
        return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" {fill}/>'
    return f'<path d="M{x:.1f},{y - 6.5:.1f}l6.5,6.5l-6.5,6.5l-6.5,-6.5z" {fill}/>'


def _legend(names: Sequence[str]) -> str:
    keys = (
        f'<span><i style="background:var(--line-{index % NUM_COLOURS})"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def _clean(points: Sequence[Point], log_y: bool) -> list[Point]:
    kept = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
    if log_y:
        kept = [(x, math.log10(y)) for x, y in kept]
    size = math.ceil(len(kept) / _MAX_POINTS)
    groups = [kept[start : start + size] for start in range(0, len(kept), size)] if size > 1 else [[p] for p in kept]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = _widen(min(values), max(values))
    step = _nice_step((high - low) / 5)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    count = round((high - low) / step)
    return _Axis(low, high, start, end, [(low + i * step, _label(low + i * step, step)) for i in range(count + 1)])


def _log_axis(logs: Sequence[float], start: float, end: float) -> _Axis:
    low, high = _widen(min(logs), max(logs))
    digits = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low) - 1, math.ceil(high) + 1)
    ticks = sorted(power + math.log10(digit) for power in powers for digit in digits)
    below = [tick for tick in ticks if tick <= low]
    above = [tick for tick in ticks if tick >= high]
    low, high = (below[-1] if below else low), (above[0] if above else high)
    return _Axis(low, high, start, end, [(tick, f"{10**tick:.3g}") for tick in ticks if low <= tick <= high])


def _widen(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - max(abs(low) * 0.1, 0.5), high + max(abs(high) * 0.1, 0.5))


def _nice_step(raw: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw * 0.999)


def _label(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    if abs(value) >= 10_000 and step >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.{max(0, -math.floor(math.log10(step)))}f}"


def _grid(x_axis: _Axis, y_axis: _Axis, curve: Curve) -> str:
    bottom, parts = _HEIGHT - _BOTTOM, []
    for value, text in y_axis.ticks:
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for value, text in x_axis.ticks:
        x = x_axis.at(value)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{escape(text)}</text>')
    for value, text in curve.marks:
        if x_axis.low <= value <= x_axis.high:
            x = x_axis.at(value)
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
            parts.append(f'<text x="{x + 5:.1f}" y="{_TOP + 10}">{escape(text)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(curve.x_label)}</text>')
    parts.append(f'<text x="{_LEFT - 7}" y="{_TOP - 15}" text-anchor="start" dx="-44">{escape(curve.y_label)}</text>')
    return "".join(parts)
