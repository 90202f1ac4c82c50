"""The range that an L2 search finds by moving the ends of a histogram inwards."""

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.calibrators.base import Range
from tuner.calibrators.density import density_of
from tuner.calibrators.grid_error import grid_error
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_QUANTILE = 1e-5  # of the values: how far an end moves at once
_BATCH = 64  # candidates measured at once; the search ends when none of them is better

_Move = tuple[float, int]


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range of least squared error on one path from the full range inwards.

    The search of torch.ao.quantization's HistogramObserver: the end moves whose next quantile
    step frees more bins, until the error grows. Here the error is that of the scheme's real grid,
    and both ends go on where a bin holds more than one step (there one gets stuck).
    """
    histogram, density = statistics.overall.histogram, density_of(statistics.overall)
    if histogram is None or density is None:
        return 0.0, 0.0
    used = histogram.counts.nonzero()[0]
    inside = slice(used[0], used[-1] + 2)
    edges = histogram.edges[inside].clip(statistics.minimum, statistics.maximum)
    path = edges[_path(histogram.counts[inside][: edges.size - 1])]
    error, best, least = grid_error(density, scheme), path[0], np.inf
    for start in range(0, len(path), _BATCH):
        candidates = torch.from_numpy(path[start : start + _BATCH])
        errors = error(candidates[:, :1], candidates[:, 1:])
        index = int(errors.argmin())
        if not float(errors[index]) < least:
            break
        best, least = path[start + index], float(errors[index])
    low, high = float(best[0]), float(best[1])
    amax = max(-low, high)
    return (-amax, amax) if scheme.symmetric else (low, high)


def _path(counts: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the edges of each candidate `[n, 2]`, the full range first."""
    lower, upper = _moves(counts), _moves(counts[::-1])
    left = right = below = above = 0  # bins freed and moves made at each end
    path = [(0, counts.size)]
    while below < len(lower) or above < len(upper):
        if above == len(upper) or (below < len(lower) and lower[below][0] > upper[above][0]):
            left, below = lower[below][1], below + 1
        else:
            right, above = upper[above][1], above + 1
        if left + right >= counts.size:
            break
        path.append((left, counts.size - right))
    return np.array(path, dtype=np.intp)


def _moves(counts: NDArray[np.int64]) -> list[_Move]:
    """Return the moves of one end: bins freed for each quantile step, and freed in all.

    An end stays before the bin that its quantile falls into.
    """
    share = np.cumsum(counts) / counts.sum()
    steps = np.floor(share / _QUANTILE) + 1  # the first that goes beyond each bin
    targets = np.searchsorted(share, steps * _QUANTILE).tolist()
    moves: list[_Move] = []
    freed, step = 0, 0.0
    while (target := targets[freed]) < counts.size:
        needed = float(steps[freed])
        moves.append(((target - freed) / (needed - step), target))
        freed, step = target, needed
    return moves
