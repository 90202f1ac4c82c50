"""The batched knapsack against the ladder, which is tested against enumeration."""

import numpy as np
import pytest

from strategies.knapsack import cheapest_within
from strategies.ladder import ladder
from strategies.table import as_assignment, table_of
from tests.strategies import landscapes


@pytest.mark.parametrize("share", [0.999, 0.3, 0.01, 1e-6])
def test_gives_the_rung_of_the_ladder_that_fits(share: float) -> None:
    space = landscapes.mixed_int("knapsack", 25, 4).space
    table, rungs = table_of(space), ladder(space)
    budget = float(rungs.damages[0]) * share
    plan = cheapest_within(table, table.damages[None], np.array([budget]))[0]
    expected = rungs.within_damage(budget)
    assert expected is not None
    assert as_assignment(plan) == rungs[expected]


def test_every_sample_has_its_own_budget() -> None:
    space = landscapes.mixed_int("knapsack", 25, 4).space
    table, rungs = table_of(space), ladder(space)
    budgets = rungs.damages[[3, 20, 60]] * (1 + 1e-9)
    plans = cheapest_within(table, np.repeat(table.damages[None], 3, axis=0), budgets)
    assert [as_assignment(plan) for plan in plans] == [rungs[3], rungs[20], rungs[60]]


def test_a_budget_that_nothing_fits_gives_the_least_damage() -> None:
    space = landscapes.mixed_int("knapsack", 6, 4).space
    table = table_of(space)
    plan = cheapest_within(table, table.damages[None], np.array([-1.0]))[0]
    assert as_assignment(plan) == landscapes.float_plan(space)
