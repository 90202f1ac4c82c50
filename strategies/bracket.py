"""Bisection: where in a row of plans, from worst to best, the goal begins to be met."""

from collections.abc import Generator, Sequence

from strategies.base import Outcome, Proposal
from strategies.history import History
from strategies.uniform import UniformPlan


def bracket(
    plans: Sequence[UniformPlan], history: History
) -> Generator[Proposal, Outcome, UniformPlan | None]:
    """Evaluate plans, most damaged first, until two neighbours fail and pass.

    Returns the most damaged plan that met the goal, or None. Takes ⌈log2(n + 1)⌉ evaluations.
    """
    low, high = 0, len(plans)
    while low < high:
        middle = (low + high) // 2
        reason = f"uniform {plans[middle].label}"
        outcome = yield from history.evaluate(plans[middle].assignment, reason)
        low, high = (low, middle) if outcome.meets_goal else (middle + 1, high)
    return plans[high] if high < len(plans) else None
