"""The range that an L2 search finds by moving the ends of a histogram inwards."""

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.calibrators.base import Range
from tuner.calibrators.density import Floats, density_of
from tuner.calibrators.grid_error import grid_error
from tuner.calibrators.search import Error
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_QUANTILE = 1e-5  # of the values: how far an end moves at once
_CANDIDATES = 96  # of a path, at first

_Move = tuple[float, int]


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range of least squared error on one path from the full range inwards.

    The search of torch.ao.quantization's HistogramObserver: the end moves whose next quantile
    step frees more bins. Here the error is that of the scheme's real grid, the whole path is
    looked at and not only what precedes the first rise, and an end goes on where a bin holds more
    than one step (there one gets stuck).
    """
    histogram, density = statistics.overall.histogram, density_of(statistics.overall)
    if histogram is None or density is None:
        return 0.0, 0.0
    used = histogram.counts.nonzero()[0]
    inside = slice(used[0], used[-1] + 2)
    edges = histogram.edges[inside].clip(statistics.minimum, statistics.maximum)
    path = edges[_path(histogram.counts[inside][: edges.size - 1])]
    low, high = _best_on(path, grid_error(density, scheme))
    amax = max(-low, high)
    return (-amax, amax) if scheme.symmetric else (low, high)


def _best_on(path: Floats, error: Error) -> Range:
    """Return the candidate of least error: first of some, then of all between its neighbours."""
    apart = -(-len(path) // _CANDIDATES)
    best = apart * _argmin(path[::apart], error)
    first = max(best - apart, 0)
    low, high = path[first + _argmin(path[first : best + apart + 1], error)]
    return float(low), float(high)


def _argmin(ranges: Floats, error: Error) -> int:
    candidates = torch.from_numpy(ranges)
    return int(error(candidates[:, :1], candidates[:, 1:]).argmin())


def _path(counts: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the edges of each candidate `[n, 2]`, one bin narrower each, the full range first."""
    lower, upper = _moves(counts), _moves(counts[::-1])
    left = right = below = above = 0  # bins freed and moves made at each end
    freed = [(0, 0)]
    while below < len(lower) or above < len(upper):
        if above == len(upper) or (below < len(lower) and lower[below][0] > upper[above][0]):
            left, below = lower[below][1], below + 1
        else:
            right, above = upper[above][1], above + 1
        if left + right >= counts.size:
            break
        freed.append((left, right))
    both = np.array(freed).sum(axis=1)
    total = np.arange(both[-1] + 1)
    start = np.interp(total, both, [low for low, _ in freed]).astype(np.intp)
    return np.stack((start, counts.size - (total - start)), axis=1)


def _moves(counts: NDArray[np.int64]) -> list[_Move]:
    """Return the moves of one end: bins freed for each quantile step, and freed in all.

    An end stays before the bin that its quantile falls into.
    """
    share = np.cumsum(counts) / counts.sum()
    steps = np.floor(share / _QUANTILE) + 1  # the first that goes beyond each bin
    targets = np.searchsorted(share, steps * _QUANTILE, side="right")
    targets = np.maximum(targets, np.arange(counts.size) + 1).tolist()
    moves: list[_Move] = []
    freed, step = 0, 0.0
    while (target := targets[freed]) < counts.size:
        needed = float(steps[freed])
        moves.append(((target - freed) / (needed - step), target))
        freed, step = target, needed
    return moves
