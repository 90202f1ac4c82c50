"""What a search has seen so far."""

from collections.abc import Generator

from strategies.base import Outcome, Proposal
from strategies.space import Assignment, Space


class History:
    """The outcomes of one search, in order, and the cheapest plan among them that met the goal."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.best: Assignment | None = None
        self._outcomes: dict[Assignment, Outcome] = {}

    def __len__(self) -> int:
        return len(self._outcomes)

    def __contains__(self, assignment: Assignment) -> bool:
        return assignment in self._outcomes

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All outcomes, oldest first."""
        return tuple(self._outcomes.values())

    def evaluate(
        self, assignment: Assignment, reason: str
    ) -> Generator[Proposal, Outcome, Outcome]:
        """Propose a plan and keep its outcome; a plan that was seen is not proposed again."""
        if assignment not in self._outcomes:
            outcome = yield Proposal(assignment, reason)
            self._outcomes[assignment] = outcome
            if outcome.meets_goal and self.is_cheaper(assignment):
                self.best = assignment
        return self._outcomes[assignment]

    def is_cheaper(self, assignment: Assignment) -> bool:
        """Whether a plan costs less than the best one so far, as far as is known."""
        return self.best is None or self._cost(assignment) < self._cost(self.best)

    def _cost(self, assignment: Assignment) -> float:
        outcome = self._outcomes.get(assignment)
        return self.space.cost(assignment) if outcome is None else outcome.known_cost
