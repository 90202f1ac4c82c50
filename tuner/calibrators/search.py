"""The search for the range of least error, whatever the grid and its error."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.calibrators.base import RowRanges

# takes candidates low, high `[k, rows]` and returns their errors `[k, rows]`
Error = Callable[[Tensor, Tensor], Tensor]

# of best_pair: how many levels are looked up for its first pairs, the smallest fraction of the
# full range, how many candidates of each end follow in each round, and how many rounds
_LOOK_UPS, _SMALLEST, _FINE, _ROUNDS = 40_000, 0.005, 9, 3


@dataclass(frozen=True)
class Sweep:
    """Which fractions of the full range are tried: `coarse` from 1 to `smallest`, then `fine`."""

    coarse: int
    smallest: float
    fine: int

    def ratios(self, like: Tensor) -> Tensor:
        """Return the coarse fractions, a geometric series `[coarse, 1]`."""
        exponents = torch.linspace(0, 1, self.coarse, dtype=torch.float64)
        return torch.pow(self.smallest, exponents).to(like).unsqueeze(-1)

    def nearby(self, like: Tensor) -> Tensor:
        """Return factors `[fine, 1]` from one coarse fraction to the next, 1 in the middle."""
        step = self.smallest ** (1 / (self.coarse - 1))
        exponents = torch.linspace(1, -1, self.fine, dtype=torch.float64)
        return torch.pow(step, exponents).to(like).unsqueeze(-1)


def best_magnitude(error: Error, full: Tensor, sweep: Sweep) -> RowRanges:
    """Shrink the ranges ±`full` `[rows]` to those of least error."""
    coarse = full * sweep.ratios(full)
    amax = _best(error, -coarse, coarse)[1]
    fine = torch.minimum(amax * sweep.nearby(full), full)
    return _best(error, -fine, fine)


def best_ends(
    error: Error, full_low: Tensor, full_high: Tensor, steps: int, sweep: Sweep
) -> RowRanges:
    """Shrink the ranges `full_low` ≤ 0 to `full_high` ≥ 0, `[rows]`, with few candidates.

    Both ends are swept together or one alone, each with the other fixed, the zero point, and
    finely. At few bits the zero point decides: there the error has a minimum for each of its
    values, one step apart, a range having `steps` of them.
    """
    ratios, nearby = sweep.ratios(full_low), sweep.nearby(full_low)
    lows, highs = full_low * ratios, full_high * ratios
    all_low, all_high = full_low.expand_as(lows), full_high.expand_as(highs)
    low, high = _best(error, torch.cat([lows, all_low, lows]), torch.cat([highs, highs, all_high]))
    low, high = _best(error, lows, high.expand_as(highs))
    low, high = _best(error, low.expand_as(lows), highs)

    step = (high - low) / steps
    shift = torch.tensor([-2, -1, 0, 1, 2]).to(low).view(-1, 1, 1) * step
    near_low, near_high = ((end * nearby[::2] + shift).flatten(0, 1) for end in (low, high))
    low, high = _best(
        error, near_low.clamp(max=0).maximum(full_low), near_high.clamp(min=0).minimum(full_high)
    )
    near = torch.maximum(low * nearby, full_low)
    low, high = _best(error, near, high.expand_as(near))
    near = torch.minimum(high * nearby, full_high)
    return _best(error, low.expand_as(near), near)


def best_pair(error: Error, full_low: float, full_high: float, levels: int) -> tuple[float, float]:
    """Shrink the range `full_low` ≤ 0 to `full_high` ≥ 0, where an error costs little.

    All pairs of fractions of both ends are tried, then all pairs near the best, ever nearer. The
    error depends on both ends together, through the zero point: sweeping one at a time can miss
    the best, the more so the fewer `levels` the grid has.
    """
    coarse = min(max(math.isqrt(_LOOK_UPS // levels), 12), 32)
    fine = _FINE if full_low and full_high else 4 * _FINE
    apart = -math.log(_SMALLEST) / (coarse - 1)
    fractions = torch.exp(-apart * torch.arange(coarse, dtype=torch.float64))
    low, high = _best_of_pairs(error, full_low * fractions, full_high * fractions)
    steps = 2.0
    for _ in range(_ROUNDS):
        near = torch.linspace(-1, 1, fine, dtype=torch.float64)
        shift = steps * (high - low) / levels
        lows = _nearby(low, near, apart, shift).clamp(full_low, 0)
        highs = _nearby(high, near, apart, shift).clamp(0, full_high)
        low, high = _best_of_pairs(error, lows, highs)
        apart, steps = (spread * 2 / (fine - 1) for spread in (apart, steps))
    return low, high


def _nearby(end: float, near: Tensor, apart: float, shift: float) -> Tensor:
    """Return ends by the ratio exp(±apart), or ±shift where that is wider: another zero point."""
    return end * torch.exp(apart * near) if abs(end) * apart > shift else end + shift * near


def _best_of_pairs(error: Error, lows: Tensor, highs: Tensor) -> tuple[float, float]:
    lows, highs = (ends if ends.any() else ends[:1] for ends in (lows, highs))
    pairs = torch.cartesian_prod(lows, highs)
    low, high = pairs[error(pairs[:, :1], pairs[:, 1:])[:, 0].argmin()].tolist()
    return low, high


def _best(error: Error, low: Tensor, high: Tensor) -> RowRanges:
    index = error(low, high).argmin(0, keepdim=True)
    return low.gather(0, index).squeeze(0), high.gather(0, index).squeeze(0)
