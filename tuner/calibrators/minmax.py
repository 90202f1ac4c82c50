"""The whole range of what was seen."""

from torch import Tensor

from tuner.calibrators.base import Range, RowRanges, finite_ranges
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the exact minimum and maximum."""
    if not statistics.count:
        return 0.0, 0.0
    return statistics.minimum, statistics.maximum


def row_ranges(rows: Tensor, scheme: TensorScheme) -> RowRanges:
    """Return the exact minimum and maximum of each row's finite values; 0 without any."""
    return finite_ranges(rows, absent=(0.0, 0.0))
