"""The default: uniform plans by bisection, then the knapsack under what evaluations taught."""

from dataclasses import dataclass, replace

import numpy as np

from strategies.base import Search, Strategy
from strategies.beliefs import Beliefs
from strategies.bracket import bracket
from strategies.corrected import corrected
from strategies.history import History
from strategies.knapsack import cheapest_within
from strategies.ladder import build_ladder
from strategies.observed import observe
from strategies.posterior import Posterior
from strategies.random import is_float
from strategies.space import Assignment, Space
from strategies.table import Floats, Ints, Table, as_assignment, table_of
from strategies.uniform import cheapest, frontier, safest, uniform_plans

_MAX_PROPOSALS = 14
_MAX_WITHOUT_ANY = 18  # proposals, as long as no plan met the goal
_PATIENCE = 6  # refinements in a row that found nothing cheaper
_LEAST_SAVING = 0.004  # expected, as a share of the cost
_SHRINK, _GROW = 0.75, 2.0  # of the boldest saving tried next, after a miss and after a success
_RUNGS = 200
_STARTS = 4
_CLIMB = 25
_BETTER = 1.0001
_HEADROOM = 1.5
_SMALLEST, _LARGEST = 1e-6, 1e6  # costs are told apart within these multiples of the ceiling


@dataclass(frozen=True)
class Guess:
    """A plan that is not evaluated yet, what it would save (log of the cost ratio), how likely."""

    assignment: Assignment
    saving: float
    chance: float

    @property
    def expected(self) -> float:
        """The expected saving."""
        return self.saving * self.chance

    @property
    def reason(self) -> str:
        """Say it in a few words."""
        percent = 100 * (1 - np.exp(-self.saving))
        return f"would save {percent:.1f} %, chance {100 * self.chance:.0f} %"


class Auto(Strategy):
    """Reach the cheapest plan that meets the goal in about a dozen evaluations.

    The uniform plans are bisected first. From then on each plan is the one with the largest
    expected saving, chance of meeting the goal × log(best cost ÷ its cost), among the rungs of the
    knapsack ladder under the damages that evaluations have taught (`strategies.posterior`), the
    knapsack of each posterior sample, and what single steps make of them. A miss shortens the
    saving that may be tried next, a success lengthens it. The search ends when the cheapest
    possible plan passed, when the expected saving is small, or after six misses in a row. Where
    plans are measured, costs go by that (`strategies.corrected`).
    """

    def search(self) -> Search:
        """Yield proposals; receive each one's outcome; return when done."""
        history = History(self.space)
        yield from bracket(frontier(uniform_plans(self.space)), history)
        finder = _Finder(self.space, self.seed)
        reach, misses = np.inf, 0
        while _goes_on(history, misses) and (guess := finder.find(history, reach)):
            outcome = yield from history.evaluate(guess.assignment, guess.reason)
            reach = guess.saving * (_GROW if outcome.meets_goal else _SHRINK)
            found = history.best in (None, guess.assignment)
            misses = 0 if found else misses + 1
        if history.best is None and not is_float(self.space, safest(self.space)):
            yield from history.evaluate(safest(self.space), "the least predicted damage")


def _goes_on(history: History, misses: int) -> bool:
    if history.best is None:
        return 0 < len(history) < _MAX_WITHOUT_ANY
    return misses < _PATIENCE and len(history) < _MAX_PROPOSALS


