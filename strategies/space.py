"""What a strategy may choose from: units in execution order, their options, costs and damage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Assignment = tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """One way to compute a unit.

    `cost` is in the units of the objective (bytes, bit operations, ms); `damage` is the predicted
    harm, 0 for float and comparable between units; `label` names the kind of choice ("W8A8",
    "W4A6", "FP32") so that uniform plans can be built across units.
    """

    label: str
    cost: float
    damage: float
    is_float: bool = False


@dataclass(frozen=True)
class Unit:
    """Ops that must choose together (mostly one op; tied weights make it more)."""

    name: str
    kind: str
    options: tuple[Option, ...]

    def index_of(self, label: str) -> int | None:
        """Return the index of the option with this label, or None."""
        return next((i for i, o in enumerate(self.options) if o.label == label), None)


@dataclass(frozen=True)
class Space:
    """The choices for one model. An assignment holds one option index per unit."""

    units: tuple[Unit, ...]
    base_cost: float = 0.0

    def cost(self, assignment: Sequence[int]) -> float:
        """Return the cost of the whole model: base_cost + Σ cost of the chosen options."""
        chosen = zip(self.units, assignment, strict=True)
        return self.base_cost + math.fsum(unit.options[i].cost for unit, i in chosen)

    def damage(self, assignment: Sequence[int]) -> float:
        """Return the predicted damage of the whole plan, the sum over its units."""
        chosen = zip(self.units, assignment, strict=True)
        return math.fsum(unit.options[i].damage for unit, i in chosen)

    @property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels of all quantizing options, in order of first appearance."""
        seen = {o.label: None for unit in self.units for o in unit.options if not o.is_float}
        return tuple(seen)
