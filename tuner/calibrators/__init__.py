"""From statistics to a range: one calibration method a file."""

from tuner.calibrators.base import Range, RowRanges
from tuner.calibrators.table import (
    CALIBRATORS,
    ROW_CALIBRATORS,
    calibrated_range,
    calibrated_row_ranges,
)

__all__ = [
    "CALIBRATORS",
    "ROW_CALIBRATORS",
    "Range",
    "RowRanges",
    "calibrated_range",
    "calibrated_row_ranges",
]
