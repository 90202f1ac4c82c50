"""Plots beside the report's own: the history of a search, and two searches in one plot."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from server.dashboard.searches import Search
from tuner.records import TrialRecord
from tuner.report.axes import Axis, Tick, linear_ticks, log_ticks
from tuner.report.scatter import accuracy_axis, cost_axis
from tuner.report.text import number, percent
from tuner.results import TuningResult

WIDTH, LEFT, RIGHT = 720.0, 76.0, 28.0
_ACCURACY_TOP, _ACCURACY_BOTTOM = 26.0, 176.0
_COST_TOP, _COST_BOTTOM = 222.0, 344.0
_HISTORY_HEIGHT = 400.0
_HEIGHT, _TOP, _BOTTOM = 400.0, 20.0, 344.0
_MARGIN = 0.08
_SHARE_BELOW = 2.5


@dataclass(frozen=True)
class Dot:
    """One trial in a plot."""

    number: int
    x: float
    y: float
    kind: str
    title: str
    clipped: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot over trial numbers; `step` is the best so far, `level` a goal or FP32."""

    title: str
    ticks: tuple[Tick, ...]
    top: float
    bottom: float
    dots: tuple[Dot, ...]
    step: str
    level: float | None = None


@dataclass(frozen=True)
class History:
    """Accuracy and cost by trial number, one above the other."""

    panels: tuple[Panel, ...]
    x_ticks: tuple[Tick, ...]
    width: float = WIDTH
    height: float = _HISTORY_HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    bottom: float = _COST_BOTTOM


