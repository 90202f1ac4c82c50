"""Costs that whole plans were measured to have change what is expected of others."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

import strategies
from strategies.base import Outcome
from strategies.corrected import corrected
from strategies.replay import SearchRun
from strategies.space import Assignment, Option, Space, Unit

_COUNT = 12
_SAVINGS = {"Conv2d": 0.6, "Linear": 0.7, "add": 0.5}
_COSTS = {"Conv2d": 1.0, "Linear": 0.4, "add": 0.5}


def space_of(kinds: Mapping[str, float] = _SAVINGS) -> Space:
    units = []
    for kind, saving in kinds.items():
        for index in range(_COUNT):
            cost = _COSTS[kind] * (1 + 0.1 * index)
            options = (
                Option("W8A8", cost * (1 - saving), 1e-6),
                Option("FP32", cost, 0.0, is_float=True),
            )
            units.append(Unit(f"{kind}_{index}", kind, options))
    return Space(tuple(units), base_cost=3.0)


@dataclass(frozen=True)
class Runtime:
    """Measures plans: each kind saves a multiple of what is predicted; all plans meet the goal."""

    times: Mapping[str, float]
    noise: float = 0.01

    def measure(self, space: Space, assignment: Assignment) -> Outcome:
        saved = (
            self.times[unit.kind] * (unit.options[1].cost - unit.options[option].cost)
            for unit, option in zip(space.units, assignment, strict=True)
        )
        whole = space.cost((1,) * len(space.units))
        digest = hashlib.sha256(repr(assignment).encode()).digest()
        shift = self.noise * whole * np.random.default_rng(list(digest)).normal()
        return Outcome(assignment, space.cost(assignment), -1.0, whole - math.fsum(saved) + shift)


def searched(space: Space, runtime: Runtime, seed: int) -> list[Outcome]:
    run, found = SearchRun(strategies.get("auto")(space, seed), {}), []
    while (proposal := run.next()) is not None:
        found.append(runtime.measure(space, proposal.assignment))
        run.tell(found[-1])
    return found


def test_a_space_of_which_nothing_was_measured_is_itself() -> None:
    space = space_of()
    assert list(corrected(space, [], 0)) == [space]
    assert list(corrected(space, [Outcome((0,) * 36, 1.0, -1.0)], 0)) == [space]


def test_measured_as_predicted_changes_nothing() -> None:
    space = space_of()
    exact = Runtime(dict.fromkeys(_SAVINGS, 1.0), noise=0.0)
    *_, likely = corrected(space, [exact.measure(space, (0,) * 36)], 0)
    for unit, old in zip(likely.units, space.units, strict=True):
        assert [o.cost for o in unit.options] == pytest.approx([o.cost for o in old.options])


def test_plans_of_one_kind_each_teach_what_it_saves() -> None:
    space, times = space_of(), {"Conv2d": 0.8, "Linear": 1.2, "add": -0.5}
    runtime = Runtime(times, noise=0.0)
    alone = [tuple(0 if u.kind == kind else 1 for u in space.units) for kind in times]
    outcomes = [runtime.measure(space, plan) for plan in alone for _ in range(20)]
    *_, likely = corrected(space, outcomes, 0)
    for outcome in outcomes:
        assert likely.cost(outcome.assignment) == pytest.approx(outcome.known_cost, rel=0.01)
    assert likely.cost((1,) * 36) == pytest.approx(space.cost((1,) * 36))


def test_the_draw_depends_on_the_seed_and_on_what_was_measured() -> None:
    space = space_of()
    outcomes = [Runtime(dict.fromkeys(_SAVINGS, 0.5)).measure(space, (0,) * 36)]
    first, again, other = (next(corrected(space, outcomes, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert next(corrected(space, outcomes * 2, 0)) != first


@pytest.mark.parametrize("seed", range(8))
def test_a_kind_that_saves_nothing_is_left_in_float(seed: int) -> None:
    space, runtime = space_of(), Runtime({"Conv2d": 0.9, "Linear": 1.0, "add": -0.6})
    found = searched(space, runtime, seed)
    ideal = tuple(1 if unit.kind == "add" else 0 for unit in space.units)
    best = min(outcome.known_cost for outcome in found)
    everywhere = found[0].known_cost
    assert best <= 1.03 * runtime.measure(space, ideal).known_cost < 0.9 * everywhere
    assert len(found) <= 12


@pytest.mark.parametrize("seed", range(4))
def test_a_runtime_that_is_slower_with_all_of_it_ends_the_search(seed: int) -> None:
    found = searched(space_of(), Runtime(dict.fromkeys(_SAVINGS, -0.2)), seed)
    assert len(found) <= 8


@pytest.mark.parametrize("seed", range(4))
def test_good_predictions_cost_no_more_evaluations(seed: int) -> None:
    found = searched(space_of(), Runtime(dict.fromkeys(_SAVINGS, 1.0)), seed)
    assert len(found) == 1
