"""The range that is best for the Laplace or Gauss distribution that fits the values (ACIQ)."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from tuner.calibrators.base import Range
from tuner.calibrators.density import Density, density_of
from tuner.calibrators.grid_error import grid_error
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_NEWTON_STEPS = 64  # at most; a handful is enough

_Factor = Callable[[int], float]
_Spread = Callable[[Density, int, float], float]


def laplace_range(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the best range of the Laplace distribution with the mean of |x − mean| that was seen.

    Banner, Nahshan and Soudry, 'Post training 4-bit quantization of convolutional networks for
    rapid-deployment', NeurIPS 2019, section 3.
    """
    return _range_of(statistics, scheme, laplace_factor, _laplace_spread)


def gauss_range(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the best range of the Gauss distribution with the variance that was seen.

    The same paper and section.
    """
    return _range_of(statistics, scheme, gauss_factor, _gauss_spread)


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the better of both, by the squared error of the scheme's grid on the histogram."""
    density = density_of(statistics.overall)
    if density is None:
        return 0.0, 0.0
    ranges = [laplace_range(statistics, scheme), gauss_range(statistics, scheme)]
    lows, highs = torch.tensor(ranges, dtype=torch.float64).T.unsqueeze(-1)
    return ranges[int(grid_error(density, scheme)(lows, highs).argmin())]


@lru_cache(maxsize=256)
def laplace_factor(levels: int) -> float:
    """Return α / b for a grid of `levels` on ±α: the root of `c · exp(c) = 3 · levels²`.

    There the error `2b² exp(−α/b) + α² / (3 levels²)`, of clipping and of rounding, is least.
    """
    target = math.log(3) + 2 * math.log(levels)
    factor = target
    for _ in range(_NEWTON_STEPS):
        change = (factor + math.log(factor) - target) / (1 + 1 / factor)
        factor -= change
        if abs(change) < 1e-14 * factor:
            break
    return factor


@lru_cache(maxsize=256)
def gauss_factor(levels: int) -> float:
    """Return α / σ for a grid of `levels` on ±α: the root of `φ(c) − c Q(c) = c / (6 levels²)`.

    φ is the density of the normal distribution and Q its upper tail. There the sum of the clipping
    error and of `α² / (3 levels²)` is least.
    """
    slope = 1 / (6 * levels**2)
    factor = 0.0  # the difference is convex and falls: Newton's steps stay on this side
    for _ in range(_NEWTON_STEPS):
        tail = math.erfc(factor / math.sqrt(2)) / 2
        density = math.exp(-(factor**2) / 2) / math.sqrt(2 * math.pi)
        change = (density - factor * tail - slope * factor) / (tail + slope)
        factor += change
        if abs(change) < 1e-14 * factor:
            break
    return factor


def _range_of(
    statistics: TensorStatistics, scheme: TensorScheme, factor: _Factor, spread: _Spread
) -> Range:
    density = density_of(statistics.overall)
    if density is None:
        return 0.0, 0.0
    low, high = scheme.quant_range
    levels = high - low + 1
    minimum, maximum = statistics.minimum, statistics.maximum
    if not scheme.symmetric and (minimum >= 0 or maximum <= 0):
        return _half_range(minimum, maximum, factor(2 * levels) * spread(density, 0, 0.0))
    zeros = statistics.overall.zeros
    mean = density.mean_value * density.count / statistics.count
    alpha = factor(levels) * spread(density, zeros, mean)
    if scheme.symmetric:
        amax = min(abs(mean) + alpha, statistics.amax)
        return -amax, amax
    return max(minimum, mean - alpha), min(maximum, mean + alpha)


def _half_range(minimum: float, maximum: float, alpha: float) -> Range:
    """Return the range of values of one sign, as after a ReLU (the paper's fused case).

    They are one half of a distribution around 0, of which exact zeros are the other half: its
    whole range ±α would have twice the levels.
    """
    return (minimum, min(maximum, alpha)) if minimum >= 0 else (max(minimum, -alpha), maximum)


def _laplace_spread(density: Density, zeros: int, center: float) -> float:
    total = density.mean_deviation(center) * density.count + zeros * abs(center)
    return total / (density.count + zeros)


def _gauss_spread(density: Density, zeros: int, center: float) -> float:
    filled = density.count / (density.count + zeros)
    return math.hypot(density.deviation(center) * math.sqrt(filled), center * math.sqrt(1 - filled))
