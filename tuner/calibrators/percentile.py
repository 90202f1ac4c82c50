"""The range that leaves out the outermost values."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.calibrators.base import Range, RowRanges
from tuner.histogram import Counts
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_Edges = NDArray[np.float64]


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range that holds the given percentage of the values.

    Symmetric: `±percentile(|x|, p)`. Affine: `percentile(x, 100 − p)` to `percentile(x, p)`.
    The histogram is read with linear interpolation inside a bin.
    """
    histogram = statistics.overall.histogram
    if histogram is None:
        return 0.0, 0.0
    if scheme.symmetric:
        edges = histogram.edges[histogram.edges.size // 2 :].clip(max=statistics.amax)
        amax = _quantile(histogram.magnitudes, edges, scheme.percentile)
        return -amax, amax
    edges = histogram.edges.clip(statistics.minimum, statistics.maximum)
    tails = (100 - scheme.percentile, scheme.percentile)
    low, high = (_quantile(histogram.counts, edges, percent) for percent in tails)
    return low, high


def row_ranges(rows: Tensor, scheme: TensorScheme) -> RowRanges:
    """Return the same for each row, exactly; non-finite values are left out."""
    if scheme.symmetric:
        amax = _row_quantile(rows.abs(), scheme.percentile)
        return -amax, amax
    high = _row_quantile(rows, scheme.percentile)
    return _row_quantile(rows, 100 - scheme.percentile), high


def _quantile(counts: Counts, edges: _Edges, percent: float) -> float:
    """Return the value of the given rank, each bin's values taken as spread evenly over it."""
    total = int(counts.sum())
    rank = (total - 1) * percent / 100 + 0.5
    if rank >= total - 0.5:
        return float(edges[-1])
    if rank <= 0.5:
        return float(edges[0])
    below = np.concatenate(([0], np.cumsum(counts)))
    index = int(np.searchsorted(below, rank, side="left")) - 1
    fraction = (rank - below[index]) / counts[index]
    return float(edges[index] + fraction * (edges[index + 1] - edges[index]))


def _row_quantile(rows: Tensor, percent: float) -> Tensor:
    """Return the quantile of each row's finite values, linear between ranks; 0 without any."""
    finite = torch.isfinite(rows)
    ordered = torch.where(finite, rows, torch.inf).sort(-1).values
    last = finite.sum(-1, keepdim=True) - 1
    rank = last.clamp(min=0) * (percent / 100)
    below = rank.floor()
    low, high = (ordered.gather(-1, index.long()) for index in (below, rank.ceil()))
    quantile = low + (high - low) * (rank - below).to(rows.dtype)
    return torch.where(last < 0, 0.0, quantile).squeeze(-1)
