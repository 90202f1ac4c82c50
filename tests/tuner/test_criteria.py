"""AccuracyGoal: safe for every sign, direction and kind of bound."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from tuner.criteria import AccuracyGoal

HIGHER = AccuracyGoal(max_drop=0.01)
LOWER = AccuracyGoal(max_drop=0.01, higher_is_better=False)


@pytest.mark.parametrize(
    ("goal", "baseline", "allowed", "refused"),
    [
        (HIGHER, 0.9, 0.891, 0.8909),
        (HIGHER, -2.0, -2.02, -2.021),
        (HIGHER, 0.0, 0.0, -1e-6),
        (LOWER, 20.0, 20.2, 20.21),
        (LOWER, -5.0, -4.95, -4.94),
        (LOWER, 0.0, 0.0, 1e-6),
        (AccuracyGoal(max_drop=0.5, relative=False), 0.0, -0.5, -0.501),
        (AccuracyGoal(max_drop=0.5, relative=False), -3.0, -3.5, -3.501),
        (AccuracyGoal(max_drop=0.5, relative=False, higher_is_better=False), 7.0, 7.5, 7.501),
        (AccuracyGoal(max_drop=0.0), 0.7, 0.7, 0.7 - 1e-9),
        (AccuracyGoal(at_least=0.8), 0.9, 0.8, 0.7999),
        (AccuracyGoal(at_least=-3.0), -9.0, -3.0, -3.001),
        (AccuracyGoal(at_most=12.5), 10.0, 12.5, 12.51),
        (AccuracyGoal(at_least=0.2, at_most=0.4), 0.3, 0.2, 0.199),
        (AccuracyGoal(at_least=0.2, at_most=0.4), 0.3, 0.4, 0.401),
    ],
)
def test_the_threshold_passes_and_what_lies_beyond_fails(
    goal: AccuracyGoal, baseline: float, allowed: float, refused: float
) -> None:
    assert goal.meets(allowed, baseline)
    assert goal.violation(allowed, baseline) <= 0
    assert not goal.meets(refused, baseline)
    assert goal.violation(refused, baseline) > 0


@pytest.mark.parametrize(
    ("goal", "baseline", "expected"),
    [
        (HIGHER, 0.9, 0.891),
        (HIGHER, -2.0, -2.02),
        (LOWER, 20.0, 20.2),
        (AccuracyGoal(at_least=0.8), 0.9, 0.8),
        (AccuracyGoal(at_most=12.5), 10.0, 12.5),
        (AccuracyGoal(at_most=0.4, at_least=0.2), 0.3, 0.2),
        (AccuracyGoal(at_most=0.4, at_least=0.2, higher_is_better=False), 0.3, 0.4),
    ],
)
def test_threshold(goal: AccuracyGoal, baseline: float, expected: float) -> None:
    assert goal.threshold(baseline) == pytest.approx(expected, rel=1e-12)


def test_violation_is_in_the_metrics_units_and_less_is_better() -> None:
    assert HIGHER.violation(0.881, 0.9) == pytest.approx(0.01)
    assert HIGHER.violation(0.9, 0.9) == pytest.approx(-0.009)
    assert LOWER.violation(20.5, 20.0) == pytest.approx(0.3)
    assert AccuracyGoal(at_most=12.5).violation(12.0, math.nan) == pytest.approx(-0.5)


@pytest.mark.parametrize("samples", [800, 1000, 10_000, 50_000])
def test_exactly_one_percent_passes_in_float32_too(samples: int) -> None:
    for hits in range(samples // 2, samples, samples // 100):
        if hits % 100:
            continue
        baseline = float(np.float32(hits) / np.float32(samples))
        allowed = float(np.float32(hits * 99 // 100) / np.float32(samples))
        one_more_lost = float(np.float32(hits * 99 // 100 - 1) / np.float32(samples))
        assert HIGHER.meets(allowed, baseline)
        assert not HIGHER.meets(one_more_lost, baseline)


def test_a_bound_that_float32_cannot_hold_passes() -> None:
    assert AccuracyGoal(at_least=0.9).meets(float(np.float32(0.9)), 1.0)
    assert AccuracyGoal(at_most=0.1).meets(float(np.float32(0.1)), 0.0)


def test_rounding_never_swallows_a_small_absolute_drop() -> None:
    goal = AccuracyGoal(max_drop=0.01, relative=False)
    assert not goal.meets(1e6 - 0.011, 1e6)
    assert goal.meets(1e6 - 0.009, 1e6)


@pytest.mark.parametrize("accuracy", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("goal", [HIGHER, LOWER, AccuracyGoal(at_least=0), AccuracyGoal(at_most=0)])
def test_what_is_not_finite_never_passes(goal: AccuracyGoal, accuracy: float) -> None:
    assert goal.violation(accuracy, 0.5) == math.inf
    assert not goal.meets(accuracy, 0.5)


def test_a_baseline_that_is_not_finite_judges_nothing() -> None:
    assert not HIGHER.meets(0.9, math.nan)
    assert AccuracyGoal(at_least=0.5).meets(0.9, math.nan)


def test_better_follows_the_direction_and_nan_is_worst() -> None:
    assert HIGHER.better(0.9, 0.8)
    assert not HIGHER.better(0.8, 0.8)
    assert LOWER.better(0.8, 0.9)
    assert AccuracyGoal(at_most=3).better(1, 2)
    assert AccuracyGoal(at_least=3).better(2, 1)
    assert HIGHER.better(-1e9, math.nan)
    assert not HIGHER.better(math.nan, -1e9)
    assert not HIGHER.better(math.nan, math.nan)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_drop": -0.01},
        {"max_drop": math.nan},
        {"max_drop": math.inf},
        {"at_least": math.nan},
        {"confidence": 1.0},
        {"confidence": 0.0},
        {"at_least": 0.9, "higher_is_better": False},
        {"at_least": 0.9, "at_most": 0.8},
        {"tolerance": 0.01},
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AccuracyGoal(**arguments)  # type: ignore[arg-type]


def test_it_is_frozen_hashable_and_round_trips() -> None:
    goal = AccuracyGoal(max_drop=0.02, relative=False, metric="f1", confidence=0.95)
    assert AccuracyGoal.model_validate_json(goal.model_dump_json()) == goal
    assert hash(goal) == hash(goal.model_copy())
    with pytest.raises(ValidationError):
        goal.max_drop = 1.0


@pytest.mark.parametrize(
    ("goal", "baseline", "expected"),
    [
        (HIGHER, 0.9, "accuracy ≥ 0.891 (at most 1 % below 0.9)"),
        (HIGHER, None, "accuracy at most 1 % below FP32"),
        (
            AccuracyGoal(metric="ppl", higher_is_better=False, relative=False, max_drop=0.5),
            8.0,
            "ppl ≤ 8.5 (at most 0.5 above 8)",
        ),
        (AccuracyGoal(at_least=0.75), None, "accuracy ≥ 0.75"),
        (AccuracyGoal(at_least=0.2, at_most=0.4), 1.0, "accuracy ≥ 0.2 and ≤ 0.4"),
    ],
)
def test_describe(goal: AccuracyGoal, baseline: float | None, expected: str) -> None:
    assert goal.describe(baseline) == expected
