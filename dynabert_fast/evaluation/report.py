"""The evaluation report: one HTML file, readable on a phone and in the dark.

The plot is SVG whose positions are percentages and whose sizes are pixels, so that it fills any
width while its text keeps its size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from dynabert_fast.evaluation.grid import (
    PARETO,
    Cell,
    Grid,
    count_noun,
    format_quantity,
    format_score,
    format_speed_up,
    is_fraction,
    metric_column,
    metric_label,
    write_aside,
)
from dynabert_fast.evaluation.latency import Latency

# Width in pixels of the area inside the axes, at the narrowest screen of each of the two layouts
# that the template switches between; labels are placed for these.
_PLOT_WIDTHS = {"narrow": 270, "wide": 460}
_PLOT_HEIGHT = 320
_CHARACTER_WIDTH = 6.6  # of the 11 px label font, on the generous side
_LABEL_CHARACTERS = 14
_MARKER_RADIUS = 6
_DEPTH_MARKERS = 5  # shapes and colours of the template; one more is for explicit extents

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with a label at each of `ticks`."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Position of a value in percent of the axis, not beyond its ends."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def from_top(self, value: float) -> float:
        """The same counted from the other end, as SVG counts y."""
        return round(100 - self.at(value), 2)


@dataclass(frozen=True)
class Spot:
    """A place for a name beside a marker: offset in pixels, and SVG's `text-anchor`."""

    dx: float
    dy: float
    anchor: str


@dataclass(frozen=True)
class Point:
    """One sub-network in the plot; in percent, `y` downwards, `low` to `high` its p10 to p90."""

    cell: Cell
    x: float
    y: float
    low: float
    high: float
    marker: int
    front: bool
    name: str


