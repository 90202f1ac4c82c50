"""What a strategy is, and what it sees of a trial."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

from strategies.space import Assignment, Space


@dataclass(frozen=True)
class Proposal:
    """A plan to evaluate, and in a few words why."""

    assignment: Assignment
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What an evaluation said of a plan.

    `violation` ≤ 0 meets the goal; above 0 it is how far the metric misses it, in the metric's own
    units times −1 where higher is better (so that less is always better). A failed trial has
    `violation` = inf. `cost` is the space's; `measured_cost`, where there is one, what the whole
    plan was measured to cost, in the same units.
    """

    assignment: Assignment
    cost: float
    violation: float
    measured_cost: float | None = None

    @property
    def known_cost(self) -> float:
        """The measured cost where there is one, else the predicted one."""
        return self.cost if self.measured_cost is None else self.measured_cost

    @property
    def meets_goal(self) -> bool:
        """Whether the goal is met."""
        return self.violation <= 0


Search = Generator[Proposal, Outcome, None]


class Strategy(ABC):
    """Proposes plans one after the other.

    `search()` is a generator: it yields a Proposal and is sent its Outcome. It must be a pure
    function of the space, the seed and the outcomes, so that a search can be resumed by feeding
    the stored outcomes again (`strategies.replay`). It returns when it has nothing better to try.
    """

    exhaustive: ClassVar[bool] = False
    """Whether it returns only once every plan was tried: its end is no sign of a minimum."""

    def __init__(self, space: Space, seed: int = 0) -> None:
        self.space = space
        self.seed = seed

    @abstractmethod
    def search(self) -> Search:
        """Yield proposals; receive each one's outcome; return when done."""