class _Finder:
    """Finds the plan with the largest expected saving."""

    def __init__(self, space: Space, seed: int) -> None:
        self._predicted = space
        self._seed = seed
        self._posterior = Posterior(space, table_of(space), seed)

    def find(self, history: History, reach: float) -> Guess | None:
        """Return the best new guess whose saving is at most `reach`; None if none is worth it."""
        spaces = corrected(self._predicted, history.outcomes, self._seed)
        ceilings = ((space, _ceiling(space, history)) for space in spaces)
        open_spaces = [(s, ceiling) for s, ceiling in ceilings if ceiling > s.cost(cheapest(s))]
        if not open_spaces:
            return None
        beliefs = self._posterior.learn(observe(history.outcomes))
        climbs = (Climb(table_of(s), beliefs, ceiling, reach) for s, ceiling in open_spaces)
        found = (self._found(climb, history) for climb in climbs)
        return next(filter(None, found), None)

    def _found(self, climb: "Climb", history: History) -> Guess | None:
        """Return the best new guess that a climb reaches; None if none is worth it."""
        starts = self._starts(climb, history)
        tops = [*(climb.up(plan) for plan in starts), *starts]
        worth = 0.0 if history.best is None else _LEAST_SAVING
        guesses = [guess for guess in map(climb.guess, tops) if guess.expected > worth]
        new = [guess for guess in guesses if self._is_new(guess.assignment, history)]
        return max(new, key=lambda guess: guess.expected, default=None)

    def _is_new(self, assignment: Assignment, history: History) -> bool:
        return assignment not in history and not is_float(self._predicted, assignment)

    def _starts(self, climb: "Climb", history: History) -> Ints:
        """Return the most promising plans of the ladder and the samples, and the best so far."""
        table, beliefs = climb.table, climb.beliefs
        ladder = build_ladder(replace(table, damages=beliefs.mean_damages))
        rungs = np.unique(np.linspace(0, len(ladder) - 1, _RUNGS).astype(np.intp))
        plans = np.stack([ladder.plan(int(rung)) for rung in rungs])
        budgets = [beliefs.budgets, beliefs.budgets / 2]
        drawn = [cheapest_within(table, beliefs.damages, budget) for budget in budgets]
        plans = np.unique(np.concatenate([plans, *drawn]), axis=0)
        order = np.argsort(-climb.scores(plans), kind="stable")[:_STARTS]
        best = [] if history.best is None else [history.best]
        return np.array([*best, *plans[order]], dtype=np.intp)


def _ceiling(space: Space, history: History) -> float:
    """Return the cost to undercut: of the best plan and of FP32, else a little above all."""
    refuge = safest(space)
    costs = [space.cost(plan) for plan in (history.best,) if plan is not None]
    if is_float(space, refuge):
        costs.append(space.cost(refuge))
    # corrected savings may be larger than all there is
    least = _SMALLEST * max(space.cost(refuge), 0.0)
    return max(min(costs, default=_HEADROOM * space.cost(refuge)), least)


@dataclass(frozen=True)
class Climb:
    """Improves plans by single steps of single units.

    The score of a plan is saving × chance, its saving being log(ceiling ÷ cost); a plan that saves
    more than `reach`, or nothing, scores −1.
    """

    table: Table
    beliefs: Beliefs
    ceiling: float
    reach: float

    def scores(self, plans: Ints) -> Floats:
        """Return the score of each of `[plans, units]`."""
        return self._score(self.table.cost(plans), self.beliefs.totals(plans))

    def up(self, plan: Ints) -> Ints:
        """Take the best step again and again, until none is better."""
        units = np.arange(len(plan))
        best, score = plan, float(self.scores(plan[None])[0])
        for _ in range(_CLIMB):
            scores = self._neighbours(best)
            unit, option = np.unravel_index(np.argmax(scores), scores.shape)
            if scores[unit, option] <= score * _BETTER:
                break
            score = float(scores[unit, option])
            best = np.where(units == unit, option, best)
        return best

    def guess(self, plan: Ints) -> Guess:
        """Return the plan with its saving and chance."""
        chance = self.beliefs.chance(self.beliefs.totals(plan[None]))[0]
        return Guess(as_assignment(plan), float(self._saving(self.table.cost(plan))), float(chance))

    def _neighbours(self, plan: Ints) -> Floats:
        """Return the scores of all plans that differ in one unit at most, `[units, options]`."""
        units = np.arange(len(plan))
        here = self.beliefs.damages[:, units, plan]
        totals = here.sum(axis=1)[:, None, None] + (self.beliefs.damages - here[:, :, None])
        costs = self.table.cost(plan) + self.table.costs - self.table.costs[units, plan][:, None]
        return self._score(costs, np.moveaxis(totals, 0, -1))

    def _score(self, costs: Floats, totals: Floats) -> Floats:
        saving = self._saving(costs)
        allowed = (saving > 0) & (saving <= self.reach)
        score = np.full(saving.shape, -1.0)
        score[allowed] = saving[allowed] * self.beliefs.chance(totals[allowed])
        return score

    def _saving(self, costs: Floats) -> Floats:
        least = _SMALLEST * self.ceiling
        return np.asarray(np.log(self.ceiling / np.clip(costs, least, _LARGEST * self.ceiling)))
