"""The HTML report: one well-formed file, fetches nothing, escapes all, shows what counts."""

import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tuner.config import TuningConfig
from tuner.criteria import AccuracyGoal
from tuner.errors import SaveError
from tuner.plan import Plan
from tuner.report import text
from tuner.report.page import render
from tuner.report.scatter import Scatter, scatter
from tuner.results import OpSummary, TrialRecord, TuningResult
from tuner.schemes import OpConfig, TensorScheme

EVIL = "<script>alert('x')</script>&\""
VOID = {"meta", "line", "path", "circle"}
W4A8 = OpConfig(weight=TensorScheme(format="int4"), inputs=TensorScheme(format="uint8"))


class _Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def _record(number: int, accuracy: float | None, bops: float, met: bool | None) -> TrialRecord:
    config = OpConfig.float() if number == 0 else W4A8
    return TrialRecord(
        number=number,
        plan=Plan({"conv": config, "fc": config}),
        accuracy=accuracy,
        metrics={},
        costs={"size_bytes": bops * 2**10, "bops": bops},
        meets_goal=met,
        state="complete" if accuracy is not None else "failed",
        duration_s=1.5,
        reason=f"why {number}",
        error=None if accuracy is not None else f"Traceback\nRuntimeError: {EVIL}",
    )


def _op(name: str, choice: str, parameters: int = 216) -> OpSummary:
    return OpSummary(
        name, "Conv2d", (8, 3, 3, 3), parameters, 7.5e5, choice, 1e-4, 108.0, 6e7, 0.25
    )


BASELINE = _record(0, 0.9, 1000.0, True)
TRIALS = (
    _record(1, 0.899, 62.5, True),
    _record(2, 0.3, 15.0, False),
    _record(3, 0.895, 31.25, True),
    _record(4, None, 20.0, None),
)
OPS = (_op("conv", "W4A8"), _op("fc", "FP32"), _op("conv/matmul:0", "A8/A4", parameters=0))


def _result(**changes: Any) -> TuningResult:
    arguments: dict[str, Any] = {
        "config": TuningConfig(),
        "baseline_trial": BASELINE,
        "best": TRIALS[2],
        "trials": TRIALS,
        "stop_reason": "max_trials",
        "evaluations": 5,
        "op_table": OPS,
        "uncovered": {"fft:0": 2.5e5},
        "unreached": ("aux.head",),
        "duration_s": 75.0,
        "eval_s": 7.25,
    }
    return TuningResult(**arguments | changes)


def _plot(result: TuningResult) -> Scatter:
    plot = scatter(result)
    assert plot is not None
    return plot


def test_it_shows_what_counts() -> None:
    words = _Page(render(_result())).words
    for part in (
        *("goal met", "The goal is met at 3.12 % of FP32's bit operations"),
        *("accuracy ≥ 0.891", "the budget of trials was used up", "2 of 2", "0.895", "why 3"),
        *("31.2 KiB of 1000 KiB", "1 min 15 s, 7.2 s in eval_func"),
        *("fft:0 250 k MACs", "They hold 10 % of the model's MACs", "aux.head", "conv/matmul:0"),
    ):
        assert part in words


def test_it_fetches_nothing_and_forbids_it() -> None:
    html = render(_result())
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import", html)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes


def test_everything_is_escaped() -> None:
    trial = replace(TRIALS[2], reason=EVIL)
    result = _result(
        config=TuningConfig(goal=AccuracyGoal(metric=EVIL), target=EVIL),
        best=trial,
        trials=(*TRIALS[:2], trial, TRIALS[3]),
        op_table=(_op(EVIL, f"W4A8{EVIL}"),),
        uncovered={EVIL: 1.0},
        unreached=(EVIL,),
    )
    page = _Page(render(result))
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 6


def test_the_bit_map_gives_weight_and_input_bits_of_every_op() -> None:
    html = render(_result())
    rows = re.findall(r'<tr>\s*<td class="name mono">.*?</tr>', html, flags=re.DOTALL)
    chips = [re.findall(r'class="chip (b\d+)"[^>]*>(\d+)<', row) for row in rows]
    assert chips == [[("b4", "4"), ("b8", "8")], [("b32", "32"), ("b32", "32")], [("b8", "8")]]


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({"best": TRIALS[1]}, "The goal was not met"),
        ({"best": BASELINE}, "Only the FP32 model meets the goal: nothing was quantized"),
        (
            {
                "best": replace(TRIALS[0], accuracy=None, meets_goal=None),
                "baseline_trial": replace(BASELINE, accuracy=None, meets_goal=None),
                "trials": (),
                "stop_reason": "no_eval_func",
            },
            "Quantized by calibration alone: the accuracy was not measured",
        ),
    ],
)
def test_other_outcomes_say_so(changes: dict[str, Any], headline: str) -> None:
    page = _Page(render(_result(**changes)))
    assert headline in page.words


