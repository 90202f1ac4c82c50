"""SearchRun: memory, resuming, and its own small rules."""

import pytest

from strategies.base import Outcome, Proposal, Search, Strategy
from strategies.replay import SearchRun
from strategies.space import Assignment, Option, Space, Unit

SPACE = Space((Unit("a", "Linear", tuple(Option(f"W{b}", float(b), 0.1) for b in range(2, 9))),))


class Countdown(Strategy):
    """Propose 6, 5, …, and after a failure go back to 6; end after a success at or below 2."""

    def search(self) -> Search:
        """Yield proposals; receive each one's outcome; return when done."""
        for index in (6, 5, 6, 4, 3, 2, 1):
            outcome = yield Proposal((index,), f"option {index}")
            if outcome.meets_goal and index <= 2:
                return


def _outcome(assignment: Assignment, violation: float = -1.0) -> Outcome:
    return Outcome(assignment, SPACE.cost(assignment), violation)


def _known(*indices: int, violation: float = -1.0) -> dict[Assignment, Outcome]:
    return {(k,): _outcome((k,), violation) for k in indices}


def _finish(run: SearchRun) -> list[Assignment]:
    proposed = []
    while (proposal := run.next()) is not None:
        proposed.append(proposal.assignment)
        run.tell(_outcome(proposal.assignment))
    return proposed


def test_a_repeated_proposal_is_answered_from_memory() -> None:
    assert _finish(SearchRun(Countdown(SPACE), {})) == [(6,), (5,), (4,), (3,), (2,)]


def test_next_repeats_itself_until_told() -> None:
    run = SearchRun(Countdown(SPACE), {})
    assert run.next() == run.next() == Proposal((6,), "option 6")
    run.tell(_outcome((6,)))
    assert run.next() == Proposal((5,), "option 5")


def test_known_outcomes_are_never_proposed() -> None:
    assert _finish(SearchRun(Countdown(SPACE), _known(6, 4, 3))) == [(5,), (2,)]


def test_stays_ended() -> None:
    run = SearchRun(Countdown(SPACE), _known(*range(7)))
    assert run.next() is None
    assert run.next() is None


def test_does_not_write_into_what_it_was_given() -> None:
    known: dict[Assignment, Outcome] = {}
    _finish(SearchRun(Countdown(SPACE), known))
    assert known == {}


@pytest.mark.parametrize("violation", [1.0, float("inf")])
def test_stored_failures_steer_the_search_like_new_ones(violation: float) -> None:
    known = _known(*range(2, 7), violation=violation)
    assert _finish(SearchRun(Countdown(SPACE), known)) == [(1,)]
