"""Where everything sits in the accuracy-against-cost plot."""

import math
from dataclasses import dataclass

from tuner.criteria import AccuracyGoal
from tuner.records import TrialRecord
from tuner.report.axes import Axis, Tick, linear_ticks, log_ticks, padded_axis
from tuner.report.source import ReportSource
from tuner.report.text import number, percent

WIDTH, HEIGHT = 720.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 28.0, 20.0, 56.0
_BELOW_GOAL = 2.5
_MARGIN = 0.08


@dataclass(frozen=True)
class Point:
    """One evaluated plan; a `clipped` one lies beyond the accuracy axis, drawn at its end."""

    number: int
    x: float
    y: float
    kind: str
    title: str
    clipped: bool


@dataclass(frozen=True)
class Scatter:
    """The plot in SVG units: x is the cost ÷ FP32's on a log axis, y the accuracy."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: tuple[Point, ...]
    front: str
    goal_y: float | None
    goal_label: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def scatter(source: ReportSource) -> Scatter | None:
    """Return the plot of all evaluated plans, or None where nothing was evaluated."""
    records = _plottable(source)
    baseline = source.baseline_trial.accuracy
    if baseline is None or not records:
        return None
    x_axis = cost_axis([ratio for _, ratio, _ in records])
    accuracies = [accuracy for _, _, accuracy in records]
    y_axis = accuracy_axis(source.goal, baseline, accuracies, HEIGHT - BOTTOM, TOP)
    threshold = source.goal.threshold(baseline)
    points = tuple(
        Point(
            number=record.number,
            x=x_axis.at(ratio),
            y=y_axis.at(accuracy),
            kind=_kind(source, record),
            title=_title(source, record, ratio, accuracy),
            clipped=not y_axis.holds(accuracy),
        )
        for record, ratio, accuracy in records
    )
    return Scatter(
        x_ticks=log_ticks(x_axis, percent),
        y_ticks=linear_ticks(y_axis),
        points=tuple(sorted(points, key=lambda p: _DRAWN.index(p.kind))),
        front=_front(source, x_axis, y_axis),
        goal_y=y_axis.at(threshold) if y_axis.holds(threshold) else None,
        goal_label=f"goal {'≥' if source.goal.prefers_higher else '≤'} {number(threshold)}",
    )


_DRAWN = ("missed", "met", "baseline", "best")


def _plottable(source: ReportSource) -> list[tuple[TrialRecord, float, float]]:
    found = []
    for record in (source.baseline_trial, *source.trials):
        ratio = source.cost_ratio(record)
        accuracy = record.accuracy
        if record.state != "failed" and ratio and accuracy is not None and math.isfinite(accuracy):
            found.append((record, ratio, accuracy))
    return found


def cost_axis(ratios: list[float]) -> Axis:
    """Return an axis that holds these costs ÷ FP32's."""
    low, high = math.log10(min(ratios)), math.log10(max(ratios))
    margin = max(_MARGIN * (high - low), 0.05)
    return Axis(low - margin, high + margin, LEFT, WIDTH - RIGHT, log=True)


def accuracy_axis(
    goal: AccuracyGoal, baseline: float, accuracies: list[float], start: float, end: float
) -> Axis:
    """Return an axis around baseline and goal; plans that collapsed must not flatten the rest."""
    threshold = goal.threshold(baseline)
    good = [a for a in accuracies if goal.meets(a, baseline)]
    near = [baseline, threshold, *good]
    span = max(near) - min(near) or abs(baseline) * 0.01 or 1.0
    low, high = min(near), max(near)
    if goal.prefers_higher:
        low = max(min([*accuracies, low]), low - _BELOW_GOAL * span)
    else:
        high = min(max([*accuracies, high]), high + _BELOW_GOAL * span)
    margin = _MARGIN * max(high - low, span)
    return padded_axis(low, high, margin, start, end)


def _kind(source: ReportSource, record: TrialRecord) -> str:
    if record.number == source.best.number:
        return "best"
    if record.number == source.baseline_trial.number:
        return "baseline"
    return "met" if record.meets_goal else "missed"


def _title(source: ReportSource, record: TrialRecord, ratio: float, accuracy: float) -> str:
    who = "FP32" if record.number == source.baseline_trial.number else f"Trial {record.number}"
    text = f"{who}: {number(accuracy)} at {percent(ratio)} of FP32's {source.config.objective}"
    return f"{text} · {record.reason}" if record.reason else text


def _front(source: ReportSource, x_axis: Axis, y_axis: Axis) -> str:
    """Return the front as an SVG path: each accuracy holds until a dearer plan beats it."""
    path = ""
    for record in source.pareto():
        ratio = source.cost_ratio(record)
        if not ratio or record.accuracy is None:
            continue
        x, y = x_axis.at(ratio), y_axis.at(record.accuracy)
        path += f" H{x:.1f} V{y:.1f}" if path else f"M{x:.1f} {y:.1f}"
    return path
