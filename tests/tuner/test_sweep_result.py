"""What a sweep found, as JSON, as a table and as a plot."""

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuner import AccuracyGoal
from tuner.errors import SaveError
from tuner.report.sweep import sweep_plot
from tuner.sweep import SweepResult, SweepRow

SVG = "{http://www.w3.org/2000/svg}"


def row(name: str, bits: int, part: Any, accuracy: float | None, **fields: Any) -> SweepRow:
    drop = None if accuracy is None else (0.9 - accuracy) / 0.9
    error = "Traceback\nValueError: x <&" if accuracy is None else None
    return SweepRow(name, bits, part, accuracy, drop, error=error, **fields)


RESULT = SweepResult(
    0.9,
    (
        row("int8", 8, "weights", 0.9, metrics={"top5": 0.99, "odd": math.inf}),
        row("int8", 8, "inputs", 0.9),
        row("int8", 8, "both", 0.9),
        row("<mx&4>", 4, "weights", 0.81),
        row("<mx&4>", 4, "inputs", None),
        row("<mx&4>", 4, "both", 0.45),
        row("int4", 4, "weights", 0.85),
        row("int2", 2, "weights", 0.1),
        row("int2", 2, "both", 0.1),
    ),
    AccuracyGoal(metric="top1"),
)


def test_json_round_trip() -> None:
    text = json.dumps(RESULT.to_dict(), allow_nan=False)
    assert SweepResult.from_dict(json.loads(text)) == RESULT
    bad: list[Any] = [{}, {"version": 2}, [], {**RESULT.to_dict(), "rows": [{"part": 3}]}]
    for data in bad:
        with pytest.raises(SaveError):
            SweepResult.from_dict(data)


@pytest.mark.parametrize(
    "fields",
    [
        {"part": "all"},
        {"format": 8},
        {"bits": "eight"},
        {"accuracy": "nan"},
        {"drop": "x"},
        {"error": 3},
        {"colour": "red"},
    ],
    ids=str,
)
def test_rows_that_are_none_are_refused(fields: dict[str, Any]) -> None:
    data = RESULT.to_dict()
    data["rows"][0] |= fields
    with pytest.raises(SaveError, match="not a sweep"):
        SweepResult.from_dict(data)


def test_a_drop_from_next_to_nothing_is_strict_json() -> None:
    result = SweepResult(1e-320, (SweepRow("int8", 8, "both", -1.0, math.inf),))
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert SweepResult.from_dict(json.loads(text)) == result
    assert "inf" in result.summary()


def test_the_summary_is_a_table() -> None:
    lines = RESULT.summary().splitlines()
    assert lines[0].split() == ["format", "bits", "weights", "inputs", "both"]
    assert lines[1].split() == ["FP32", "32", "0.9", "0.9", "0.9"]
    assert lines[3] == "<mx&4>  4     0.81 (−10.0 %)  failed        0.45 (−50.0 %)"
    assert lines[4].split() == ["int4", "4", "0.85", "(−5.6", "%)", "–", "–"]
    assert lines[-1] == "<mx&4> inputs failed: ValueError: x <&"


def test_the_table_has_a_row_for_each_evaluation() -> None:
    table = RESULT.to_dataframe()
    assert list(table["format"].unique()) == ["int8", "<mx&4>", "int4", "int2"]
    assert table["accuracy"].isna().tolist() == [i == 4 for i in range(9)]
    assert table["metrics_top5"][0] == 0.99
    assert table["error"][4] == "ValueError: x <&"


# ---------------------------------------------------------------- the plot


def drawn(result: SweepResult, folder: Path) -> ET.Element:
    path = result.plot(folder / "sweep.svg")
    return ET.fromstring(path.read_text(encoding="utf-8"))


