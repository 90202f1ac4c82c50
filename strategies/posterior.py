"""Learning from evaluations: the posterior over the multipliers of predicted damage.

The model, for a plan that gives unit i the option j(i):

    D = Σ_i exp(z[i, j(i)]) · damage[i, j(i)],        log drop = offset + power · log(D / D₀)

where the log multiplier z[i, j] is a sum of Gaussian effects: of the unit, of the option, and of
groups (weight bits, input bits, kind, position), so that one failing plan tells something about
all others. Half of the samples hold, before they see the data, that one to three units are far
off, whatever was predicted: an outlier that no prediction saw can then be found.

Samples come by randomised maximum likelihood: each sample of the prior is fitted to the
observations plus noise by Gauss-Newton (Oliver, Reynolds & Liu, Inverse Theory for Petroleum
Reservoir Characterization, 2008, ch. 10), and weighted by the evidence for its prior.
"""

import numpy as np
from scipy.special import logsumexp

from strategies.beliefs import Beliefs
from strategies.effects import Effect, effects_of
from strategies.observed import Observed
from strategies.space import Space
from strategies.table import Floats, Table

_SAMPLES = 64
_STEPS = 4
_OFFSET_SIGMA = 3.0
_POWER, _POWER_SIGMA, _LEAST_POWER = 0.85, 0.25, 0.2
_OFF_SIGMA, _MOST_OFF = 4.0, 3
_TEMPER = 0.5  # of the evidence, as 64 samples are few
_MARGIN = 0.05  # by which a sample must satisfy a bound for it to be idle
_LOOSE = 1e6  # the deviation of an idle bound
_TINY = 1e-300


class Posterior:
    """Fits the model to the outcomes of one search."""

    def __init__(self, space: Space, table: Table, seed: int) -> None:
        self._table = table
        self._seed = seed
        self._effects = effects_of(space, table.costs.shape[1])
        self._log_damages = np.log(np.maximum(table.damages, _TINY))

    def learn(self, observed: Observed) -> Beliefs:
        """Return the beliefs after these observations (at least one)."""
        rng = np.random.default_rng([self._seed, len(observed.plans)])
        fit = _Fit(self._log_damages - self._centre(observed), self._effects, observed, rng)
        damages, offset, power = fit.damages(), *fit.link()
        damages[:, self._table.damages == 0] = 0.0
        return Beliefs(damages, offset, power, fit.weight())

    def _centre(self, observed: Observed) -> float:
        """Return log D₀: the predicted damage of the plan whose drop is nearest to the goal."""
        nearest = observed.plans[np.argmin(np.abs(observed.value))]
        units = np.arange(len(nearest))
        return float(np.log(self._table.damages[units, nearest].sum() + _TINY))


