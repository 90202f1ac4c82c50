"""How far `auto` gets, in how few evaluations, on landscapes whose truth is known."""

from dataclasses import replace

import pytest

import strategies
from strategies.replay import SearchRun
from strategies.space import Assignment
from tests.strategies import landscapes
from tests.strategies.landscapes import Landscape

_LIMIT = 15

LANDSCAPES = [
    landscapes.mixed_int("plain-8", 8, 11, hardness=8.0),
    landscapes.mixed_int("plain-30", 30, 14),
    landscapes.mixed_int("plain-60", 60, 17),
    landscapes.mixed_int("outliers-40", 40, 43, outliers=3),
    landscapes.mixed_int("a4-30", 30, 34, a4_factor=100.0, hardness=0.05),
    landscapes.mixed_int("flat-40", 40, 40, power=0.6),
    landscapes.mixed_int("noisy-20", 20, 36, noise=0.004),
]


@pytest.mark.parametrize("landscape", LANDSCAPES, ids=lambda landscape: landscape.name)
def test_reaches_more_than_a_hundred_trials_of_sampling(landscape: Landscape) -> None:
    found = landscapes.run(strategies.get("auto")(landscape.space), landscape)
    assert found.evaluations <= _LIMIT
    for sampler in ("random", "tpe"):
        other = landscapes.run(strategies.get(sampler)(landscape.space), landscape, limit=100)
        assert found.ratio <= other.ratio


@pytest.mark.parametrize("landscape", LANDSCAPES, ids=lambda landscape: landscape.name)
def test_is_near_the_optimum_that_knows_the_truth(landscape: Landscape) -> None:
    found = landscapes.run(strategies.get("auto")(landscape.space), landscape)
    assert found.ratio <= 1.35 * landscapes.optimum(landscape)


def _proposed(landscape: Landscape) -> list[Assignment]:
    run = SearchRun(strategies.get("auto")(landscape.space), {})
    proposed = []
    while (proposal := run.next()) is not None:
        proposed.append(proposal.assignment)
        run.tell(landscape.evaluate(proposal.assignment))
    return proposed


def test_int8_that_passes_takes_one_evaluation() -> None:
    landscape = landscapes.mixed_int("int8", 30, 5, labels=("W8A8",), hardness=1.0)
    assert _proposed(landscape) == [(0,) * 30]


def test_int8_that_fails_falls_back_by_what_matters() -> None:
    landscape = landscapes.mixed_int("int8", 60, 52, labels=("W8A8",), outliers=3)
    found = landscapes.run(strategies.get("auto")(landscape.space), landscape)
    assert found.evaluations <= 8
    assert found.ratio <= 1.1 * landscapes.optimum(landscape)


def test_stops_at_the_cheapest_possible_plan() -> None:
    landscape = landscapes.mixed_int("easy", 25, 6, hardness=1e-6)
    proposed = _proposed(landscape)
    costs = [landscape.space.cost(plan) for plan in proposed]
    least = sum(min(o.cost for o in unit.options) for unit in landscape.space.units)
    assert costs[-1] == pytest.approx(least)
    assert min(costs[:-1]) > costs[-1]
    assert len(proposed) <= 5


@pytest.mark.parametrize("guilty", [0, 7, 25, 39])
def test_finds_an_outlier_that_no_prediction_saw(guilty: int) -> None:
    landscape = landscapes.mixed_int("hidden", 40, 78, labels=("W8A8",))
    worse = [
        tuple(harm * (1e6 if k == guilty else 1.0) for harm in harms)
        for k, harms in enumerate(landscape.true_damage)
    ]
    landscape = replace(landscape, true_damage=tuple(worse))
    found = landscapes.run(strategies.get("auto")(landscape.space), landscape)
    assert found.evaluations <= _LIMIT
    assert found.ratio < 0.6
