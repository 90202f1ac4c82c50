"""The arrays of a space: padding, and damages that arithmetic can stand."""

import math

import numpy as np

from strategies.space import Option, Space, Unit
from strategies.table import as_assignment, table_of

_FLOAT = Option("FP32", 32.0, 0.0, is_float=True)


def _space(*rows: tuple[Option, ...], base_cost: float = 0.0) -> Space:
    return Space(tuple(Unit(f"op{k}", "Linear", row) for k, row in enumerate(rows)), base_cost)


def test_units_with_fewer_options_are_padded() -> None:
    table = table_of(_space((Option("W4", 4.0, 0.5), Option("W8", 8.0, 0.1), _FLOAT), (_FLOAT,)))
    np.testing.assert_array_equal(table.exists, [[True, True, True], [True, False, False]])
    np.testing.assert_array_equal(np.isinf(table.damages), ~table.exists)


def test_costs_are_those_of_the_space() -> None:
    space = _space((Option("W4", 4.0, 0.5), _FLOAT), (Option("W8", 8.0, 0.1), _FLOAT), base_cost=5)
    plans = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    expected = [space.cost(as_assignment(plan)) for plan in plans]
    np.testing.assert_allclose(table_of(space).cost(plans), expected)


def test_a_damage_that_is_not_finite_is_far_worse_than_any_other() -> None:
    row = (Option("W2", 2.0, math.nan), Option("W3", 3.0, math.inf), Option("W8", 8.0, 0.7))
    damages = table_of(_space(row)).damages[0]
    assert np.isfinite(damages).all()
    assert damages[:2].min() > 100 * damages[2]


def test_only_float_is_harmless() -> None:
    row = (Option("W4", 4.0, 0.0), Option("W6", 6.0, -1.0), Option("W8", 8.0, 0.1), _FLOAT)
    damages = table_of(_space(row, (Option("W8", 8.0, 2.0), _FLOAT))).damages
    assert (damages[0, :2] > 0).all()
    assert (damages[0, :2] < 1e-6).all()
    assert damages[0, 3] == 0
    assert (table_of(_space((Option("W8", 8.0, 0.0), _FLOAT))).damages[0] == [1e-9, 0]).all()