def texts(root: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_the_svg_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    root = drawn(RESULT, tmp_path)
    words = texts(root)
    for wanted in ("bits", "top1", "weights only", "inputs only", "weights and inputs", "failed"):
        assert wanted in words
    assert {"int8", "<mx&4>", "int4", "int2", "FP32 0.9"} <= set(words)
    assert [w for w in words if w in ("2", "4", "8")] == ["2", "4", "8"]
    titles = [t.text for t in root.iter(f"{SVG}title")]
    assert "<mx&4>, weights and inputs: 0.45, a drop of 50 %" in titles
    assert "<mx&4>, inputs only: failed" in titles
    assert len(titles) == 1 + len(RESULT.rows)
    text = (tmp_path / "sweep.svg").read_text(encoding="utf-8").replace(SVG[1:-1], "")
    assert not re.search(r"https?:|href|url\(|<script|@import", text)


def test_the_plot_tells_the_truth() -> None:
    plot = sweep_plot(RESULT)
    dots = dict(zip(((r.format, r.part) for r in RESULT.rows), plot.dots, strict=True))
    assert dots["int8", "both"].y == plot.fp32_y
    ys = [dots[key].y for key in (("int8", "both"), ("<mx&4>", "both"), ("int2", "both"))]
    assert ys == sorted(ys)
    share = (ys[1] - ys[0]) / (ys[2] - ys[0])
    assert share == pytest.approx((0.9 - 0.45) / (0.9 - 0.1))
    xs = [dots[name, "weights"].x for name in ("int2", "<mx&4>", "int4", "int8")]
    assert xs == sorted(xs)
    assert [dots[k].failed for k in dots] == [key == ("<mx&4>", "inputs") for key in dots]
    # a line takes the first format of each width, and leaves out what failed
    assert plot.lines["weights"].count(" L") == 2
    assert f"{dots['<mx&4>', 'weights'].x:.1f} " in plot.lines["weights"]
    assert f"{dots['int4', 'weights'].x:.1f} " not in plot.lines["weights"]
    assert plot.lines["inputs"].count("M") == 1
    assert " L" not in plot.lines["inputs"]


def test_labels_slant_where_they_would_collide() -> None:
    assert not sweep_plot(RESULT).slanted
    many = tuple(row(f"mxfp8_e4m{i}", 8, "both", 0.9) for i in range(12))
    assert sweep_plot(replace(RESULT, rows=many)).slanted


@pytest.mark.parametrize("rows", [(), RESULT.rows[:1], RESULT.rows[4:5]], ids=["no", "1", "failed"])
def test_small_results_can_be_drawn(rows: tuple[SweepRow, ...], tmp_path: Path) -> None:
    root = drawn(replace(RESULT, rows=rows), tmp_path)
    numbers = [float(n) for e in root.iter() for k, n in e.items() if k in ("x", "y", "x1", "y1")]
    assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize(
    "scores",
    [(1e308, -1e308, 1.7e308), (1.6e308, 1.7e308), (1e-310, 3e-310), (1e300, 0.0)],
    ids=str,
)
def test_scores_at_the_ends_of_what_floats_hold(scores: tuple[float, ...], tmp_path: Path) -> None:
    rows = tuple(
        SweepRow(f"int{bits}", bits, "both", score, math.inf)
        for bits, score in enumerate(scores, start=2)
    )
    result = SweepResult(scores[0], rows)
    words = texts(drawn(result, tmp_path))
    assert not {"nan", "inf"} & set(words)
    assert max(map(len, words)) < 40
    plot = sweep_plot(result)
    heights = dict(zip(scores, (dot.y for dot in plot.dots), strict=True))
    assert len(set(heights.values())) == len(scores)
    assert sorted(scores) == sorted(scores, key=lambda score: -heights[score])
    assert all(plot.top <= y <= plot.bottom for y in heights.values())
    assert len({tick.label for tick in plot.y_ticks}) == len(plot.y_ticks) >= 2


def test_a_plot_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="the plot cannot be written"):
        RESULT.plot(tmp_path / "nosuch" / "sweep.svg")


@pytest.mark.parametrize("path", [None, 3, b"sweep.svg", "a\0b", "", "a\ud800b"], ids=repr)
def test_what_is_no_path_is_said(path: Any) -> None:
    with pytest.raises(SaveError, match="the plot cannot be written to"):
        RESULT.plot(path)
