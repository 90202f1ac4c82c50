"""Optuna's tree-structured Parzen estimator, started from the uniform plans."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import optuna

from strategies.base import Outcome, Proposal, Search, Strategy
from strategies.random import draw, is_float
from strategies.space import Assignment, Space
from strategies.uniform import uniform_plans

_MAX_KNOBS = 40
_MAX_REPEATS = 20  # asks in a row that only repeat seen plans, before a random plan is drawn
_FAILED = 1e30  # a failed trial's violation: worse than any other, but finite


@dataclass(frozen=True)
class Knob:
    """Units, by index, that take the same one of their `size` options."""

    units: tuple[int, ...]
    size: int


class TPE(Strategy):
    """Minimise cost under the constraint that the goal is met; end only when all plans are seen.

    Up to forty units have a categorical knob each; beyond that, neighbours among the units with
    the same options share one.
    """

    exhaustive = True

    def search(self) -> Search:
        """Yield proposals; receive each one's outcome; return when done."""
        sampling = _Sampling(self.space, self.seed)
        outcomes: dict[Assignment, Outcome] = {}
        while len(outcomes) < sampling.total:
            trial, assignment, reason = sampling.ask(outcomes)
            if is_float(self.space, assignment):
                outcomes[assignment] = Outcome(assignment, self.space.cost(assignment), 0.0)
            elif assignment not in outcomes:
                outcomes[assignment] = yield Proposal(assignment, reason)
            sampling.tell(trial, outcomes[assignment])


def make_knobs(space: Space) -> tuple[Knob, ...]:
    """Return one knob a unit, or, for more than forty units, about forty shared ones."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, unit in enumerate(space.units):
        alike.setdefault((unit.kind, *(o.label for o in unit.options)), []).append(index)
    knobs = []
    for labels, members in alike.items():
        share = _MAX_KNOBS * len(members) // len(space.units)
        count = len(members) if len(space.units) <= _MAX_KNOBS else max(1, share)
        for part in np.array_split(members, count):
            units = tuple(part.tolist())
            knobs.append(Knob(units, len(labels) - 1))
    return tuple(sorted(knobs, key=lambda knob: knob.units))


class _Sampling:
    """An in-memory study over the knobs of a space."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._knobs = make_knobs(space)
        self._rng = np.random.default_rng(seed)
        self._repeats = 0
        with _quiet():
            sampler = optuna.samplers.TPESampler(seed=seed)
            self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._queue = list(reversed(uniform_plans(space)))
        self.total = math.prod(knob.size for knob in self._knobs)

    def ask(self, seen: dict[Assignment, Outcome]) -> tuple[optuna.Trial, Assignment, str]:
        """Return the next trial, its plan, and why."""
        reason = "TPE"
        if self._queue:
            plan = self._queue.pop(0)
            reason = f"uniform {plan.label}"
            self._study.enqueue_trial(self._settings(plan.assignment))
        elif self._repeats > _MAX_REPEATS:
            reason = "random, as TPE repeats itself"
            self._study.enqueue_trial(self._settings(draw(self._space, self._rng)))
        trial = self._study.ask(
            {
                str(k): optuna.distributions.CategoricalDistribution(range(knob.size))
                for k, knob in enumerate(self._knobs)
            }
        )
        assignment = self._assignment(trial)
        self._repeats = self._repeats + 1 if assignment in seen else 0
        return trial, assignment, reason

    def tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        """Take what the plan of a trial gave."""
        trial.set_constraint("goal", min(outcome.violation, _FAILED))
        self._study.tell(trial, outcome.known_cost)

    def _settings(self, assignment: Assignment) -> dict[str, int]:
        return {str(k): assignment[knob.units[0]] for k, knob in enumerate(self._knobs)}

    def _assignment(self, trial: optuna.Trial) -> Assignment:
        plan = [0] * len(self._space.units)
        for k, knob in enumerate(self._knobs):
            for unit in knob.units:
                plan[unit] = trial.params[str(k)]
        return tuple(plan)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep optuna from announcing a study, and leave its verbosity as it was."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
