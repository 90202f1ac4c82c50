"""Fall-back in the order of sensitivity, on spaces whose best mix is known."""

import pytest

from strategies.base import Outcome
from strategies.basic import Basic
from strategies.replay import SearchRun
from strategies.space import Assignment, Option, Space, Unit
from strategies.uniform import uniform_plans
from tests.strategies import landscapes


def _int8(count: int) -> Space:
    """Return a space in which unit k is predicted to be the more sensitive the larger k is."""
    return Space(
        tuple(
            Unit(
                f"op{k}",
                "Linear",
                (Option("W8A8", 64.0, float(k + 1)), Option("FP32", 1024.0, 0.0, is_float=True)),
            )
            for k in range(count)
        )
    )


@pytest.mark.parametrize("needed", range(9))
def test_falls_back_exactly_as_many_units_as_needed(needed: int) -> None:
    space = _int8(9)
    run = SearchRun(Basic(space), {})
    passed: list[Assignment] = []
    while (proposal := run.next()) is not None:
        plan = proposal.assignment
        meets = all(choice == 1 for choice in plan[9 - needed :])
        run.tell(Outcome(plan, space.cost(plan), -1.0 if meets else 1.0))
        passed += [plan] if meets else []
    assert min(passed, key=space.cost) == (0,) * (9 - needed) + (1,) * needed


def test_is_at_least_as_good_as_the_best_uniform_plan() -> None:
    landscape = landscapes.mixed_int("basic", 20, 3, hardness=3.0, misprediction=0.0, noise=0.0)
    plans = uniform_plans(landscape.space)
    uniform = [landscape.evaluate(plan.assignment) for plan in plans]
    full = landscape.space.cost(landscapes.float_plan(landscape.space))
    best = min(outcome.cost for outcome in uniform if outcome.meets_goal) / full
    assert landscapes.run(Basic(landscape.space), landscape).ratio < best
