"""Synthetic tuning problems: a Space whose true damage is known to the test, not to the search."""

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from strategies.base import Outcome, Strategy
from strategies.ladder import build_ladder
from strategies.replay import SearchRun
from strategies.space import Assignment, Option, Space, Unit
from strategies.table import table_of

_WEIGHTED = ("W8A8", "W6A8", "W4A8", "W3A8", "W2A8", "W6A6", "W4A6", "W4A4", "W3A4", "W2A4")
_UNWEIGHTED = ("A8", "A6", "A4")
_BASELINE = 0.95


@dataclass(frozen=True)
class Landscape:
    """A Space, the true damage of every option, and a noisy accuracy that depends on its sum."""

    name: str
    space: Space
    true_damage: tuple[tuple[float, ...], ...]
    noise: float = 0.0015
    power: float = 1.0
    samples: int = 800

    @property
    def slack(self) -> float:
        """The drop that the goal allows: 1 % of the baseline."""
        return 0.01 * _BASELINE

    def evaluate(self, assignment: Assignment) -> Outcome:
        """Return the outcome of a plan; the noise is a function of the plan alone."""
        total = math.fsum(d[i] for d, i in zip(self.true_damage, assignment, strict=True))
        digest = hashlib.sha256(repr((self.name, assignment)).encode()).digest()
        shift = np.random.default_rng(list(digest)).normal()
        drop = (_BASELINE - 0.1) * (1 - math.exp(-(total**self.power))) + self.noise * shift
        drop = round(drop * self.samples) / self.samples
        return Outcome(assignment, self.space.cost(assignment), drop - self.slack)


@dataclass(frozen=True)
class Found:
    """What a search reached: the cost of its best plan over FP32's, and after how many trials."""

    ratio: float
    evaluations: int


def float_plan(space: Space) -> Assignment:
    """Return the plan that quantizes nothing (every unit of a landscape ends with FP32)."""
    return tuple(len(unit.options) - 1 for unit in space.units)


def run(strategy: Strategy, landscape: Landscape, limit: int = 100) -> Found:
    """Run a search to its end or `limit` evaluations."""
    full = best = landscape.space.cost(float_plan(landscape.space))
    search, count = SearchRun(strategy, {}), 0
    while count < limit and (proposal := search.next()) is not None:
        outcome = landscape.evaluate(proposal.assignment)
        search.tell(outcome)
        count += 1
        if outcome.meets_goal:
            best = min(best, outcome.cost)
    return Found(best / full, count)


def optimum(landscape: Landscape) -> float:
    """Return the cost, over FP32's, of the cheapest rung of the true ladder that meets the goal."""
    damages = np.full(table_of(landscape.space).costs.shape, np.inf)
    for row, harms in enumerate(landscape.true_damage):
        damages[row, : len(harms)] = harms
    rungs = build_ladder(replace(table_of(landscape.space), damages=damages))
    quiet = replace(landscape, noise=0.0, samples=10**9)
    met = [k for k, rung in enumerate(rungs) if quiet.evaluate(rung).meets_goal]
    return float(rungs.costs[met[0]] / landscape.space.cost(float_plan(landscape.space)))


def _bits(label: str) -> tuple[int | None, int]:
    weight, _, inputs = label.removeprefix("W").rpartition("A")
    return (int(weight) if weight else None), int(inputs)


def _true(label: str, sensitivity: float, split: float) -> float:
    weight, inputs = _bits(label)
    harm = (1 - split) * 4.0**-inputs
    return sensitivity * (harm if weight is None else harm + split * 4.0**-weight)


def _cost(label: str, macs: float) -> float:
    weight, inputs = _bits(label)
    return macs * (inputs if weight is None else weight) * inputs


