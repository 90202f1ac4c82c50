"""The squared error of a scheme's own grid over a histogram's density."""

import numpy as np
import torch
from torch import Tensor

from tuner.calibrators.density import Density, Floats
from tuner.calibrators.search import Error
from tuner.ranges import QParams, qparams_from_range, step_bounds
from tuner.schemes import TensorScheme

_MOST_LEVELS = 512  # beyond, a histogram has fewer bins than twice the levels


def grid_error(density: Density, scheme: TensorScheme) -> Error:
    """Return the function from candidates low, high `[k, 1]` to their squared errors `[k, 1]`.

    The grid is the one that `qparams_from_range` gives: the real levels of the scheme. The errors
    are in squares of a bin width, for comparison only.
    """
    codes = scheme.quant_range
    few = codes[1] - codes[0] < _MOST_LEVELS
    measure = _error_of_levels if few else _error_of_bins

    def error(low: Tensor, high: Tensor) -> Tensor:
        qparams = qparams_from_range(low, high, scheme)
        return torch.from_numpy(measure(density, scheme, qparams)).unsqueeze(-1)

    return error


def _error_of_levels(density: Density, scheme: TensorScheme, qparams: QParams) -> Floats:
    low, high = scheme.quant_range
    scale, zero_point = torch.as_tensor(qparams.scale), qparams.zero_point
    zero = torch.as_tensor(0 if zero_point is None else zero_point).expand_as(scale)
    return density.squared_error(scale.numpy(), zero.numpy(), np.arange(low, high + 1.0))


def _error_of_bins(density: Density, scheme: TensorScheme, qparams: QParams) -> Floats:
    scale = torch.as_tensor(qparams.scale)
    bounds = (torch.as_tensor(b).expand_as(scale).numpy() for b in step_bounds(scheme, qparams))
    return density.uniform_error(scale.numpy(), *bounds)
