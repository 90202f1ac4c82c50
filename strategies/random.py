"""Random search."""

import math

import numpy as np

from strategies.base import Proposal, Search, Strategy
from strategies.space import Assignment, Space


class Random(Strategy):
    """Draw every unit's option uniformly; end only when there is no plan left to draw."""

    exhaustive = True

    def search(self) -> Search:
        """Yield proposals; receive each one's outcome; return when done."""
        rng = np.random.default_rng(self.seed)
        seen: set[Assignment] = set()
        total = math.prod(len(unit.options) for unit in self.space.units)
        while len(seen) < total:
            assignment = draw(self.space, rng)
            if assignment not in seen and not is_float(self.space, assignment):
                yield Proposal(assignment, "random")
            seen.add(assignment)


def draw(space: Space, rng: np.random.Generator) -> Assignment:
    """Return a random assignment, every option of a unit equally likely."""
    return tuple(rng.integers([len(unit.options) for unit in space.units]).tolist())


def is_float(space: Space, assignment: Assignment) -> bool:
    """Whether an assignment quantizes nothing (it is the baseline, and known)."""
    return all(u.options[i].is_float for u, i in zip(space.units, assignment, strict=True))
