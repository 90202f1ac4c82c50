"""What every calibrator shares."""

import math

import torch
from torch import Tensor

from tuner.kernels import is_transformed

Range = tuple[float, float]
RowRanges = tuple[Tensor, Tensor]


def finite_rows(rows: Tensor) -> Tensor:
    """Replace what is not finite by 0, a value that every grid holds."""
    return torch.where(torch.isfinite(rows), rows, 0.0)


def finite_ranges(rows: Tensor, absent: Range = (math.inf, -math.inf)) -> RowRanges:
    """Return the smallest and largest finite value of each row of `[rows, n]`.

    `absent` is the range of a row without any.
    """
    if rows.numel():
        low, high = rows.amin(-1), rows.amax(-1)  # faster than aminmax(dim=-1)
        if not is_transformed() and math.isfinite((high - low).sum(dtype=torch.float64).item()):
            return low, high
        finite = torch.isfinite(rows)
        low = torch.where(finite, rows, math.inf).amin(-1)
        high = torch.where(finite, rows, -math.inf).amax(-1)
    else:
        low = rows.new_full(rows.shape[:1], math.inf)
        high = -low
    missing = low > high
    return low.masked_fill(missing, absent[0]), high.masked_fill(missing, absent[1])
