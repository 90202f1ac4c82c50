"""The squared error of a scheme's own grid over a histogram's density."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from tuner import formats
from tuner.calibrators.density import Density, Floats
from tuner.calibrators.search import Error
from tuner.kernels import codec_of
from tuner.ranges import QParams, qparams_from_range, step_bounds
from tuner.schemes import TensorScheme

_MOST_LEVELS = 512  # beyond, a histogram has fewer bins than twice the levels


def grid_error(density: Density, scheme: TensorScheme) -> Error:
    """Return the function from candidates low, high `[k, 1]` to their squared errors `[k, 1]`.

    The grid is the one that `qparams_from_range` gives: the real levels of the scheme. The errors
    are in squares of a bin width, for comparison only.
    """
    levels = levels_of(scheme)
    if levels is None and formats.get(scheme.format).kind != "int":
        return _prefer_wide
    measure = _error_of_bins if levels is None else partial(_error_of_levels, levels=levels)

    def error(low: Tensor, high: Tensor) -> Tensor:
        qparams = qparams_from_range(low, high, scheme)
        return torch.from_numpy(measure(density, scheme, qparams)).unsqueeze(-1)

    return error


def levels_of(scheme: TensorScheme) -> Floats | None:
    """Return the values that a scheme can hold in units of the scale, None if there are many."""
    fmt = formats.get(scheme.format)
    if fmt.kind == "int":
        low, high = scheme.quant_range
        return np.arange(low, high + 1.0) if high - low < _MOST_LEVELS else None
    if fmt.codebook:
        return np.unique(np.array(fmt.codebook))
    if 2**fmt.bits > _MOST_LEVELS:
        return None
    numbers = codec_of(fmt).decode(torch.arange(2**fmt.bits)).numpy()
    return np.unique(numbers[np.isfinite(numbers)])


def _prefer_wide(low: Tensor, high: Tensor) -> Tensor:
    """Stand for floats of many bits: their error hardly depends on the scale, so none is cut."""
    return low - high


def _error_of_levels(
    density: Density, scheme: TensorScheme, qparams: QParams, levels: Floats
) -> Floats:
    scale, zero_point = torch.as_tensor(qparams.scale), qparams.zero_point
    zero = torch.as_tensor(0 if zero_point is None else zero_point).expand_as(scale)
    return density.squared_error(scale.numpy(), zero.numpy(), levels)


def _error_of_bins(density: Density, scheme: TensorScheme, qparams: QParams) -> Floats:
    scale = torch.as_tensor(qparams.scale)
    bounds = (torch.as_tensor(b).expand_as(scale).numpy() for b in step_bounds(scheme, qparams))
    return density.uniform_error(scale.numpy(), *bounds)
