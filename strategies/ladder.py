"""The multiple-choice knapsack: from a space to its ladder of plans on the convex hull.

Each unit's options span a lower convex hull in (cost, damage). Walking the edges of all hulls in
the order of damage saved per cost gives, rung by rung, the plans that minimise cost + λ·damage for
some λ ≥ 0 (Sinha & Zoltners, The multiple-choice knapsack problem, 1979).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from strategies.space import Assignment, Space
from strategies.table import Floats, Ints, Table, as_assignment, table_of


@dataclass(frozen=True, eq=False)
class Ladder(Sequence[Assignment]):
    """Plans from the cheapest and most damaged to the costliest and least damaged.

    `costs` (with the base cost) and `damages` hold one value a rung; rung k + 1 is rung k with
    unit `units[k]` moved to option `options[k]`.
    """

    start: Ints
    units: Ints
    options: Ints
    costs: Floats
    damages: Floats

    def __len__(self) -> int:
        return len(self.costs)

    @overload
    def __getitem__(self, index: int) -> Assignment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Assignment]: ...
    def __getitem__(self, index: int | slice) -> Assignment | Sequence[Assignment]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"rung {index} of a ladder of {len(self)}")
        return as_assignment(self.plan(index % len(self)))

    def plan(self, rung: int) -> Ints:
        """Return the option indices of a rung, `[units]`."""
        plan = self.start.copy()
        plan[self.units[:rung]] = self.options[:rung]  # of repeated units the last step counts
        return plan

    def within_damage(self, budget: float) -> int | None:
        """Return the cheapest rung whose damage is at most `budget`, or None."""
        rung = int(np.searchsorted(-self.damages, -budget, side="left"))
        return rung if rung < len(self) else None


def ladder(space: Space) -> Ladder:
    """Return the ladder of a space's own costs and predicted damages."""
    return build_ladder(table_of(space))


@dataclass(frozen=True)
class _Edge:
    """One step of a unit along its hull: to `option`, for `cost` more and `saved` less damage."""

    unit: int
    option: int
    cost: float
    saved: float

    @property
    def worth(self) -> float:
        return self.saved / self.cost


def build_ladder(table: Table) -> Ladder:
    """Return the ladder of a table; an option whose damage is inf is left out."""
    start, edges = [], []
    rows = zip(table.costs.tolist(), table.damages.tolist(), strict=True)
    for unit, (costs, damages) in enumerate(rows):
        first, steps = _hull(unit, costs, damages)
        start.append(first)
        edges += steps
    edges.sort(key=lambda edge: -edge.worth)  # stable, and each unit's own edges are in order
    bottom = np.array(start, dtype=np.intp)
    units = np.arange(len(start))
    costs_at = np.cumsum([table.cost(bottom), *(edge.cost for edge in edges)])
    saved = np.cumsum([0.0, *(edge.saved for edge in edges)])
    return Ladder(
        bottom,
        np.array([edge.unit for edge in edges], dtype=np.intp),
        np.array([edge.option for edge in edges], dtype=np.intp),
        costs_at,
        table.damages[units, bottom].sum() - saved,
    )


def _hull(unit: int, costs: list[float], damages: list[float]) -> tuple[int, list[_Edge]]:
    """Return the cheapest useful option and the edges of the lower convex hull above it."""
    order = sorted(
        (i for i, damage in enumerate(damages) if math.isfinite(damage)),
        key=lambda i: (costs[i], damages[i]),
    )
    corner, edges = order[0], list[_Edge]()
    for option in order[1:]:
        if damages[option] >= damages[edges[-1].option if edges else corner]:
            continue
        edge = _edge(unit, edges[-1].option if edges else corner, option, costs, damages)
        while edges and edges[-1].worth <= edge.worth:
            edges.pop()
            edge = _edge(unit, edges[-1].option if edges else corner, option, costs, damages)
        edges.append(edge)
    return corner, edges


def _edge(unit: int, low: int, high: int, costs: list[float], damages: list[float]) -> _Edge:
    return _Edge(unit, high, costs[high] - costs[low], damages[low] - damages[high])
