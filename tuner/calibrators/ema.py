"""The exponential moving average of the batches' ranges."""

from tuner.calibrators.base import Range
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics


def range_of(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the EMA of the batches' minima and maxima with `scheme.ema_decay`.

    Jacob et al., CVPR 2018, section 3.1; the first batch initialises the average.
    """
    return statistics.ema_range(scheme.ema_decay)
