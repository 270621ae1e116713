from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dynabert_fast.evaluation import Cell, Grid, Latency, write_report
from dynabert_fast.evaluation.report import _axis, _place_labels, _plot, _tick_text, _time_axis

VOID = {"meta", "link", "br", "img", "hr", "input"}


def make_cell(
    width: float | None, depth: float | None, score: float = 0.5, ms: float = 2.0, name: str = ""
) -> Cell:
    name = name or f"w{width:.2f}-d{depth:.2f}"
    return Cell(name, width, depth, {"accuracy": score}, 10**7, 10**9, Latency(ms, ms, ms))


def make_grid(*cells: Cell, **changes: Any) -> Grid:
    defaults = {
        "model": "tiny",
        "task": "toy",
        "metric": "accuracy",
        "examples": 1200,
        "tokens": 34000,
        "latency_batch_size": 1,
        "latency_length": 64,
        "latency_rounds": 20,
        "environment": {"device": "Some CPU", "cpu": "Some CPU", "torch": "2.13.0"},
    }
    return Grid(cells=cells or twelve(), **{**defaults, **changes})


def twelve() -> tuple[Cell, ...]:
    return tuple(
        make_cell(width, depth, 0.9 - 0.05 / (width * depth), 20 * width * depth)
        for depth in (1.0, 0.75, 0.5)
        for width in (1.0, 0.75, 0.5, 0.25)
    )


