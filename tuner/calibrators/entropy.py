"""The range whose quantized distribution diverges least from the original one."""

import numpy as np
from numpy.typing import NDArray

from tuner.calibrators.base import Range
from tuner.histogram import Counts
from tuner.ranges import symmetric_zero_point
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_Floats = NDArray[np.float64]


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range of least Kullback-Leibler divergence, as TensorRT calibrates.

    For `i` bins of `|x|`, P is the histogram up to `i` with the outliers folded into its last bin,
    and Q the same without outliers, averaged over `groups` levels where it is not empty; the last
    `i` of least KL(P‖Q) gives `amax`. (S. Migacz, '8-bit inference with TensorRT', GTC 2017.)
    `groups` is the number of codes that a magnitude can take: on one side of the zero point, or
    all of them for an affine scheme whose values have one sign.
    """
    histogram = statistics.overall.histogram
    if histogram is None:
        return 0.0, 0.0
    counts = histogram.magnitudes
    counts[0] -= statistics.overall.zeros  # every grid holds 0 exactly
    if not counts.any():
        return 0.0, 0.0
    bins = _best_bins(counts, _levels(statistics, scheme))
    amax = min(bins * histogram.width, statistics.amax) if bins else statistics.amax
    if scheme.symmetric:
        return -amax, amax
    return max(statistics.minimum, -amax), min(statistics.maximum, amax)


def _levels(statistics: TensorStatistics, scheme: TensorScheme) -> int:
    low, high = scheme.quant_range
    if scheme.symmetric:
        zero = symmetric_zero_point(scheme)
        return (min(high - zero, zero - low) or max(high - zero, zero - low)) + 1
    one_sided = statistics.minimum >= 0 or statistics.maximum <= 0
    return high - low + 1 if one_sided else (high - low + 1) // 2


def _best_bins(counts: Counts, groups: int) -> int:
    """Return the number of bins to keep; 0 where there are no more bins than levels."""
    used = int(np.flatnonzero(counts)[-1]) + 1
    if used <= groups:
        return 0
    kept = np.arange(groups, used + 1)
    divergence = _divergences(counts[:used].astype(np.float64), kept, groups)
    return int(kept[kept.size - 1 - np.argmin(divergence[::-1])])


def _divergences(counts: _Floats, kept: NDArray[np.int64], groups: int) -> _Floats:
    """Return KL(P‖Q) for every number of kept bins, from prefix sums.

    `Σ P log(P / Q)` splits into `Σ P log P`, a prefix sum, and `Σ P log Q`, in which Q is
    constant over the filled bins of a group.
    """
    total = counts.sum()
    mass, filled, entropy = (_prefix(v) for v in (counts, counts > 0, _x_log_x(counts)))
    outliers = total - mass[kept]
    last = counts[kept - 1]
    own = entropy[kept] - _x_log_x(last) + _x_log_x(last + outliers) - total * np.log(total)
    bounds = -(-np.arange(groups + 1) * kept[:, None] // groups)
    group_mass = np.diff(mass[bounds], axis=1)
    group_filled = np.maximum(np.diff(filled[bounds], axis=1), 1)
    level = group_mass / group_filled / np.maximum(mass[kept], 1)[:, None]
    log_level = np.log(level, out=np.zeros_like(level), where=level > 0)
    group_mass[:, -1] += outliers
    divergence: _Floats = (own - (group_mass * log_level).sum(axis=1)) / total
    # where the last bin is empty, the outliers make P > 0 and Q is 0
    divergence[(last == 0) & (outliers > 0)] = np.inf
    return divergence


def _prefix(values: NDArray[np.generic]) -> _Floats:
    return np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))


def _x_log_x(values: _Floats) -> _Floats:
    logarithm = np.log(values, out=np.zeros_like(values), where=values > 0)
    return values * logarithm
