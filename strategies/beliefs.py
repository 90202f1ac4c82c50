"""What a search believes about damage and about where the goal breaks."""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from strategies.observed import NOISE, TAU
from strategies.table import Floats, Ints

_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Beliefs:
    """Weighted samples of a posterior.

    A sample holds the damage of every option, `damages[sample, unit, option]` (inf where there is
    no option), and the link to the drop in multiples of what the goal allows:

        log drop = offset + power · log Σ_i damages[i, plan[i]]

    The goal is met where log drop ≤ 0, up to the noise of an evaluation.
    """

    damages: Floats
    offset: Floats
    power: Floats
    weight: Floats

    @property
    def budgets(self) -> Floats:
        """The total damage at which each sample expects the goal to break."""
        return np.asarray(np.exp(-self.offset / self.power))

    @property
    def mean_damages(self) -> Floats:
        """The expected damage of every option, `[units, options]`."""
        exists = np.isfinite(self.damages[0])
        mean = np.tensordot(self.weight, np.where(exists, self.damages, 0.0), axes=1)
        return np.where(exists, mean, np.inf)

    def totals(self, plans: Ints) -> Floats:
        """Return the total damage of plans `[plans, units]` in each sample, `[plans, samples]`."""
        total = np.zeros((len(self.weight), len(plans)))
        for unit in range(plans.shape[1]):
            total += self.damages[:, unit, plans[:, unit]]
        return total.T

    def chance(self, totals: Floats) -> Floats:
        """Return how probably plans with these totals `[..., samples]` meet the goal."""
        log_drop = self.offset + self.power * np.log(np.maximum(totals, _TINY))
        return np.asarray(ndtr(-log_drop / np.hypot(TAU, NOISE)) @ self.weight)
