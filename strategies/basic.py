"""Uniform plans, then fall-back in the order of sensitivity."""

from collections.abc import Generator

from strategies.base import Outcome, Proposal, Search, Strategy
from strategies.bracket import bracket
from strategies.history import History
from strategies.space import Assignment
from strategies.uniform import UniformPlan, cheapest, frontier, safest, uniform_plans


class Basic(Strategy):
    """Find the best uniform plan, then mix the cheaper ones with it, one after the other.

    The units of a uniform plan that did not meet the goal fall back, most sensitive first, to the
    best plan so far (to FP32, or whatever harms least, where no plan met the goal). Doubling and
    bisection find how many must.
    """

    def search(self) -> Search:
        """Yield proposals; receive each one's outcome; return when done."""
        history = History(self.space)
        plans = frontier(uniform_plans(self.space))
        yield from bracket(plans, history)
        for plan in reversed(plans):
            if history.best == cheapest(self.space):
                return
            if history.is_cheaper(plan.assignment):
                yield from self._fall_back(plan, history)

    def _fall_back(self, plan: UniformPlan, history: History) -> Generator[Proposal, Outcome, None]:
        refuge = history.best or safest(self.space)
        order = self._by_sensitivity(plan.assignment, refuge)
        mixes = [_mix(plan.assignment, refuge, order[:count]) for count in range(len(order))]
        mixes = [mix for mix in mixes if self.space.cost(mix) < self.space.cost(refuge)]
        low, high, step = 1, len(mixes), 1  # mixes[0], the plan itself, is taken to have failed
        while low < high:
            found = high < len(mixes)
            count = (low + high) // 2 if found else min(low + step - 1, len(mixes) - 1)
            reason = f"{plan.label}, the {count} most sensitive units fall back"
            outcome = yield from history.evaluate(mixes[count], reason)
            low, high = (low, count) if outcome.meets_goal else (count + 1, high)
            step *= 2

    def _by_sensitivity(self, plan: Assignment, refuge: Assignment) -> list[int]:
        """Return the units on which the plans differ, those first that harm `plan` most."""
        units = self.space.units
        harm = {
            k: units[k].options[plan[k]].damage - units[k].options[refuge[k]].damage
            for k in range(len(units))
            if plan[k] != refuge[k]
        }
        return sorted(harm, key=lambda k: -harm[k])


def _mix(plan: Assignment, refuge: Assignment, fallen: list[int]) -> Assignment:
    """Return `plan` with the units in `fallen` as in `refuge`."""
    back = set(fallen)
    return tuple(refuge[k] if k in back else plan[k] for k in range(len(plan)))
