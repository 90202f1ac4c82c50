"""The calibration methods by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner import formats
from tuner.calibrators import aciq, ema, entropy, histogram, minmax, mse, percentile
from tuner.calibrators.base import Range, RowRanges
from tuner.errors import SchemeError
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

_INTEGER = ("int",)  # what rests on equal steps between the levels
_LEVELS = ("int", "float", "codebook")  # what needs to know the levels
_ANY = ("int", "float", "codebook", "function")


@dataclass(frozen=True)
class Calibrator:
    """One method: the range of a tensor from its statistics.

    `row_ranges` gives the ranges of all rows of one tensor at once, for methods that can. `kinds`
    are the kinds of formats that the method is defined for.
    """

    range_of: Callable[[TensorStatistics, TensorScheme], Range]
    row_ranges: Callable[[Tensor, TensorScheme], RowRanges] | None = None
    kinds: tuple[str, ...] = _ANY


CALIBRATORS: dict[str, Calibrator] = {
    "minmax": Calibrator(minmax.range_of, minmax.row_ranges),
    "ema": Calibrator(ema.range_of, minmax.row_ranges),  # one batch is its own average
    "percentile": Calibrator(percentile.range_of, percentile.row_ranges),
    "mse": Calibrator(mse.range_of, mse.row_ranges, kinds=_LEVELS),
    "entropy": Calibrator(entropy.range_of, kinds=_INTEGER),
    "aciq": Calibrator(aciq.range_of, kinds=_INTEGER),
    "aciq_laplace": Calibrator(aciq.laplace_range, kinds=_INTEGER),
    "aciq_gauss": Calibrator(aciq.gauss_range, kinds=_INTEGER),
    "histogram": Calibrator(histogram.range_of, kinds=_INTEGER),
}


def calibrator(scheme: TensorScheme) -> Calibrator:
    """Return the scheme's calibration method.

    Raises SchemeError where the method is not defined for the scheme's format.
    """
    found, fmt = CALIBRATORS[scheme.calibration], formats.get(scheme.format)
    if fmt.kind not in found.kinds:
        fitting = [name for name, other in CALIBRATORS.items() if fmt.kind in other.kinds]
        raise SchemeError(
            f"calibration {scheme.calibration!r} does not work for {fmt.name}, a format of kind "
            f"{fmt.kind!r}: choose one of {', '.join(fitting)}, or a format of kind "
            f"{' or '.join(found.kinds)}"
        )
    return found


def calibrated_range(statistics: TensorStatistics, scheme: TensorScheme) -> Range:
    """Return the range of a tensor by the scheme's calibration method.

    (0, 0) when no finite value was seen. Raises SchemeError where method and format do not fit.
    """
    return calibrator(scheme).range_of(statistics, scheme)


def calibrated_row_ranges(rows: Tensor, scheme: TensorScheme) -> RowRanges:
    """Return the range of each row of `[rows, n]`, as (low, high), each `[rows]`.

    Raises SchemeError where method and format do not fit.
    """
    method = calibrator(scheme)
    if method.row_ranges is not None:
        return method.row_ranges(rows, scheme)
    ranges = []
    for row in rows:
        statistics = TensorStatistics()
        statistics.update(row)
        ranges.append(method.range_of(statistics, scheme))
    both = torch.tensor(ranges, dtype=rows.dtype, device=rows.device).reshape(-1, 2)
    return both[:, 0], both[:, 1]
