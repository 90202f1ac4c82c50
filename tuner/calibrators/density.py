"""The density of a histogram's values, and its squared distance to a grid of levels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.histogram import BINS
from tuner.statistics import TensorSummary

Floats = NDArray[np.float64]

_POINT = 1e-6  # of a bin: what is narrower is one point
_CHUNK = 32 * 1024  # numbers that stay in the cache


@dataclass(frozen=True, eq=False)
class Density:
    """Values spread evenly over the bins of a histogram, with their integrated distribution.

    Positions count bins from the left edge of the first bin that is used: `x / width − first`.
    `edges` `[n + 1]` are clipped to the extremes that were seen. With F the number of values below
    a position, `C(t) = ∫F` up to t is a quadratic in each bin; `coefficients` `[3, n + 1]` hold
    it, in powers of the distance from the bin's left edge.
    """

    width: float
    first: int
    edges: Floats
    counts: Floats
    count: float
    mean: float
    variance: float
    coefficients: Floats

    def squared_error(self, scale: Floats, zero_point: Floats, levels: Floats) -> Floats:
        """Return the sum of (x − nearest level)² for the grids `scale · (levels − zero_point)`.

        `scale` and `zero_point` are `[k, 1]`, `levels` `[n]` ascend; the result is `[k]`, in
        squares of a bin width. With y the levels and t the middles between them,
        `Σ (x − Q(x))² = Σ (x − y_n)² − 2 Σ (y_j − y_{j−1}) C(t_j)`: one look-up a level.
        """
        scale = scale / self.width
        shift = scale * zero_point + self.first
        middles, gaps = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
        gain = np.empty(scale.shape[0])
        for part in _parts(scale.shape[0], middles.size):
            gain[part] = self._integral(middles * scale[part] - shift[part]) @ gaps
        top = (scale * levels[-1] - shift)[:, 0]
        error: Floats = self._squared_distance(top) - 2 * scale[:, 0] * gain
        return error

    def uniform_error(self, scale: Floats, low: Floats, high: Floats) -> Floats:
        """Return the same for the levels `scale · low … scale · high`, from all bins.

        `scale`, `low` and `high` are `[k, 1]`. The cost grows with the bins and not the levels.
        With `v = x / s` and `r = clamp(rne(v), low, high)` the antiderivative of `(v − r)²` is
        `r / 12 + (v − r)³ / 3`, clipping included.
        """
        scale = scale / self.width
        error = np.empty(scale.shape[0])
        for part in _parts(scale.shape[0], self.edges.size):
            steps = (self.edges + self.first) / scale[part]
            rounded = steps.round().clip(low[part], high[part])
            error[part] = _mean_squares(steps, rounded) @ self.counts
        error *= scale[:, 0] ** 2
        return error

    @property
    def mean_value(self) -> float:
        """The mean, in the unit of the values."""
        return (self.mean + self.first) * self.width

    def mean_deviation(self, center: float) -> float:
        """Return the mean of |x − center|."""
        position = np.array([center / self.width - self.first])
        below = 2 * self._integral(position)[0] / self.count
        return float(below + self.mean - position[0]) * self.width

    def deviation(self, center: float) -> float:
        """Return the root of the mean of (x − center)²."""
        distance = self.mean + self.first - center / self.width
        return math.hypot(distance, math.sqrt(self.variance)) * self.width

    def _squared_distance(self, point: Floats) -> Floats:
        distance = point - self.mean
        return (distance * distance + self.variance) * self.count

    def _integral(self, positions: Floats) -> Floats:
        inside = positions.clip(self.edges[0], self.edges[-1])
        index = inside.astype(np.intp)
        offset = np.subtract(inside, index, out=inside)
        constant, linear, square = self.coefficients
        result: Floats = square.take(index)
        result *= offset
        result += linear.take(index)
        result *= offset
        result += constant.take(index)
        if positions.max(initial=0.0) > self.edges[-1]:
            result += self.count * (positions - self.edges[-1]).clip(min=0)
        return result


def density_of(summary: TensorSummary) -> Density | None:
    """Return the density of what was seen without exact zeros; None when nothing else was.

    Every grid holds 0, therefore zeros cost nothing, whatever the range.
    """
    histogram = summary.histogram
    if histogram is None:
        return None
    counts = histogram.counts.astype(np.float64)
    counts[BINS // 2] -= summary.zeros
    used = counts.nonzero()[0]
    if not used.size:
        return None
    first, end = int(used[0]), int(used[-1]) + 1
    seen = np.array([summary.minimum, summary.maximum]) / histogram.width + BINS // 2 - first
    edges = np.arange(end - first + 1.0).clip(*seen)
    return _from_bins(histogram.width, first - BINS // 2, edges, counts[first:end])


def _parts(rows: int, columns: int) -> Iterator[slice]:
    length = max(1, _CHUNK // columns)
    return (slice(start, start + length) for start in range(0, rows, length))


def _mean_squares(steps: Floats, rounded: Floats) -> Floats:
    """Return the mean of (v − rne(v))² between neighbours in `steps` `[k, n + 1]`."""
    rest = steps - rounded
    square = rest * rest
    integral = np.diff(rounded / 12 + square * rest / 3)
    width = np.diff(steps)
    mean: Floats = np.divide(integral, width, out=square[:, 1:], where=width > _POINT)
    return mean


def _from_bins(width: float, first: int, edges: Floats, counts: Floats) -> Density:
    spans = np.diff(edges)
    middles = edges[:-1] + spans / 2
    count = float(counts.sum())
    mean = float(middles @ counts) / count
    variance = float(((middles - mean) ** 2 + spans**2 / 12) @ counts) / count
    return Density(
        width=width,
        first=first,
        edges=edges,
        counts=counts,
        count=count,
        mean=mean,
        variance=variance,
        coefficients=_quadratics(edges, spans, counts),
    )


def _quadratics(edges: Floats, spans: Floats, counts: Floats) -> Floats:
    """Return the coefficients of C in each bin, and in one more that continues the last."""
    spread = spans > _POINT
    rate = np.divide(counts, spans, out=np.zeros_like(counts), where=spread)
    below = np.concatenate(([0.0], np.cumsum(counts)))
    area = (below[:-1] + np.where(spread, counts / 2, 0.0)) * spans
    start = np.concatenate(([0.0], np.cumsum(area)))
    coefficients = np.stack((start, below, np.append(rate / 2, 0.0)))
    offset = edges[0]  # the first bin begins inside: its quadratic is in (x − offset)
    coefficients[:2, 0] = rate[0] / 2 * offset**2, -rate[0] * offset
    return coefficients