class _Fit:
    """All samples at once. Parameters (`point`) are whitened: their prior is N(0, 1)."""

    def __init__(
        self,
        log_damages: Floats,
        effects: tuple[Effect, ...],
        observed: Observed,
        rng: np.random.Generator,
    ) -> None:
        self._log_damages = log_damages
        self._effects = effects
        self._observed = observed
        self._scale = _scale(effects, rng)
        self._middle = float(observed.value.mean())
        prior = rng.standard_normal(self._scale.shape)
        noise = rng.standard_normal((_SAMPLES, len(observed.plans)))
        self._point = prior
        for _ in range(_STEPS):
            self._point = self._step(prior, observed.value + observed.sigma * noise)

    def link(self) -> tuple[Floats, Floats]:
        """Return offset and power, `[samples]` each."""
        offset, power = (self._scale[:, -2:] * self._point[:, -2:]).T
        return self._middle + offset, np.maximum(_POWER + power, _LEAST_POWER)

    def damages(self) -> Floats:
        """Return damage in multiples of D₀, `[samples, units, options]`; inf without an option."""
        return np.asarray(np.exp(self._log_multipliers() + self._log_damages))

    def weight(self) -> Floats:
        """Return the weight of each sample: the tempered evidence for its prior, to first order."""
        gap, _, gram, idle = self._linearise(np.zeros_like(self._point), self._observed.value)
        fit = np.einsum("sk,sk->s", gap, np.linalg.solve(gram, gap[:, :, None])[:, :, 0])
        volume = np.linalg.slogdet(gram)[1] - 2 * np.log(_LOOSE) * idle.sum(axis=1)
        evidence = -0.5 * (fit + volume)
        weight = np.exp(_TEMPER * (evidence - evidence.max()))
        return np.asarray(weight / weight.sum())

    def _step(self, prior: Floats, target: Floats) -> Floats:
        gap, slope, gram, _ = self._linearise(prior, target)
        pull = np.linalg.solve(gram, gap[:, :, None])
        return np.asarray(prior + (slope.transpose(0, 2, 1) @ pull)[:, :, 0])

    def _linearise(
        self, origin: Floats, target: Floats
    ) -> tuple[Floats, Floats, Floats, np.typing.NDArray[np.bool_]]:
        """Return the gap at `origin`, the slope, its Gram matrix with noise, and idle bounds."""
        value, slope = self._predict()
        bound = self._observed.bound
        idle = (bound != 0) & (bound * (value - target) > _MARGIN)
        sigma = np.where(idle, _LOOSE, self._observed.sigma)
        gram = slope @ slope.transpose(0, 2, 1) + sigma[:, :, None] ** 2 * np.eye(len(bound))
        gap = np.where(idle, 0.0, target - value)
        return gap + np.einsum("skp,sp->sk", slope, self._point - origin), slope, gram, idle

    def _predict(self) -> tuple[Floats, Floats]:
        """Return log drop `[samples, plans]` and its slope `[samples, plans, parameters]`."""
        offset, power = self.link()
        z = self._log_multipliers() + self._log_damages
        units = np.arange(z.shape[1])
        logs = np.stack([z[:, units, plan] for plan in self._observed.plans], axis=1)
        total = logsumexp(logs, axis=-1, keepdims=True)
        share = power[:, None, None] * np.exp(logs - total)
        parts = [self._gather(effect, share) for effect in self._effects]
        slope = np.concatenate([*parts, np.ones_like(total), total], axis=-1)
        value = offset[:, None] + power[:, None] * total[:, :, 0]
        return value, slope * self._scale[:, None, :]

    def _gather(self, effect: Effect, share: Floats) -> Floats:
        """Sum the shares `[samples, plans, units]` of the units over an effect's levels."""
        level = effect.level[np.arange(share.shape[2]), self._observed.plans]
        row = np.arange(share.shape[0] * share.shape[1]).reshape(*share.shape[:2], 1)
        flat = (row * effect.count + level).ravel()
        sums = np.bincount(flat, share.ravel(), minlength=row.size * effect.count)
        return np.asarray(sums.reshape(*share.shape[:2], effect.count), dtype=np.float64)

    def _log_multipliers(self) -> Floats:
        theta, start = self._scale * self._point, 0
        z = np.zeros((len(theta), *self._log_damages.shape))
        for effect in self._effects:
            z += theta[:, start + effect.level]
            start += effect.count
        return z


def _scale(effects: tuple[Effect, ...], rng: np.random.Generator) -> Floats:
    """Return the prior deviation of every parameter, `[samples, parameters]`."""
    row = [np.full(effect.count, effect.sigma) for effect in effects]
    scale = np.tile(np.concatenate([*row, [_OFFSET_SIGMA, _POWER_SIGMA]]), (_SAMPLES, 1))
    units = effects[0].count
    for sample in range(_SAMPLES // 2):
        off = min(units, int(rng.integers(1, _MOST_OFF + 1)))
        scale[sample, rng.choice(units, off, replace=False)] = _OFF_SIGMA
    return scale