@dataclass(frozen=True)
class Contrast:
    """Two searches in one plot: cost against accuracy, both ÷ that of their own FP32."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    dots: tuple[Dot, ...]
    fronts: tuple[tuple[str, str], ...]
    width: float = WIDTH
    height: float = _HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM


def history(search: Search) -> History | None:
    """Return the history of a search; None before its first trial."""
    source = search.source()
    if source is None or source.baseline is None or not source.trials:
        return None
    last = search.trials[-1].number
    x = Axis(0, max(last, 2) + 0.5, LEFT, WIDTH - RIGHT)
    return History(
        panels=(_accuracy_panel(source, x), _cost_panel(search, source, x)),
        x_ticks=_whole_ticks(x),
    )


def _whole_ticks(axis: Axis) -> tuple[Tick, ...]:
    return tuple(tick for tick in linear_ticks(axis) if float(tick.label).is_integer())


def _accuracy_panel(source: TuningResult, x: Axis) -> Panel:
    assert source.baseline is not None
    known = [(t, t.accuracy) for t in source.trials if _is_finite(t.accuracy)]
    accuracies = [source.baseline, *(value for _, value in known if value is not None)]
    y = accuracy_axis(source.goal, source.baseline, accuracies, _ACCURACY_BOTTOM, _ACCURACY_TOP)
    threshold = source.goal.threshold(source.baseline)
    dots = [
        Dot(
            number=trial.number,
            x=x.at(trial.number),
            y=y.at(value),
            kind=_kind(trial, source.best),
            title=f"Trial {trial.number}: {number(value)}",
            clipped=not y.holds(value),
        )
        for trial, value in known
        if value is not None
    ]
    return Panel(
        title=source.goal.metric or "accuracy",
        ticks=linear_ticks(y),
        top=_ACCURACY_TOP,
        bottom=_ACCURACY_BOTTOM,
        dots=tuple(dots),
        step="",
        level=y.at(threshold) if y.holds(threshold) else None,
    )


def _cost_panel(search: Search, source: TuningResult, x: Axis) -> Panel:
    ratios = {t.number: ratio for t in search.trials if (ratio := search.cost_ratio(t))}
    y = cost_axis([1.0, *ratios.values()])
    y = Axis(y.low, y.high, _COST_BOTTOM, _COST_TOP, log=True)
    dots = [
        Dot(
            number=trial.number,
            x=x.at(trial.number),
            y=y.at(ratios[trial.number]),
            kind=_kind(trial, source.best),
            title=f"Trial {trial.number}: {percent(ratios[trial.number])} of FP32",
        )
        for trial in source.trials
        if trial.number in ratios
    ]
    step, before = f"M{x.at(0):.1f} {y.at(1.0):.1f}", 0
    for trial, best in search.bests().items():
        if best != before:
            step += f" H{x.at(trial):.1f} V{y.at(ratios[best]):.1f}"
        before = best
    step += f" H{x.at(search.trials[-1].number):.1f}"
    ticks = log_ticks(y, percent)
    return Panel("cost, % of FP32", ticks, _COST_TOP, _COST_BOTTOM, tuple(dots), step)


def contrast(a: Search, b: Search, cost: str) -> Contrast | None:
    """Return two searches in one plot; None unless both have a baseline other than 0."""
    sources = {"a": a.source(), "b": b.source()}
    found = {
        key: _shares(source, cost) for key, source in sources.items() if source and source.baseline
    }
    if len(found) < 2:
        return None
    every = [pair for pairs in found.values() for pair in pairs]
    x = cost_axis([ratio for _, ratio, _ in every])
    y = _share_axis([share for _, _, share in every])
    return Contrast(
        x_ticks=log_ticks(x, percent),
        y_ticks=tuple(Tick(t.position, f"{float(t.label) * 100:.4g} %") for t in linear_ticks(y)),
        dots=tuple(_contrast_dots(found, x, y)),
        fronts=tuple((key, _front(sources[key], found[key], x, y)) for key in found),
    )


_Shares = list[tuple[TrialRecord, float, float]]


def _shares(source: TuningResult, cost: str) -> _Shares:
    """Return the evaluated records with cost and accuracy ÷ those of FP32."""
    assert source.baseline
    found = []
    for record in (source.baseline_trial, *source.trials):
        ratio = source.cost_ratio(record, cost)
        if ratio and record.state == "complete" and _is_finite(record.accuracy):
            assert record.accuracy is not None
            found.append((record, ratio, record.accuracy / source.baseline))
    return found


def _share_axis(shares: list[float]) -> Axis:
    """Return an axis around 100 %; what collapsed must not flatten the rest."""
    near = sorted(abs(share - 1) for share in shares)
    span = max(_SHARE_BELOW * near[len(near) // 2], 0.02)
    low, high = max(min(shares), 1 - span), min(max(shares), 1 + span)
    margin = _MARGIN * max(high - low, 0.005)
    return Axis(low - margin, high + margin, _BOTTOM, _TOP)


def _contrast_dots(found: dict[str, _Shares], x: Axis, y: Axis) -> Iterable[Dot]:
    for key, shares in found.items():
        for record, ratio, share in shares:
            who = "FP32" if record.number == 0 else f"trial {record.number}"
            yield Dot(
                number=record.number,
                x=x.at(ratio),
                y=y.at(share),
                kind=f"{key} {'missed' if record.meets_goal is False else 'met'}",
                title=f"{key.upper()}, {who}: {number(record.accuracy)} at {percent(ratio)}",
                clipped=not y.holds(share),
            )


def _front(source: TuningResult | None, shares: _Shares, x: Axis, y: Axis) -> str:
    """Return the Pareto front as an SVG path: each accuracy holds until a dearer plan beats it."""
    assert source is not None
    path, best = "", None
    for record, ratio, share in sorted(shares, key=lambda found: found[1]):
        assert record.accuracy is not None
        if best is None or source.goal.better(record.accuracy, best):
            best = record.accuracy
            here = (x.at(ratio), y.at(share))
            path += f" H{here[0]:.1f} V{here[1]:.1f}" if path else f"M{here[0]:.1f} {here[1]:.1f}"
    return path


def _kind(record: TrialRecord, best: TrialRecord) -> str:
    if record.number == best.number:
        return "best"
    return "met" if record.meets_goal else "missed"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
