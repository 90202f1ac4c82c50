"""The multiple-choice knapsack for many guesses of the damage at once."""

import numpy as np

from strategies.table import Floats, Ints, Table

_HALVINGS = 24
_LOG_RANGE = 60.0


def cheapest_within(table: Table, damages: Floats, budgets: Floats) -> Ints:
    """Return, for each sample, a cheap plan whose total damage is within that sample's budget.

    Bisects the multiplier λ of the Lagrangian cost + λ·damage; where not even the largest λ fits,
    the plan is the least damaging one.

    Args:
        table: the costs.
        damages: `[samples, units, options]`.
        budgets: `[samples]`.

    Returns:
        Option indices, `[samples, units]`.
    """
    scale = np.max(table.costs, where=table.exists, initial=0.0)
    costs = table.costs / (scale if scale > 0 else 1.0)
    low = np.full(len(budgets), -_LOG_RANGE)
    high = np.full(len(budgets), _LOG_RANGE)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        plans = _minimise(costs, damages, middle)
        fits = np.take_along_axis(damages, plans[:, :, None], axis=2).sum(axis=(1, 2)) <= budgets
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return _minimise(costs, damages, high)


def _minimise(costs: Floats, damages: Floats, log_lambda: Floats) -> Ints:
    weighed = costs + np.exp(log_lambda)[:, None, None] * damages
    return np.asarray(np.argmin(weighed, axis=-1), dtype=np.intp)
