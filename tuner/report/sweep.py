"""The plot of a sweep: the metric against bits, as one self-contained SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, StrictUndefined

from tuner.report.axes import Axis, Tick, linear_ticks, padded_axis
from tuner.report.files import write_whole
from tuner.report.text import number, percent

_TEMPLATE = "sweep.svg"
WIDTH, HEIGHT = 760.0, 440.0
LEFT, RIGHT, TOP, BOTTOM = 72.0, 104.0, 44.0, 58.0
_PARTS = {"weights": "weights only", "inputs": "inputs only", "both": "weights and inputs"}
_BETWEEN_WIDTHS = 1.6
"""How far apart formats of different widths sit, in units of two of the same width."""
_SIDEWAYS = 0.16
"""How far to the side of its format's place a part is drawn, so that equal scores can be seen."""
_PIXELS_SIDEWAYS = 8.0
_MARGIN = 0.06
_LETTER = 6.3
"""About how wide a letter of a label is."""
_SLANTED_HEIGHT = 44.0


class Row(Protocol):
    """What the plot reads of an evaluation."""

    @property
    def format(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def part(self) -> str: ...
    @property
    def accuracy(self) -> float | None: ...
    @property
    def drop(self) -> float | None: ...


class SweepSource(Protocol):
    """What the plot reads of a sweep."""

    @property
    def baseline(self) -> float: ...
    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def metric(self) -> str: ...


@dataclass(frozen=True)
class Dot:
    """One evaluation; one that failed is drawn as a cross at the bottom."""

    x: float
    y: float
    part: str
    title: str
    failed: bool


@dataclass(frozen=True)
class Label:
    """The name of a format, above the highest of its dots."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Width:
    """All formats of one width, on the bits axis."""

    bits: int
    start: float
    end: float


@dataclass(frozen=True)
class SweepPlot:
    """The plot in SVG units. `lines` maps a part to an SVG path through its dots."""

    widths: tuple[Width, ...]
    y_ticks: tuple[Tick, ...]
    dots: tuple[Dot, ...]
    labels: tuple[Label, ...]
    slanted: bool
    lines: dict[str, str]
    fp32_y: float
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def write(source: SweepSource, path: str | Path) -> Path:
    """Write the plot to `path`, whole or not at all; raises SaveError where it cannot."""
    return write_whole("the plot", path, render(source))


def render(source: SweepSource) -> str:
    """Return the plot as SVG."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    template = environment.from_string((files(__package__) / _TEMPLATE).read_text("utf-8"))
    parts = {name: words for name, words in _PARTS.items() if name in {r.part for r in source.rows}}
    return template.render(plot=sweep_plot(source), source=source, parts=parts)


def sweep_plot(source: SweepSource) -> SweepPlot:
    """Return where everything sits."""
    places = _places(source.rows)
    step = (WIDTH - RIGHT - LEFT) / max(len(places), 2)
    if places:
        x_axis = Axis(min(places.values()) - 1, max(places.values()) + 1, LEFT, WIDTH - RIGHT)
        step = x_axis.at(1) - x_axis.at(0)
        places = {slot: x_axis.at(place) for slot, place in places.items()}
    slanted = step < _LETTER * max((len(name) for _, name in places), default=0)
    y_axis = _metric_axis(source, TOP + (_SLANTED_HEIGHT if slanted else 0.0))
    aside = min(_SIDEWAYS * step, _PIXELS_SIDEWAYS)
    dots = {row: _dot(row, places[_slot(row)] + aside * _side(row), y_axis) for row in source.rows}
    return SweepPlot(
        widths=_widths(places),
        y_ticks=linear_ticks(y_axis),
        dots=tuple(dots.values()),
        labels=_labels(dots, places),
        slanted=slanted,
        lines={part: _line(dots, part) for part in _PARTS},
        fp32_y=y_axis.at(source.baseline),
    )


def _slot(row: Row) -> tuple[int, str]:
    return row.bits, row.format


def _side(row: Row) -> int:
    return list(_PARTS).index(row.part) - 1


def _places(rows: Sequence[Row]) -> dict[tuple[int, str], float]:
    """Return where each format sits, in order of bits: those of one width side by side."""
    places: dict[tuple[int, str], float] = {}
    at, before = 0.0, None
    for slot in sorted(dict.fromkeys(map(_slot, rows)), key=lambda slot: slot[0]):
        if before is not None:
            at += 1.0 if slot[0] == before else _BETWEEN_WIDTHS
        places[slot], before = at, slot[0]
    return places


def _widths(places: dict[tuple[int, str], float]) -> tuple[Width, ...]:
    xs: dict[int, list[float]] = {}
    for (bits, _), x in places.items():
        xs.setdefault(bits, []).append(x)
    return tuple(Width(bits, min(found), max(found)) for bits, found in xs.items())


def _metric_axis(source: SweepSource, top: float) -> Axis:
    scores = [source.baseline, *(r.accuracy for r in source.rows if r.accuracy is not None)]
    low, high = min(scores), max(scores)
    margin = 2 * _MARGIN * (high / 2 - low / 2) or abs(high) * 0.01 or 1.0
    return padded_axis(low, high, margin, HEIGHT - BOTTOM, top)


def _dot(row: Row, x: float, axis: Axis) -> Dot:
    words = f"{row.format}, {_PARTS[row.part]}: "
    if row.accuracy is None:
        return Dot(x, axis.start, row.part, f"{words}failed", failed=True)
    drop = "" if row.drop is None else f", a drop of {percent(row.drop)}"
    return Dot(x, axis.at(row.accuracy), row.part, f"{words}{number(row.accuracy)}{drop}", False)


def _labels(dots: dict[Row, Dot], places: dict[tuple[int, str], float]) -> tuple[Label, ...]:
    """Return the name of every format, above the highest of its dots."""
    tops: dict[tuple[int, str], float] = {}
    for row, dot in dots.items():
        tops[_slot(row)] = min(dot.y, tops.get(_slot(row), dot.y))
    return tuple(Label(places[slot], y, slot[1]) for slot, y in tops.items())


def _line(dots: dict[Row, Dot], part: str) -> str:
    """Return an SVG path through the first format of every width, those that failed left out."""
    first: dict[int, Dot] = {}
    for row, dot in dots.items():
        if row.part == part:
            first.setdefault(row.bits, dot)
    ordered = [first[bits] for bits in sorted(first) if not first[bits].failed]
    return "M" + " L".join(f"{dot.x:.1f} {dot.y:.1f}" for dot in ordered) if ordered else ""
