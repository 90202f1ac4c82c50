"""What one calibration pass keeps of a tensor: enough for the range of every method."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tuner.histogram import BINS, Counts, Histogram
from tuner.kernels import check_floats, flat_view, native_summary
from tuner.kernels.summaries import RawSummary

_CHUNK = 128 * 1024  # values that stay in the cache over all passes
_SMALLEST_EXPONENT = -1000  # of the histogram: all zeros, and what scaling could not hold
_SAFE_EXPONENTS = range(-60, 60)  # scaling and squaring stay inside fp32


@dataclass(frozen=True, eq=False)
class TensorSummary:
    """What one batch says of a tensor; only finite values count, beside `nonfinite`.

    `minimum` is inf and `maximum` −inf when there is no finite value.
    """

    minimum: float = math.inf
    maximum: float = -math.inf
    count: int = 0
    zeros: int = 0
    nonfinite: int = 0
    total: float = 0.0
    total_abs: float = 0.0
    total_squared: float = 0.0
    histogram: Histogram | None = None

    def merged(self, other: "TensorSummary") -> "TensorSummary":
        """Return the summary of both batches together."""
        return TensorSummary(
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            count=self.count + other.count,
            zeros=self.zeros + other.zeros,
            nonfinite=self.nonfinite + other.nonfinite,
            total=self.total + other.total,
            total_abs=self.total_abs + other.total_abs,
            total_squared=self.total_squared + other.total_squared,
            histogram=_merged(self.histogram, other.histogram),
        )


@torch.no_grad()
def summarize(x: Tensor) -> TensorSummary:
    """Return what one batch says of a tensor, in one pass over cache-sized chunks.

    `x` is any floating-point tensor on any device. Raises DataError for other types.
    """
    check_floats(x, "calibration")
    values = flat_view(x.detach())
    native = native_summary(values)
    if native is not None:
        return _summary_of(*native)
    summary = TensorSummary()
    for chunk in _chunks(values):
        summary = summary.merged(_summarize_chunk(chunk))
    return summary


@dataclass(eq=False)
class TensorStatistics:
    """Running statistics of one tensor over all batches.

    `overall` sums up what was seen; `batch_ranges` holds (minimum, maximum) of each batch in
    order, from which the EMA range follows for any decay.
    """

    overall: TensorSummary = field(default_factory=TensorSummary)
    batch_ranges: list[tuple[float, float]] = field(default_factory=list)

    def update(self, x: Tensor) -> None:
        """Add one batch."""
        self.merge(summarize(x))

    def merge(self, summary: TensorSummary) -> None:
        """Add what `summarize` said of one batch."""
        self.overall = self.overall.merged(summary)
        if summary.count:
            self.batch_ranges.append((summary.minimum, summary.maximum))

    @property
    def count(self) -> int:
        """The number of finite values."""
        return self.overall.count

    @property
    def nonfinite(self) -> int:
        """The number of values that were left out: NaN and ±inf."""
        return self.overall.nonfinite

    @property
    def minimum(self) -> float:
        """The smallest finite value, exactly; inf when there is none."""
        return self.overall.minimum

    @property
    def maximum(self) -> float:
        """The largest finite value, exactly; −inf when there is none."""
        return self.overall.maximum

    @property
    def amax(self) -> float:
        """The largest finite magnitude, exactly; 0 when there is none."""
        return max(-self.minimum, self.maximum) if self.count else 0.0

    @property
    def mean(self) -> float:
        """The mean of the finite values; 0 when there is none."""
        return self.overall.total / max(self.count, 1)

    def ema_range(self, decay: float) -> tuple[float, float]:
        """Return the EMA of the batches' minima and maxima, `decay · old + (1 − decay) · new`.

        The first batch initialises it. (0, 0) when nothing was seen.
        """
        if not self.batch_ranges:
            return 0.0, 0.0
        low, high = self.batch_ranges[0]
        for batch_low, batch_high in self.batch_ranges[1:]:
            low = decay * low + (1 - decay) * batch_low
            high = decay * high + (1 - decay) * batch_high
        return low, high


def _summary_of(raw: RawSummary, counts: Counts) -> TensorSummary:
    return TensorSummary(
        minimum=raw.low,
        maximum=raw.high,
        count=raw.count,
        zeros=raw.zeros,
        nonfinite=raw.nonfinite,
        total=raw.total,
        total_abs=raw.total_abs,
        total_squared=raw.total_squared,
        histogram=Histogram(raw.exponent, counts) if raw.count else None,
    )


def _merged(one: Histogram | None, other: Histogram | None) -> Histogram | None:
    return one.merged(other) if one and other else one or other


def _chunks(values: Tensor) -> Iterator[Tensor]:
    length = _CHUNK if values.device.type == "cpu" else max(values.numel(), 1)
    for chunk in torch.split(values, length) if values.numel() else ():
        yield chunk if chunk.dtype == torch.float64 else chunk.to(torch.float32)


def _summarize_chunk(chunk: Tensor) -> TensorSummary:
    low, high = _range(chunk)
    nonfinite = 0
    if not math.isfinite(low - high):
        finite = chunk[torch.isfinite(chunk)]
        nonfinite = chunk.numel() - finite.numel()
        if not finite.numel():
            return TensorSummary(nonfinite=nonfinite)
        chunk, (low, high) = finite, _range(finite)
    exponent = _exponent(max(-low, high))
    if exponent not in _SAFE_EXPONENTS:
        chunk = chunk.double()
    zeros = _count_zeros(chunk) if low <= 0 <= high else 0
    return TensorSummary(
        minimum=low,
        maximum=high,
        count=chunk.numel(),
        zeros=zeros,
        nonfinite=nonfinite,
        total=float(chunk.sum()),
        total_abs=float(chunk.abs().sum()),
        total_squared=float(torch.dot(chunk, chunk)),
        histogram=Histogram(exponent, _bin(chunk, exponent)),
    )


def _exponent(amax: float) -> int:
    """Return the smallest exponent with `amax < 2^exponent`."""
    return max(math.frexp(amax)[1], _SMALLEST_EXPONENT) if amax else _SMALLEST_EXPONENT


def _range(chunk: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(chunk)
    return float(low), float(high)


def _count_zeros(chunk: Tensor) -> int:
    if chunk.device.type == "cpu":  # numpy counts several times faster
        return chunk.numel() - int(np.count_nonzero(chunk.numpy() != 0))
    return chunk.numel() - int(torch.count_nonzero(chunk))


def _bin(chunk: Tensor, exponent: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Count the values in each bin of ±2^exponent; scaling by a power of two is exact."""
    per_unit = math.ldexp(BINS // 2, -exponent)
    bins = (chunk * per_unit).floor_().to(torch.int16).add_(BINS // 2)
    counts: np.ndarray[tuple[int], np.dtype[np.int64]]
    counts = torch.bincount(bins, minlength=BINS).cpu().numpy()
    return counts
