"""The ladder against enumeration of all plans."""

from itertools import pairwise, product

import numpy as np
import pytest

from strategies.ladder import build_ladder, ladder
from strategies.space import Assignment, Option, Space, Unit
from strategies.table import table_of


def _random_space(seed: int, units: int, options: int, base_cost: float = 3.0) -> Space:
    rng = np.random.default_rng(seed)
    return Space(
        tuple(
            Unit(
                f"op{k}",
                "Linear",
                tuple(
                    Option(f"W{j + 2}", float(c), float(d))
                    for j, (c, d) in enumerate(rng.uniform(1, 9, (options, 2)))
                ),
            )
            for k in range(units)
        ),
        base_cost,
    )


def _all_plans(space: Space) -> list[Assignment]:
    return list(product(*(range(len(unit.options)) for unit in space.units)))


@pytest.mark.parametrize("seed", range(6))
def test_every_rung_is_undominated(seed: int) -> None:
    space = _random_space(seed, units=4, options=5)
    points = [(space.cost(p), space.damage(p)) for p in _all_plans(space)]
    for rung in ladder(space):
        cost, damage = space.cost(rung), space.damage(rung)
        assert not any(c < cost - 1e-9 and d < damage - 1e-9 for c, d in points)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("price", [0.0, 0.01, 0.3, 1.0, 4.0, 1e6])
def test_holds_the_optimum_for_every_price_of_damage(seed: int, price: float) -> None:
    space = _random_space(seed, units=4, options=5)

    def total(plan: Assignment) -> float:
        return space.cost(plan) + price * space.damage(plan)

    best = min(total(p) for p in _all_plans(space))
    assert min(total(p) for p in ladder(space)) == pytest.approx(best)


def test_runs_from_cheapest_to_least_damaged() -> None:
    space = _random_space(7, units=6, options=8)
    rungs = ladder(space)
    assert rungs[0] == tuple(min(range(8), key=lambda j: u.options[j].cost) for u in space.units)
    assert rungs[-1] == tuple(min(range(8), key=lambda j: u.options[j].damage) for u in space.units)
    assert all(low < high for low, high in pairwise(rungs.costs))
    assert all(low > high for low, high in pairwise(rungs.damages))


def test_costs_and_damages_are_those_of_the_plans() -> None:
    space = _random_space(8, units=30, options=12)
    rungs = ladder(space)
    np.testing.assert_allclose(rungs.costs, [space.cost(p) for p in rungs])
    np.testing.assert_allclose(rungs.damages, [space.damage(p) for p in rungs], atol=1e-9)


def test_neighbouring_rungs_differ_in_one_unit() -> None:
    rungs = ladder(_random_space(9, units=7, options=6))
    for low, high in pairwise(rungs):
        assert sum(a != b for a, b in zip(low, high, strict=True)) == 1


def test_within_damage_gives_the_cheapest_rung_that_fits() -> None:
    rungs = ladder(_random_space(10, units=5, options=6))
    middle = (rungs.damages[3] + rungs.damages[4]) / 2
    assert rungs.within_damage(float(middle)) == 4
    assert rungs.within_damage(float("inf")) == 0
    assert rungs.within_damage(-1.0) is None


def test_indexes_like_a_sequence() -> None:
    rungs = ladder(_random_space(11, units=3, options=4))
    assert rungs[1:3] == [rungs[1], rungs[2]]
    assert rungs[-1] == rungs[len(rungs) - 1]
    with pytest.raises(IndexError, match="ladder of"):
        rungs[len(rungs)]


def test_units_with_one_option_or_no_cost_add_no_rung() -> None:
    free = tuple(Option(f"W{j}", 0.0, float(9 - j)) for j in range(2, 5))
    space = Space((Unit("one", "Linear", (Option("W8", 5.0, 1.0),)), Unit("free", "Linear", free)))
    assert list(ladder(space)) == [(0, 2)]


def test_leaves_out_what_has_no_finite_damage() -> None:
    table = table_of(_random_space(12, units=2, options=3))
    table.damages[0, 1] = np.inf
    assert all(plan[0] != 1 for plan in build_ladder(table))
