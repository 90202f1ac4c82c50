"""The calibration methods by name."""

from collections.abc import Callable

import torch
from torch import Tensor

from tuner.calibrators import ema, entropy, minmax, mse, percentile
from tuner.calibrators.base import Range, RowRanges
from tuner.errors import UnsupportedError
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

CALIBRATORS: dict[str, Callable[[TensorStatistics, TensorScheme], Range]] = {
    "minmax": minmax.range_of,
    "ema": ema.range_of,
    "percentile": percentile.range_of,
    "mse": mse.range_of,
    "entropy": entropy.range_of,
}
# What can be had of all rows of one tensor at once; one batch is its own average.
ROW_CALIBRATORS: dict[str, Callable[[Tensor, TensorScheme], RowRanges]] = {
    "minmax": minmax.row_ranges,
    "ema": minmax.row_ranges,
    "percentile": percentile.row_ranges,
    "mse": mse.row_ranges,
}


def calibrated_range(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range of a tensor by the scheme's calibration method.

    (0, 0) when no finite value was seen. Raises UnsupportedError for a method that does not exist
    yet.
    """
    if scheme.calibration not in CALIBRATORS:
        raise UnsupportedError(
            f"calibration {scheme.calibration!r} does not exist yet: "
            f"choose one of {', '.join(CALIBRATORS)}"
        )
    return CALIBRATORS[scheme.calibration](statistics, scheme)


def calibrated_row_ranges(rows: Tensor, scheme: TensorScheme) -> RowRanges:
    """Return the range of each row of `[rows, n]`, as (low, high), each `[rows]`."""
    if scheme.calibration in ROW_CALIBRATORS:
        return ROW_CALIBRATORS[scheme.calibration](rows, scheme)
    ranges = []
    for row in rows:
        statistics = TensorStatistics()
        statistics.update(row)
        ranges.append(calibrated_range(statistics, scheme))
    both = torch.tensor(ranges, dtype=rows.dtype, device=rows.device).reshape(-1, 2)
    return both[:, 0], both[:, 1]
