"""What is learnt from outcomes whose cause is known."""

import math

import numpy as np
import pytest

from strategies.base import Outcome
from strategies.beliefs import Beliefs
from strategies.observed import observe
from strategies.posterior import Posterior
from strategies.space import Assignment, Option, Space, Unit
from strategies.table import table_of

_LABELS = ("W8A8", "W4A8", "W8A4", "W4A4")
_DAMAGE = (0.01, 0.1, 0.1, 0.2)
COUNT = 12


def _space() -> Space:
    options = tuple(
        Option(label, 1.0, damage) for label, damage in zip(_LABELS, _DAMAGE, strict=True)
    )
    units = [
        Unit(f"op{k}", "Linear", (*options, Option("FP32", 9.0, 0.0, is_float=True)))
        for k in range(COUNT)
    ]
    return Space(tuple(units))


def _learn(*outcomes: tuple[Assignment, float]) -> Beliefs:
    space = _space()
    told = [Outcome(plan, space.cost(plan), violation) for plan, violation in outcomes]
    return Posterior(space, table_of(space), seed=0).learn(observe(told))


def _chance(beliefs: Beliefs, plan: Assignment) -> float:
    return float(beliefs.chance(beliefs.totals(np.array([plan])))[0])


def _uniform(label: str) -> Assignment:
    return (_LABELS.index(label),) * COUNT


def test_float_is_sure_to_pass_and_worse_plans_are_less_likely_to() -> None:
    beliefs = _learn((_uniform("W8A8"), -0.009), (_uniform("W4A4"), 0.05))
    chances = [_chance(beliefs, _uniform(label)) for label in ("W8A8", "W4A8", "W4A4")]
    assert chances[0] > 0.9
    assert chances[0] > chances[1] > chances[2]
    assert chances[2] < 0.02
    assert _chance(beliefs, (4,) * COUNT) == pytest.approx(1.0)


def test_a_failure_of_one_width_is_blamed_on_that_width() -> None:
    before = _learn((_uniform("W8A8"), -0.009), (_uniform("W4A8"), -0.008))
    after = _learn((_uniform("W8A8"), -0.009), (_uniform("W4A8"), -0.008), (_uniform("W8A4"), 0.3))
    one_a4 = (_LABELS.index("W4A4"), *_uniform("W8A8")[1:])
    one_w4 = (_LABELS.index("W4A8"), *_uniform("W8A8")[1:])
    assert _chance(before, one_a4) > 0.9
    assert _chance(after, one_a4) < _chance(after, one_w4) - 0.2
    a4 = after.mean_damages[:, _LABELS.index("W4A4")] / after.mean_damages[:, 1]
    assert np.median(a4) > 2 * _DAMAGE[3] / _DAMAGE[1]


def test_the_unit_that_separates_passing_from_failing_plans_is_suspected() -> None:
    cheap = _uniform("W4A8")
    without_first = (4, *cheap[1:])
    without_second = (cheap[0], 4, *cheap[2:])
    beliefs = _learn((cheap, 0.1), (without_first, -0.009), (without_second, 0.1))
    alone = [tuple(1 if k == unit else 4 for k in range(COUNT)) for unit in range(COUNT)]
    chances = [_chance(beliefs, plan) for plan in alone]
    assert chances[0] < 0.25
    assert min(chances[1:]) > 0.8


def test_a_failed_trial_counts_as_a_plan_that_does_not_meet_the_goal() -> None:
    passed = (_uniform("W8A8"), -0.009)
    failed = _learn(passed, (_uniform("W4A4"), math.inf))
    missed = _learn(passed, (_uniform("W4A4"), 0.1))
    unseen = _learn(passed)
    assert _chance(failed, _uniform("W4A4")) < 0.1
    assert _chance(missed, _uniform("W4A4")) < 0.1
    assert _chance(unseen, _uniform("W4A4")) > 0.1


def test_padding_stays_out_and_samples_are_weighted() -> None:
    space = Space((*_space().units, Unit("last", "Linear", (Option("W8", 1.0, 0.1),))))
    plan = (*_uniform("W8A8"), 0)
    posterior = Posterior(space, table_of(space), seed=0)
    beliefs = posterior.learn(observe([Outcome(plan, 1.0, 0.1)]))
    assert np.isinf(beliefs.damages[:, -1, 1:]).all()
    assert np.isfinite(beliefs.damages[:, :-1]).all()
    assert (beliefs.damages[:, :-1, -1] == 0).all()
    assert beliefs.weight.sum() == pytest.approx(1.0)