def test_nothing_measured_has_no_plot() -> None:
    silent = replace(BASELINE, accuracy=None, meets_goal=None)
    result = _result(baseline_trial=silent, best=silent, trials=(), op_table=(), uncovered={})
    assert scatter(result) is None
    assert "Accuracy against" not in _Page(render(result)).words


@pytest.mark.parametrize("reason", ["goal_met_and_minimal", "timeout", "exhausted", "cancelled"])
def test_every_stop_reason_reads(reason: str) -> None:
    assert "The search stopped because " in _Page(render(_result(stop_reason=reason))).words


@pytest.mark.parametrize("objective", ["size", "bops"])
def test_cheaper_lies_left_and_better_lies_above(objective: str) -> None:
    points = {
        point.title.partition(":")[0]: point
        for point in _plot(_result(config=TuningConfig(objective=objective))).points
    }
    assert set(points) == {"FP32", "Trial 1", "Trial 2", "Trial 3"}
    assert points["Trial 3"].x < points["Trial 1"].x < points["FP32"].x
    assert points["FP32"].y < points["Trial 1"].y < points["Trial 3"].y
    assert points["Trial 3"].kind == "best"
    assert points["FP32"].kind == "baseline"
    assert [p.clipped for p in points.values()] == [p.kind == "missed" for p in points.values()]


def test_the_goal_line_parts_what_meets_from_what_misses() -> None:
    near = _record(5, 0.8905, 25.0, False)
    plot = _plot(_result(trials=(*TRIALS, near)))
    assert plot.goal_y is not None
    above = {point.kind for point in plot.points if point.y < plot.goal_y}
    below = {point.kind for point in plot.points if point.y > plot.goal_y}
    assert above == {"met", "best", "baseline"}
    assert below == {"missed"}


@pytest.mark.parametrize(
    ("goal", "baseline", "accuracies"),
    [
        (AccuracyGoal(), 0.0, [0.0, 0.0]),
        (AccuracyGoal(), -3.0, [-3.01, -9.0]),
        (AccuracyGoal(higher_is_better=False), 20.0, [20.1, 5000.0]),
        (AccuracyGoal(at_least=0.99), 0.5, [0.4, 0.3]),
        (AccuracyGoal(at_most=3.0), 2.0, [2.5, 1e9]),
        (AccuracyGoal(), 1e-12, [1e-12, 2e-12]),
        (AccuracyGoal(max_drop=0), 0.7, [0.7, 0.7]),
        (AccuracyGoal(), 1e12, [1e12, math.nan]),
        (AccuracyGoal(), 1e308, [-1e308, 1.7e308]),
        (AccuracyGoal(higher_is_better=False), 1.7e308, [1.7e308, -1.7e308]),
    ],
)
def test_any_metric_stays_inside_the_plot(
    goal: AccuracyGoal, baseline: float, accuracies: list[float]
) -> None:
    trials = tuple(
        _record(i, accuracy, 500.0 / i, goal.meets(accuracy, baseline))
        for i, accuracy in enumerate(accuracies, start=1)
    )
    result = _result(
        config=TuningConfig(goal=goal),
        baseline_trial=_record(0, baseline, 1000.0, goal.meets(baseline, baseline)),
        best=trials[0],
        trials=trials,
    )
    plot = _plot(result)
    assert 2 <= len(plot.y_ticks) <= 8
    assert len({tick.label for tick in plot.y_ticks}) == len(plot.y_ticks)
    assert len(plot.x_ticks) >= 2
    for point in plot.points:
        assert plot.left <= point.x <= plot.right
        assert plot.top <= point.y <= plot.bottom
    _Page(render(result))


def test_only_the_baseline_can_be_drawn() -> None:
    result = _result(best=BASELINE, trials=())
    assert len(_plot(result).points) == 1
    _Page(render(result))


def test_an_infinite_damage_is_shown() -> None:
    ops = (replace(OPS[0], predicted_damage=math.inf), replace(OPS[1], predicted_damage=math.nan))
    assert "inf" in _Page(render(_result(op_table=ops))).words


def test_writing_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    result = _result()
    assert result.report(str(path)) == path
    assert path.read_text(encoding="utf-8") == render(result)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize("name", ["missing/report.html", "folder", "file/report.html"])
def test_a_path_that_cannot_be_written_is_a_save_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SaveError, match="cannot be written"):
        _result().report(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.percent(0.0625), "6.25 %"),
        (text.percent(12.0), "1200 %"),
        (text.percent(None), "–"),
        (text.count(1.234e9), "1.23 G"),
        (text.count(12), "12"),
        (text.size(1536), "1.5 KiB"),
        (text.size(100), "100 B"),
        (text.size(1023.9 * 2**20), "1024 MiB"),
        (text.seconds(0.123), "0.12 s"),
        (text.seconds(59.99), "1 min 0 s"),
        (text.seconds(3725), "1 h 2 min"),
        (text.shape((64, 3)), "64×3"),
        (text.shape(()), "–"),
        (text.number(0.98765432), "0.98765"),
    ],
)
def test_numbers_read(shown: str, expected: str) -> None:
    assert shown == expected


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
