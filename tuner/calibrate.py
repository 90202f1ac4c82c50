"""Scale and zero point from calibration data, in one pass."""

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tuner.calibrators import calibrated_range
from tuner.calibrators.base import finite_ranges
from tuner.errors import CalibrationWarning, DataError, SchemeError
from tuner.kernels import check_floats, compute_dtype, from_rows, parameter_shape, to_rows
from tuner.ranges import QParams, qparams_from_range
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics, TensorSummary, summarize

_NEED_ONLY_RANGES = ("minmax", "ema")


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
    rows: list[TensorStatistics] = []
    first: Tensor | None = None
    nonfinite = 0
    for x in _checked(batches):
        first = x if first is None else first
        _check_shape(x, first, scheme)
        nonfinite += x.numel() - int(torch.isfinite(x).sum())
        summaries = _summarize_rows(to_rows(x, scheme.reach), scheme)
        rows = rows or [TensorStatistics() for _ in summaries]
        for statistics, summary in zip(rows, summaries, strict=True):
            statistics.merge(summary)
    if first is None:
        raise DataError("there are no calibration batches: give at least one tensor")
    _report(sum(statistics.count for statistics in rows), nonfinite)
    return _qparams(rows, first, scheme)


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


def _summarize_rows(rows: Tensor, scheme: TensorScheme) -> list[TensorSummary]:
    if scheme.calibration not in _NEED_ONLY_RANGES:
        return [summarize(row) for row in rows]
    ends = (end.tolist() for end in finite_ranges(rows))
    counts = torch.isfinite(rows).sum(-1).tolist()
    return [TensorSummary(*fields) for fields in zip(*ends, counts, strict=True)]


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


def _qparams(rows: list[TensorStatistics], like: Tensor, scheme: TensorScheme) -> QParams:
    ranges = [calibrated_range(statistics, scheme) for statistics in rows]
    ends = torch.tensor(ranges, dtype=torch.float64).to(like.device, compute_dtype(like.dtype))
    low, high = (from_rows(end, tuple(like.shape), scheme.reach) for end in ends.unbind(-1))
    return qparams_from_range(low, high, scheme)
