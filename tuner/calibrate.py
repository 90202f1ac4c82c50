"""Scale and zero point from calibration data, in one pass."""

import warnings
from collections.abc import Iterable, Iterator

from torch import Tensor

from tuner.errors import CalibrationWarning, DataError, SchemeError
from tuner.kernels import check_floats, compute_dtype, from_rows, parameter_shape, to_rows
from tuner.ranges import QParams, qparams_from_range
from tuner.row_statistics import RowStatistics
from tuner.schemes import TensorScheme


def calibrate(batches: Iterable[Tensor], scheme: TensorScheme) -> QParams:
    """Return the scale and zero point of a static scheme from batches of one tensor.

    `batches` is read once; statistics are kept for each scale, so all batches must agree on the
    shape of the scale. Non-finite values are left out, with one CalibrationWarning that counts
    them. Raises DataError when there are no batches, no finite values, batches that do not fit
    each other, or something other than floating-point tensors; SchemeError for a dynamic scheme.
    """
    if scheme.is_dynamic:
        raise SchemeError(
            "a dynamic scheme takes its range at run time: there is nothing to calibrate"
        )
    statistics = RowStatistics([scheme.calibration])
    first: Tensor | None = None
    values = 0
    for x in _checked(batches):
        first = x if first is None else first
        _check_shape(x, first, scheme)
        values += x.numel()
        statistics.update(to_rows(x, scheme.reach))
    if first is None:
        raise DataError("there are no calibration batches: give at least one tensor")
    _report(statistics.count, values - statistics.count)
    return _qparams(statistics, first, scheme)


def _checked(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise DataError(
            f"calibrate needs an iterable of tensors, got a {type(batches).__name__}: "
            "put a single tensor into a list"
        )
    for number, x in enumerate(batches):
        check_floats(x, f"calibration (batch {number})")
        yield x.detach()


def _check_shape(x: Tensor, first: Tensor, scheme: TensorScheme) -> None:
    shapes = [tuple(t.shape) for t in (first, x)]
    expected, found = (parameter_shape(shape, scheme.reach) for shape in shapes)
    if expected != found:
        raise DataError(
            f"a batch of shape {list(x.shape)} gives scales of shape {list(found)}, "
            f"the first one of shape {list(first.shape)} gave {list(expected)}: "
            f"batches must agree on it with {scheme.granularity!r}"
        )


def _report(count: int, nonfinite: int) -> None:
    if not count:
        raise DataError(
            f"no finite calibration values: {nonfinite} were NaN or inf, none were left"
        )
    if nonfinite:
        warnings.warn(
            f"{nonfinite} of {count + nonfinite} calibration values are NaN or inf: left out",
            CalibrationWarning,
            stacklevel=3,
        )


def _qparams(statistics: RowStatistics, like: Tensor, scheme: TensorScheme) -> QParams:
    ends = (e.to(like.device, compute_dtype(like.dtype)) for e in statistics.ranges(scheme))
    low, high = (from_rows(end, tuple(like.shape), scheme.reach) for end in ends)
    return qparams_from_range(low, high, scheme)
