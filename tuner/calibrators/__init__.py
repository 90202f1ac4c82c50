"""From statistics to a range: one calibration method a file."""

from tuner.calibrators.base import Range, RowRanges
from tuner.calibrators.table import (
    CALIBRATORS,
    Calibrator,
    calibrated_range,
    calibrated_row_ranges,
    calibrator,
)

__all__ = [
    "CALIBRATORS",
    "Calibrator",
    "Range",
    "RowRanges",
    "calibrated_range",
    "calibrated_row_ranges",
    "calibrator",
]
