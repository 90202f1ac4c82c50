"""Bisection over plans that are in the order of predicted damage."""

import math

import pytest

from strategies.base import Outcome
from strategies.bracket import bracket
from strategies.history import History
from strategies.space import Option, Space, Unit
from strategies.uniform import uniform_plans


def _space(count: int) -> Space:
    options = tuple(Option(f"W{b}", float(b), 1.0 / b) for b in range(2, 2 + count))
    return Space((Unit("a", "Linear", options),))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_finds_the_edge_wherever_it_is(count: int) -> None:
    space = _space(count)
    for edge in range(count + 1):
        history = History(space)
        search = bracket(uniform_plans(space), history)
        found = None
        try:
            proposal = next(search)
            while True:
                plan = proposal.assignment
                violation = -1.0 if plan[0] >= edge else 1.0
                proposal = search.send(Outcome(plan, space.cost(plan), violation))
        except StopIteration as stop:
            found = stop.value
        assert (found.assignment if found else (count,)) == (edge,)
        assert len(history) <= math.ceil(math.log2(count + 1))
        assert history.best == (None if edge == count else (edge,))