class Page(HTMLParser):
    """Reads a report, failing on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def classes(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def render(grid: Grid, folder: Path) -> tuple[str, Page]:
    write_report(grid, folder / "report.html")
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


GRIDS = {
    "grid": make_grid(),
    "explicit": make_grid(make_cell(None, None, name="l0-h3-n7")),
    "mixed": make_grid(*twelve(), make_cell(None, None, name="l0+2-h1+3-n5+32")),
    "single": make_grid(make_cell(1.0, 1.0)),
    "holes": make_grid(make_cell(1.0, 1.0), make_cell(0.5, 0.5, 0.4, 1.0)),
    "equal-scores": make_grid(make_cell(1.0, 1.0), make_cell(0.5, 0.5, 0.5, 1.0)),
    "six-depths": make_grid(*(make_cell(1.0, d / 10, d / 10, d) for d in range(10, 4, -1))),
    "zero-scores": make_grid(make_cell(1.0, 1.0, 0.0), make_cell(0.5, 1.0, 0.0)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_report_loads_nothing_and_is_well_formed(name: str, tmp_path: Path) -> None:
    html, page = render(GRIDS[name], tmp_path)
    assert not re.search(r"https?:|//\w|@import|url\(|<script|<link|<img|<iframe|\bon\w+=", html)
    assert not any({"src", "href", "xlink:href"} & set(a) for _, a in page.tags)
    assert "prefers-color-scheme: dark" in html
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    assert "nan" not in html.lower()
    assert len(page.classes("point")) >= len(GRIDS[name].cells)


def test_every_number_is_there(tmp_path: Path) -> None:
    grid = make_grid()
    html, page = render(grid, tmp_path)
    text = " ".join(page.text)
    heat = re.findall(r'<td(?: class="high")? style="--share:([\d.]+)%"><b>([\d.]+)</b>', html)
    assert len(heat) == 12
    shares = {score: float(share) for share, score in heat}
    assert shares[f"{100 * max(c.metrics['accuracy'] for c in grid.cells):.1f}"] == 100
    assert shares[f"{100 * min(c.metrics['accuracy'] for c in grid.cells):.1f}"] == 0
    for cell in grid.cells:
        assert cell.subnet in text
        assert f"{100 * cell.metrics['accuracy']:.1f}" in text
    for fact in ("Some CPU", "2.13.0", "1,200 examples", "34,000 tokens", "20 forward passes"):
        assert fact in text
    assert "64 random tokens" in text


def test_report_marks_the_front(tmp_path: Path) -> None:
    dominated = make_cell(0.5, 1.0, 0.3, 9.0)
    _, page = render(make_grid(make_cell(1.0, 1.0, 0.9, 8.0), dominated), tmp_path)
    filled = [a for a in page.classes("point") if "front" in (a["class"] or "").split()]
    assert len(filled) == 1
    assert len([a for tag, a in page.tags if tag == "tr" and a.get("class") == "front"]) == 1


def test_missing_cells_are_dashes_and_explicit_ones_have_no_heat_map(tmp_path: Path) -> None:
    _, page = render(GRIDS["holes"], tmp_path)
    assert len(page.classes("none")) == 2
    html, page = render(GRIDS["explicit"], tmp_path)
    assert not page.classes("heat")
    assert "explicit extents" in html


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"'"
    cell = Cell(evil, None, None, {evil: 0.5}, 10**7, 10**9, Latency(1.0, 1.0, 1.0))
    full = Cell("w", 1.0, 1.0, {evil: 0.5}, 10**7, 10**9, Latency(1.0, 1.0, 1.0))
    grid = make_grid(
        full, cell, model=evil, task=evil, metric=evil, environment={"device": evil, evil: evil}
    )
    html, page = render(grid, tmp_path)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert not any(tag == "script" for tag, _ in page.tags)
    shown = "".join(page.text)
    assert shown.count(evil) >= 6


def test_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(make_grid(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def highlights(grid: Grid, folder: Path) -> list[tuple[str, str]]:
    html, _ = render(grid, folder)
    return re.findall(r'class="what">([^<]+)<.*?<code>([^<]+)<', html, flags=re.DOTALL)


def test_highlights(tmp_path: Path) -> None:
    cells = (
        make_cell(1.0, 1.0, 0.90, 10.0),
        make_cell(0.75, 1.0, 0.89, 7.0),
        make_cell(0.5, 1.0, 0.88, 5.0),
    )
    assert highlights(make_grid(*cells), tmp_path) == [
        ("Whole model", "w1.00-d1.00"),
        ("Fastest within one point of it", "w0.75-d1.00"),
        ("Fastest", "w0.50-d1.00"),
    ]
    assert highlights(make_grid(*cells[:1]), tmp_path) == [("Whole model", "w1.00-d1.00")]
    assert highlights(make_grid(*cells[1:]), tmp_path) == [("Fastest", "w0.50-d1.00")]


# --- layout --------------------------------------------------------------------------------------

AXES = [
    pytest.param(0.0, 200.0, ["0", "50", "100", "150", "200"], id="hundreds"),
    pytest.param(89.7, 93.6, ["90", "91", "92", "93"], id="percent"),
    pytest.param(0.0, 11.0, ["0.0", "2.5", "5.0", "7.5", "10.0"], id="halves"),
    pytest.param(-0.25, 0.2, ["-0.2", "-0.1", "0.0", "0.1", "0.2"], id="negative"),
    pytest.param(0.0101, 0.0109, ["0.0102", "0.0104", "0.0106", "0.0108"], id="small"),
]


@pytest.mark.parametrize(("low", "high", "texts"), AXES)
def test_ticks_are_round_and_inside(low: float, high: float, texts: list[str]) -> None:
    axis = _axis(low, high)
    assert [_tick_text(axis, tick) for tick in axis.ticks] == texts
    assert axis.at(low) == 0
    assert axis.at(high) == 100
    assert axis.at(high + 1) == 100
    assert axis.from_top(low) == 100


def test_time_starts_at_zero_unless_all_are_close() -> None:
    def low(*medians: float) -> float:
        return _time_axis([Latency(ms, ms, ms) for ms in medians]).low

    assert low(10.0, 4.0) == 0
    assert low(10.0) == 0
    assert 8.0 < low(10.0, 9.0) < 9.0


def test_one_slow_pass_does_not_squeeze_the_plot() -> None:
    axis = _time_axis([Latency(10.0, 9.0, 900.0), Latency(2.0, 1.0, 3.0)])
    assert axis.high < 14


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("width", [270, 460])
def test_labels_cover_neither_markers_nor_each_other(name: str, width: int) -> None:
    plot = _plot(GRIDS[name])
    placed = _place_labels(plot.points, width)
    boxes = []
    for point, spot in placed:
        x, y = point.x / 100 * width + spot.dx, point.y / 100 * plot.height + spot.dy
        text = 6 * len(point.name)
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[spot.anchor] * text
        boxes.append((left, y - 9, left + text, y + 2))
    boxes += [
        (px - 4, py - 4, px + 4, py + 4)
        for px, py in ((p.x / 100 * width, p.y / 100 * plot.height) for p in plot.points)
    ]
    for i, a in enumerate(boxes):
        assert a[0] >= -5
        assert a[2] <= width + 12
        for b in boxes[:i]:
            markers = a[2] - a[0] == b[2] - b[0] == 8
            assert markers or not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_labels_stay_inside_the_plot() -> None:
    # At the right end, where every spot above, below or to the right would stick out.
    slow = make_cell(None, None, 0.5, 1000.0, name="a-long-name-xx")
    plot = _plot(make_grid(slow, make_cell(1.0, 1.0, 0.4, 1.0)))
    assert plot.points[0].x > 90
    for labels in plot.labels.values():
        assert [spot.anchor for point, spot in labels if point.cell is slow] == ["end"]


def test_the_front_is_a_staircase_from_the_bottom_to_the_right() -> None:
    cells = (make_cell(1.0, 1.0, 0.9, 8.0), make_cell(0.5, 1.0, 0.5, 2.0))
    slow, fast = _plot(make_grid(*cells)).points
    assert _plot(make_grid(*cells)).front == (
        (fast.x, 100.0, fast.x, fast.y),
        (fast.x, fast.y, slow.x, fast.y),
        (slow.x, fast.y, slow.x, slow.y),
        (slow.x, slow.y, 100.0, slow.y),
    )


def test_the_front_is_labelled_first() -> None:
    # All in one place: there is room for one name on each side only.
    crowd = [make_cell(0.5, 1.0, 0.5, 5.0 + i / 1000, name=f"n{i}") for i in range(30)]
    grid = make_grid(make_cell(1.0, 0.5, 0.1, 50.0), *reversed(crowd))
    plot = _plot(grid)
    labels = plot.labels["narrow"]
    assert len(labels) < len(plot.points)
    assert labels[0][0].front


def test_more_depths_than_markers_are_named_in_full() -> None:
    plot = _plot(GRIDS["six-depths"])
    assert {point.marker for point in plot.points} == {0}
    assert plot.points[0].name == "w1.00-d1.00"
    assert plot.legend == ((0, "width and depth"),)
    assert _plot(GRIDS["grid"]).points[0].name == "w1"
    assert [text for _, text in _plot(GRIDS["mixed"]).legend] == [
        "depth 1",
        "depth 0.75",
        "depth 0.5",
        "explicit extents",
    ]
