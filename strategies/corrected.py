"""What measurements of whole plans say about the costs of options.

A predicted latency is a sum of what ops take alone, and a runtime fuses and converts: some kinds of
op save less within the model than alone, or nothing. Each kind of unit has a multiplier of all its
savings, 1 at first, with a Gaussian posterior given the measured costs (Bayesian linear regression:
Bishop, Pattern Recognition and Machine Learning, 2006, section 3.3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from strategies.base import Outcome
from strategies.space import Space, Unit
from strategies.table import Floats

_NOISE = 0.02  # of a measurement, as a share of the dearest plan's cost
_LEAST_DOUBT = 0.1  # standard deviation of a multiplier before it is measured
_DOUBTS = 1.5  # the doubt, in multiples of how far predicted savings were off
_DRAWS = 8


def corrected(space: Space, outcomes: Sequence[Outcome], seed: int) -> Iterator[Space]:
    """Yield the space with costs that go by measured ones: some drawn, then the most likely.

    The drawn ones, by Thompson sampling, try kinds of which it is not clear what they save: the
    less so, the further predictions were off. Of each unit the float option keeps its cost (without
    one, the dearest): savings count from there. Where nothing was measured, there is but the space
    as it is.
    """
    measured = [outcome for outcome in outcomes if outcome.measured_cost is not None]
    if not measured:
        yield space
        return
    kinds = sorted({unit.kind for unit in space.units})
    savings = _savings(space, kinds, measured)
    more = np.array([space.cost(o.assignment) - o.known_cost for o in measured])
    noise = _NOISE * _dearest(space) or 1.0
    doubt = max(_LEAST_DOUBT, _DOUBTS * _off(savings, more))
    precision = savings.T @ savings / noise**2 + np.eye(len(kinds)) / doubt**2
    mean = 1 + np.linalg.solve(precision, savings.T @ more / noise**2)
    normal = np.random.default_rng([seed, len(measured)]).standard_normal((len(kinds), _DRAWS))
    drawn = mean[:, None] + np.linalg.solve(np.linalg.cholesky(precision).T, normal)
    for times in (*drawn.T, mean):
        by_kind = dict(zip(kinds, times.tolist(), strict=True))
        units = (_scaled(unit, by_kind[unit.kind]) for unit in space.units)
        yield replace(space, units=tuple(units))


def _off(savings: Floats, more: Floats) -> float:
    """Return how far multipliers are from 1, by what was saved more, or less, than predicted."""
    squares = (savings**2).sum(axis=1)
    known = squares > 0
    return float(np.sqrt((more[known] ** 2 / squares[known]).mean())) if known.any() else 0.0


def _savings(space: Space, kinds: Sequence[str], outcomes: Sequence[Outcome]) -> Floats:
    """Return what each kind of unit is predicted to save, `[outcomes, kinds]`."""
    found = np.zeros((len(outcomes), len(kinds)))
    for row, outcome in enumerate(outcomes):
        for unit, option in zip(space.units, outcome.assignment, strict=True):
            found[row, kinds.index(unit.kind)] += _reference(unit) - unit.options[option].cost
    return found


def _dearest(space: Space) -> float:
    return space.base_cost + sum(_reference(unit) for unit in space.units)


def _scaled(unit: Unit, times: float) -> Unit:
    """Return a unit whose savings are so many times as large."""
    reference = _reference(unit)
    options = (
        replace(option, cost=reference - times * (reference - option.cost))
        for option in unit.options
    )
    return replace(unit, options=tuple(options))


def _reference(unit: Unit) -> float:
    floats = [option.cost for option in unit.options if option.is_float]
    return max(floats or [option.cost for option in unit.options])