def mixed_int(
    name: str,
    units: int,
    seed: int,
    *,
    hardness: float = 1.0,
    spread: float = 1.7,
    misprediction: float = 0.7,
    outliers: int = 0,
    a4_factor: float = 1.0,
    noise: float = 0.0015,
    power: float = 1.0,
    labels: tuple[str, ...] = _WEIGHTED,
) -> Landscape:
    """Build a landscape like the preset `mixed-int`.

    `hardness` is the true damage of uniform W4A6 in multiples of what the goal allows;
    `outliers` units are ten thousand times as sensitive; `a4_factor` multiplies the true damage of
    every A4 option without the prediction knowing; the drop grows with damage to the `power`.
    """
    rng = np.random.default_rng(seed)
    sensitivity = rng.lognormal(0.0, spread, units)
    split = rng.uniform(0.2, 0.8, units)
    macs = rng.lognormal(0.0, 1.0, units)
    kinds = rng.choice(["Conv2d", "Linear", "matmul"], units, p=[0.5, 0.35, 0.15])
    budget = (-math.log1p(-0.01 * _BASELINE / (_BASELINE - 0.1))) ** (1 / power)
    middle = [_true("W4A6", s, b) for s, b in zip(sensitivity, split, strict=True)]
    sensitivity *= hardness * budget / math.fsum(middle)
    sensitivity[rng.choice(units, outliers, replace=False)] *= 1e4
    built, truths = [], []
    for i in range(units):
        names = labels if kinds[i] != "matmul" else _UNWEIGHTED[: len(labels)]
        truth = [_true(label, sensitivity[i], split[i]) for label in names]
        guess = np.array(truth) * rng.lognormal(0.0, misprediction, len(truth))
        worse = [a4_factor if _bits(label)[1] == 4 else 1.0 for label in names]
        truth = [harm * factor for harm, factor in zip(truth, worse, strict=True)]
        built.append(_unit(f"{kinds[i]}.{i}", str(kinds[i]), names, macs[i], guess))
        truths.append((*truth, 0.0))
    return Landscape(name, Space(tuple(built)), tuple(truths), noise, power)


def _unit(
    name: str, kind: str, labels: tuple[str, ...], macs: float, damage: NDArray[np.float64]
) -> Unit:
    options = [Option(n, _cost(n, macs), float(d)) for n, d in zip(labels, damage, strict=True)]
    return Unit(name, kind, (*options, Option("FP32", macs * 1024, 0.0, is_float=True)))


def suite() -> tuple[Landscape, ...]:
    """Return the landscapes that `auto` is tuned and compared on."""
    plain = [
        mixed_int(f"plain-{units}-{hardness:g}", units, 10 + k, hardness=hardness)
        for k, (units, hardness) in enumerate(
            zip(
                (8, 8, 12, 20, 30, 40, 50, 60, 80, 100, 120, 120),
                (1.0, 8.0, 0.2, 3.0, 1.0, 0.05, 20.0, 1.0, 5.0, 0.5, 1.0, 50.0),
                strict=True,
            )
        )
    ]
    hard = [
        mixed_int("outliers-20", 20, 31, outliers=2),
        mixed_int("outliers-60", 60, 32, outliers=4),
        mixed_int("outliers-120", 120, 33, outliers=3, hardness=3.0),
        mixed_int("a4-30", 30, 34, a4_factor=100.0, hardness=0.05),
        mixed_int("a4-80", 80, 35, a4_factor=100.0, hardness=0.3),
        mixed_int("noisy-20", 20, 36, noise=0.004),
        mixed_int("noisy-80", 80, 37, noise=0.004, misprediction=1.0),
        mixed_int("flat-40", 40, 40, power=0.6),
        mixed_int("flat-100", 100, 41, power=0.5, hardness=3.0),
        mixed_int("steep-30", 30, 42, power=1.5),
        mixed_int("blind-50", 50, 38, misprediction=1.5),
        mixed_int("int8-40", 40, 39, labels=("W8A8",), hardness=800.0),
    ]
    return (*plain, *hard)