@dataclass(frozen=True)
class Plot:
    """The score/latency plot; `labels` holds, by layout, the points with room for a name."""

    points: tuple[Point, ...]
    front: tuple[Box, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    legend: tuple[tuple[int, str], ...]
    labels: dict[str, tuple[tuple[Point, Spot], ...]]
    height: int = _PLOT_HEIGHT


# Around a marker, the best first.
_SPOTS = (
    Spot(0, -10, "middle"),
    Spot(10, 4, "start"),
    Spot(0, 18, "middle"),
    Spot(-10, 4, "end"),
    Spot(7, -6, "start"),
    Spot(-7, -6, "end"),
    Spot(7, 14, "start"),
    Spot(-7, 14, "end"),
)


def write_report(grid: Grid, path: str | os.PathLike[str]) -> None:
    """Write the report of a grid to one HTML file; a file that is there survives a failure.

    The file loads nothing: styles and drawings are inside, there is no script. Every name in
    the grid is escaped.

    Args:
        grid: What was measured.
        path: The HTML file.
    """
    source = resources.files("dynabert_fast.evaluation") / "report.html.j2"
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(source.read_text(encoding="utf-8"))
    low, high = _score_range(grid)
    html = template.render(
        grid=grid,
        plot=_plot(grid),
        scale=Axis(low, high, (low, high)),
        highlights=_highlights(grid),
        fronts={"latency": grid.pareto("latency"), "FLOPs": grid.pareto("flops")},
        percent="\u202f%" if is_fraction(grid.metric) else "",
        count_noun=count_noun,
        pareto_note=PARETO,
        metric_column=metric_column,
        metric_label=metric_label,
        format_score=format_score,
        format_quantity=format_quantity,
        format_speed_up=format_speed_up,
    )
    write_aside(path, html)


def _highlights(grid: Grid) -> list[tuple[str, Cell]]:
    """What most readers look for: the whole model, the fastest about as good, the fastest."""
    by_time = sorted(grid.cells, key=lambda cell: cell.latency.median_ms)
    full = grid.full
    if full is None:
        return [("Fastest", by_time[0])]
    chosen = [("Whole model", full)]
    if is_fraction(grid.metric):
        near = next(c for c in by_time if grid.score(c) >= grid.score(full) - 0.01)
        if near not in (full, by_time[0]):
            chosen.append(("Fastest within one point of it", near))
    if by_time[0] != full:
        chosen.append(("Fastest", by_time[0]))
    return chosen


def _score_range(grid: Grid) -> tuple[float, float]:
    """Lowest and highest score, at least a little apart: the ends of a scale."""
    scores = [grid.score(cell) for cell in grid.cells]
    low, high = min(scores), max(scores)
    return (low, high) if high - low > 1e-9 else (low - 0.01, high + 0.01)


def _plot(grid: Grid) -> Plot:
    """Lay out the plot: axes, points, front, labels."""
    factor = 100 if is_fraction(grid.metric) else 1
    low, high = (factor * score for score in _score_range(grid))
    y_axis = _axis(low - 0.08 * (high - low), high + 0.08 * (high - low))
    x_axis = _time_axis([cell.latency for cell in grid.cells])
    front_cells = grid.pareto()
    points = tuple(
        Point(
            cell=cell,
            x=x_axis.at(cell.latency.median_ms),
            y=y_axis.from_top(factor * grid.score(cell)),
            low=x_axis.at(cell.latency.p10_ms),
            high=x_axis.at(cell.latency.p90_ms),
            marker=_marker(grid, cell),
            front=cell in front_cells,
            name=_short_name(grid, cell),
        )
        for cell in grid.cells
    )
    legend = {point.marker: _legend_text(grid, point.cell) for point in points}
    return Plot(
        points=points,
        front=_staircase([point for point in points if point.front]),
        x_ticks=tuple((x_axis.at(t), _tick_text(x_axis, t)) for t in x_axis.ticks),
        y_ticks=tuple((y_axis.from_top(t), _tick_text(y_axis, t)) for t in y_axis.ticks),
        legend=tuple(sorted(legend.items())),
        labels={layout: _place_labels(points, width) for layout, width in _PLOT_WIDTHS.items()},
    )


def _time_axis(latencies: Sequence[Latency]) -> Axis:
    """From zero, so that distances are in proportion, unless all are within a factor of two."""
    medians = [latency.median_ms for latency in latencies]
    # A single slow pass must not squeeze the rest.
    high = 1.05 * min(max(latency.p90_ms for latency in latencies), 1.25 * max(medians))
    low = min(latency.p10_ms for latency in latencies)
    if len(latencies) < 2 or min(medians) < 0.5 * max(medians):
        return _axis(0.0, high)
    return _axis(max(0.0, low - 0.1 * (high - low)), high)


def _axis(low: float, high: float) -> Axis:
    """An axis with about five ticks at round numbers."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(i * step for i in range(first, last + 1)))


def _tick_text(axis: Axis, tick: float) -> str:
    """The number with the decimals that the distance between two ticks needs."""
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else 1.0
    decimals = next((d for d in range(9) if math.isclose(step, round(step, d), rel_tol=1e-6)), 9)
    return f"{tick:.{decimals}f}"


def _marker(grid: Grid, cell: Cell) -> int:
    """Index of shape and colour: by depth, if they suffice; the last is for explicit extents."""
    if cell.depth is None:
        return _DEPTH_MARKERS
    return grid.depths.index(cell.depth) if _depth_has_marker(grid) else 0


def _depth_has_marker(grid: Grid) -> bool:
    return len(grid.depths) <= _DEPTH_MARKERS


def _legend_text(grid: Grid, cell: Cell) -> str:
    if cell.depth is None:
        return "explicit extents"
    return f"depth {cell.depth:g}" if _depth_has_marker(grid) else "width and depth"


def _short_name(grid: Grid, cell: Cell) -> str:
    """A label for the plot: the width alone where marker and legend tell the depth."""
    if cell.on_grid and _depth_has_marker(grid):
        return f"w{cell.width:g}"
    name = cell.subnet
    return name if len(name) <= _LABEL_CHARACTERS else name[: _LABEL_CHARACTERS - 1] + "…"


def _staircase(front: Sequence[Point]) -> tuple[Box, ...]:
    """The front's outline in percent: what score can be had within a given time."""
    steps = sorted(front, key=lambda point: (point.x, -point.y))
    lines: list[Box] = []
    for i, point in enumerate(steps):
        below = steps[i - 1].y if i else 100.0
        right = steps[i + 1].x if i + 1 < len(steps) else 100.0
        lines.append((point.x, below, point.x, point.y))
        lines.append((point.x, point.y, right, point.y))
    return tuple(lines)


def _place_labels(points: Sequence[Point], width: int) -> tuple[tuple[Point, Spot], ...]:
    """Find spots where a name covers no marker and no other name; points of the front choose first.

    Args:
        points: The points of the plot.
        width: Pixels between the left and the right end of the plot.

    Returns:
        The points for which there is a spot, each with its own.
    """
    r = _MARKER_RADIUS
    centres = [(p.x / 100 * width, p.y / 100 * _PLOT_HEIGHT) for p in points]
    taken: list[Box] = [(x - r, y - r, x + r, y + r) for x, y in centres]
    placed = []
    for point, (x, y) in sorted(zip(points, centres, strict=True), key=lambda p: not p[0].front):
        for spot in _SPOTS:
            box = _label_box(spot, len(point.name) * _CHARACTER_WIDTH, x, y)
            inside = box[0] >= 0 and box[2] <= width + r and box[1] >= -r and box[3] <= _PLOT_HEIGHT
            if inside and not any(_overlap(box, other) for other in taken):
                placed.append((point, spot))
                taken.append(box)
                break
    return tuple(placed)


def _label_box(spot: Spot, text_width: float, x: float, y: float) -> Box:
    """The pixels that a name covers beside a marker at (x, y)."""
    before = {"start": 0.0, "middle": 0.5, "end": 1.0}[spot.anchor]
    left, baseline = x + spot.dx - before * text_width, y + spot.dy
    return (left, baseline - 10, left + text_width, baseline + 3)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
