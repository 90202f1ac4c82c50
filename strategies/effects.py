"""The prior over how wrong predicted damage is: Gaussian effects that options share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from strategies.space import Space
from strategies.table import Ints
from strategies.uniform import Bits, parse_label

_POSITIONS = 4


@dataclass(frozen=True, eq=False)
class Effect:
    """One additive effect on the log multiplier of damage.

    `level` says for each entry `[units, options]` which of the effect's `count` independent values
    it takes; each value has the standard deviation `sigma`.
    """

    level: Ints
    count: int
    sigma: float


def effects_of(space: Space, width: int) -> tuple[Effect, ...]:
    """Return the effects on a table of `width` options; the first is that of the single unit."""
    labels = [[parse_label(option.label) for option in unit.options] for unit in space.units]
    kinds = [unit.kind for unit in space.units]
    zone = max(len(space.units) / _POSITIONS, 1.0)
    keys: list[tuple[float, Callable[[int, int], Hashable]]] = [
        (0.5, lambda unit, option: unit),
        (0.5, lambda unit, option: (unit, option)),
        (0.5, lambda unit, option: _weight(labels[unit][option])),
        (0.8, lambda unit, option: _inputs(labels[unit][option])),
        (0.4, lambda unit, option: kinds[unit]),
        (0.4, lambda unit, option: int(unit / zone)),
    ]
    return tuple(_effect(space, width, sigma, key) for sigma, key in keys)


def _weight(bits: Bits) -> Hashable:
    return bits.weight, bits.weight_format


def _inputs(bits: Bits) -> Hashable:
    return bits.inputs, bits.input_format


def _effect(space: Space, width: int, sigma: float, key: Callable[[int, int], Hashable]) -> Effect:
    """Number the distinct keys of the entries in order of appearance."""
    codes: dict[Hashable, int] = {}
    level = np.zeros((len(space.units), width), dtype=np.intp)
    for row, unit in enumerate(space.units):
        for column in range(len(unit.options)):
            level[row, column] = codes.setdefault(key(row, column), len(codes))
    return Effect(level, len(codes), sigma)
