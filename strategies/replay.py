"""Driving a strategy, from the start or from the middle of a stored search."""

from collections.abc import Mapping

from strategies.base import Outcome, Proposal, Strategy
from strategies.space import Assignment


class SearchRun:
    """One run of a strategy: `next()` gives a plan to evaluate, `tell()` takes its outcome.

    A plan whose outcome is known is answered from memory and never returned, so a search that is
    started again with the outcomes of its first part proposes exactly what it would have proposed
    without the interruption.
    """

    def __init__(self, strategy: Strategy, known: Mapping[Assignment, Outcome]) -> None:
        self._known = dict(known)
        self._search = strategy.search()
        self._pending: Proposal | None = None
        self._ended = False

    def next(self) -> Proposal | None:
        """Return the first proposal whose outcome is unknown; None when the strategy is done."""
        while not self._ended and (
            self._pending is None or self._pending.assignment in self._known
        ):
            self._pending = self._advance()
        return self._pending

    def tell(self, outcome: Outcome) -> None:
        """Take the outcome of a plan, proposed or not."""
        self._known[outcome.assignment] = outcome

    def _advance(self) -> Proposal | None:
        try:
            if self._pending is None:
                return next(self._search)
            return self._search.send(self._known[self._pending.assignment])
        except StopIteration:
            self._ended = True
            return None
