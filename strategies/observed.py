"""What outcomes say about drops, in the units in which damage is fitted to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from strategies.base import Outcome
from strategies.table import Floats, Ints

TAU = 0.15  # of log drop: what no multipliers explain
NOISE = 0.2  # of the drop, in multiples of what the goal allows: the evaluation's own noise
_CLEAR = 0.3  # a drop below this multiple says only that it is below
_FAILED = 3.0  # a failed trial says only that its drop is above this multiple
_FAR = 4.0  # beyond this multiple a drop's size says less and less (metrics saturate)
_NEAR = 0.05  # the goal allows at least this share of the least miss
_HUGE = 1e12


@dataclass(frozen=True, eq=False)
class Observed:
    """Plans `[plans, units]` and the log of their drops, in multiples of what the goal allows.

    `bound` is 0 where the drop was measured, −1 where it is only known to be at most `value`, and
    1 where it is only known to be at least that. The goal is met where log drop ≤ 0.
    """

    plans: Ints
    value: Floats
    sigma: Floats
    bound: Ints


def observe(outcomes: Sequence[Outcome]) -> Observed:
    """Return what outcomes say; how much the goal allows is judged by the best plan among them."""
    slack = _slack(outcomes)
    violation = np.array([o.violation for o in outcomes])
    failed = ~np.isfinite(violation)
    drop = np.clip(np.where(failed, 0.0, violation) / slack, -1.0, _HUGE) + 1.0
    drop = np.where(failed, _FAILED, drop)
    clear = np.maximum(drop, _CLEAR)
    far = 0.35 * np.log(np.maximum(clear / _FAR, 1.0))
    return Observed(
        plans=np.array([o.assignment for o in outcomes], dtype=np.intp),
        value=np.log(clear),
        sigma=np.sqrt(TAU**2 + (NOISE / clear) ** 2 + far**2),
        bound=np.where(failed, 1, np.where(drop < _CLEAR, -1, 0)),
    )


def _slack(outcomes: Sequence[Outcome]) -> float:
    """Return how far FP32 lies inside the goal: taken to be as far as the best plan seen."""
    inside = max((-o.violation for o in outcomes), default=0.0)
    missed = [o.violation for o in outcomes if np.isfinite(o.violation) and o.violation > 0]
    return max(inside, _NEAR * min(missed, default=0.0)) or 1.0
