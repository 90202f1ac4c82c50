"""A space as arrays, for the arithmetic over many plans at once."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.space import Assignment, Space

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

_HOPELESS = 1e3  # a damage that is not finite counts as this many times the largest finite one
_HARMLESS = 1e-9  # a quantizing option does at least this share of the largest damage


@dataclass(frozen=True, eq=False)
class Table:
    """`costs` and `damages`, both `[units, options]`; inf beyond a unit's last option."""

    costs: Floats
    damages: Floats
    base_cost: float

    @property
    def exists(self) -> NDArray[np.bool_]:
        """Which entries are options, `[units, options]`."""
        return np.isfinite(self.costs)

    def cost(self, plans: Ints) -> Floats:
        """Return the cost of each plan of `[..., units]`."""
        chosen = self.costs[np.arange(len(self.costs)), plans]
        return np.asarray(chosen.sum(axis=-1) + self.base_cost)


def table_of(space: Space) -> Table:
    """Return the arrays of a space, with damages that are finite and, but for float, positive."""
    width = max((len(unit.options) for unit in space.units), default=1)
    costs = np.full((len(space.units), width), np.inf)
    damages = np.full((len(space.units), width), np.inf)
    scale = _largest_damage(space)
    for row, unit in enumerate(space.units):
        for column, option in enumerate(unit.options):
            costs[row, column] = option.cost
            harm = option.damage if math.isfinite(option.damage) else _HOPELESS * scale
            damages[row, column] = 0.0 if option.is_float else max(harm, _HARMLESS * scale)
    return Table(costs, damages, space.base_cost)


def as_assignment(plan: Ints) -> Assignment:
    """Return one row of option indices as the tuple that strategies propose."""
    return tuple(plan.tolist())


def _largest_damage(space: Space) -> float:
    damages = [o.damage for unit in space.units for o in unit.options]
    return max((d for d in damages if math.isfinite(d) and d > 0), default=1.0)
