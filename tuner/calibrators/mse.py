"""The range of least mean squared quantization error."""

import torch
from torch import Tensor

from tuner import formats
from tuner.calibrators import minmax
from tuner.calibrators.base import Range, RowRanges, finite_rows
from tuner.calibrators.density import density_of
from tuner.calibrators.grid_error import grid_error
from tuner.calibrators.search import Error, Sweep, best_ends, best_magnitude, best_pair
from tuner.kernels import codec_of
from tuner.ranges import qparams_from_range, step_bounds
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_CHUNK = 128 * 1024  # values that stay in the cache over all candidates

_HISTOGRAM_SWEEP = Sweep(coarse=48, smallest=0.005, fine=33)
_ROW_SWEEP = Sweep(coarse=20, smallest=0.06, fine=15)
_UNEVEN_ROW_SWEEP = Sweep(coarse=20, smallest=0.06, fine=41)  # floats: outliers want more


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range that minimises Σ (x − Q(x))² over the density of the histogram.

    Clipping is included, and Q is the grid that `qparams_from_range` gives: the real levels of
    the scheme.
    """
    density = density_of(statistics.overall)
    if density is None:
        return 0.0, 0.0
    error = grid_error(density, scheme)
    if scheme.symmetric:
        full = torch.tensor([statistics.amax], dtype=torch.float64)
        amax = float(best_magnitude(error, full, _HISTOGRAM_SWEEP)[1])
        return -amax, amax
    codes = scheme.quant_range
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    return best_pair(error, low, high, codes[1] - codes[0] + 1)


def row_ranges(rows: Tensor, scheme: TensorScheme) -> RowRanges:
    """Return the best range of each row of `[rows, n]`, measured on the values themselves."""
    low, high = minmax.row_ranges(rows, scheme)
    if not rows.numel():
        return low, high
    if not bool(rows.sum().isfinite()):
        rows = finite_rows(rows)
    error = _row_error(rows, scheme)
    if scheme.symmetric:
        even = formats.get(scheme.format).kind == "int"
        sweep = _ROW_SWEEP if even else _UNEVEN_ROW_SWEEP
        return best_magnitude(error, torch.maximum(-low, high), sweep)
    codes = scheme.quant_range
    low, high = low.clamp(max=0), high.clamp(min=0)
    return best_ends(error, low, high, codes[1] - codes[0], _ROW_SWEEP)


def _row_error(rows: Tensor, scheme: TensorScheme) -> Error:
    """Sum the squared error of each row's values."""
    length = max(1, _CHUNK // rows.shape[1])
    codec = codec_of(formats.get(scheme.format))

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
                ends = (_of_block(bound, k, block) for bound in bounds)
                nearest = codec.round_(rounded.copy_(step), *ends)
                total[k, block] = nearest.sub_(step).square_().sum(-1)
        return total.double() * scale.double() ** 2  # in fp32 the square may underflow

    return error


def _like(bound: float | Tensor, rows: Tensor) -> float | Tensor:
    return bound.to(rows.dtype) if isinstance(bound, Tensor) else bound


def _of_block(bound: float | Tensor, k: int, block: slice) -> float | Tensor:
    return bound[k, block, None] if isinstance(bound, Tensor) else bound
