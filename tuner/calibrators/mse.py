"""The range of least mean squared quantization error."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.calibrators import minmax
from tuner.calibrators.base import Range, RowRanges, finite_rows
from tuner.histogram import BINS
from tuner.kernels import clamp_steps
from tuner.ranges import qparams_from_range, step_bounds
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_CHUNK = 128 * 1024  # values that stay in the cache over all candidates

_Error = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Sweep:
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


_HISTOGRAM_SWEEP = _Sweep(coarse=36, smallest=0.005, fine=17)
_ROW_SWEEP = _Sweep(coarse=20, smallest=0.06, fine=15)


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range that minimises Σ count · err² over the histogram.

    The error of a bin is the integral of (x − Q(x))² over it, clipping included, with Q the grid
    that `qparams_from_range` gives: the real levels of the scheme.
    """
    histogram = statistics.overall.histogram
    if histogram is None:
        return 0.0, 0.0
    counts = histogram.counts.copy()
    counts[BINS // 2] -= statistics.overall.zeros  # 0 is on every grid: no error
    used = counts.nonzero()[0]
    if not used.size:
        return 0.0, 0.0
    edges = histogram.edges[used[0] : used[-1] + 2]
    edges = edges.clip(statistics.minimum, statistics.maximum)
    density = torch.from_numpy(counts[used[0] : used[-1] + 1]).double()
    error = _histogram_error(density, torch.from_numpy(edges), scheme)
    low = torch.tensor([statistics.minimum], dtype=torch.float64)
    high = torch.tensor([statistics.maximum], dtype=torch.float64)
    low, high = _search(error, low, high, scheme, _HISTOGRAM_SWEEP)
    return float(low), float(high)


def row_ranges(rows: Tensor, scheme: TensorScheme) -> RowRanges:
    """Return the best range of each row of `[rows, n]`, measured on the values themselves."""
    low, high = minmax.row_ranges(rows, scheme)
    if not rows.numel():
        return low, high
    if not bool(rows.sum().isfinite()):
        rows = finite_rows(rows)
    return _search(_row_error(rows, scheme), low, high, scheme, _ROW_SWEEP)


def _search(
    error: _Error, low: Tensor, high: Tensor, scheme: TensorScheme, sweep: _Sweep
) -> RowRanges:
    """Shrink the ranges `low`, `high` `[rows]`, to those of least error.

    `error` takes candidates `[k, rows]` and returns their errors.
    """
    if scheme.symmetric:
        return _search_magnitude(error, torch.maximum(-low, high), sweep)
    return _search_ends(error, low.clamp(max=0), high.clamp(min=0), scheme, sweep)


def _search_magnitude(error: _Error, full: Tensor, sweep: _Sweep) -> RowRanges:
    coarse = full * sweep.ratios(full)
    amax = _best(error, -coarse, coarse)[1]
    fine = torch.minimum(amax * sweep.nearby(full), full)
    return _best(error, -fine, fine)


def _search_ends(
    error: _Error, full_low: Tensor, full_high: Tensor, scheme: TensorScheme, sweep: _Sweep
) -> RowRanges:
    """Sweep both ends together or one alone, each with the other fixed, the zero point, and finely.

    At few bits the zero point decides: there the error has a minimum for each of its values.
    """
    ratios, nearby = sweep.ratios(full_low), sweep.nearby(full_low)
    lows, highs = full_low * ratios, full_high * ratios
    all_low, all_high = full_low.expand_as(lows), full_high.expand_as(highs)
    low, high = _best(error, torch.cat([lows, all_low, lows]), torch.cat([highs, highs, all_high]))
    low, high = _best(error, lows, high.expand_as(highs))
    low, high = _best(error, low.expand_as(lows), highs)

    codes = scheme.quant_range
    step = (high - low) / (codes[1] - codes[0])
    shift = torch.tensor([-2, -1, 0, 1, 2]).to(low).view(-1, 1, 1) * step
    near_low, near_high = ((end * nearby[::2] + shift).flatten(0, 1) for end in (low, high))
    low, high = _best(
        error, near_low.clamp(max=0).maximum(full_low), near_high.clamp(min=0).minimum(full_high)
    )
    near = torch.maximum(low * nearby, full_low)
    low, high = _best(error, near, high.expand_as(near))
    near = torch.minimum(high * nearby, full_high)
    return _best(error, low.expand_as(near), near)


def _best(error: _Error, low: Tensor, high: Tensor) -> RowRanges:
    index = error(low, high).argmin(0, keepdim=True)
    return low.gather(0, index).squeeze(0), high.gather(0, index).squeeze(0)


def _histogram_error(density: Tensor, edges: Tensor, scheme: TensorScheme) -> _Error:
    """Integrate the squared error over bins with `density` values each, evenly spread.

    With `v = x / s` and `r = clamp(rne(v), low, high)` the antiderivative of `(v − r)²` is
    `r / 12 + (v − r)³ / 3`, clipping included.
    """

    def error(low: Tensor, high: Tensor) -> Tensor:
        qparams = qparams_from_range(low, high, scheme)
        scale = torch.as_tensor(qparams.scale)
        steps = edges / scale
        rounded = torch.clamp(steps.round(), *step_bounds(scheme, qparams))
        rest = steps - rounded
        integral = (rounded / 12 + rest**3 / 3).diff()
        width = steps.diff()
        mean = torch.where(width > 1e-6, integral / width, rest[:, 1:] ** 2)
        return scale**2 * (mean @ density).unsqueeze(-1)

    return error


def _row_error(rows: Tensor, scheme: TensorScheme) -> _Error:
    """Sum the squared error of each row's values."""
    length = max(1, _CHUNK // rows.shape[1])

    def error(low: Tensor, high: Tensor) -> Tensor:
        qparams = qparams_from_range(low, high, scheme)
        scale = torch.as_tensor(qparams.scale)
        bounds = [_like(bound, rows) for bound in step_bounds(scheme, qparams)]
        total = torch.empty_like(scale)
        for start in range(0, rows.shape[0], length):
            block = slice(start, start + length)
            values = rows[block]
            step, rounded = torch.empty_like(values), torch.empty_like(values)
            for k in range(scale.shape[0]):
                torch.div(values, scale[k, block, None], out=step)
                torch.round(step, out=rounded)
                clamp_steps(rounded, *(_of_block(bound, k, block) for bound in bounds))
                total[k, block] = rounded.sub_(step).square_().sum(-1)
        return total.double() * scale.double() ** 2  # in fp32 the square may underflow

    return error


def _like(bound: float | Tensor, rows: Tensor) -> float | Tensor:
    return bound.to(rows.dtype) if isinstance(bound, Tensor) else bound


def _of_block(bound: float | Tensor, k: int, block: slice) -> float | Tensor:
    return bound[k, block, None] if isinstance(bound, Tensor) else bound
