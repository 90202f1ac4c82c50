"""What a calibration pass keeps, against numpy on the full data."""

import math

import numpy as np
import pytest
import torch

from tuner.errors import DataError, TunerError
from tuner.histogram import BINS, Histogram
from tuner.statistics import TensorStatistics, TensorSummary, summarize

SUM_TOLERANCE = 1e-5  # chunks are summed in fp32, their sums in fp64


def collect(*batches: torch.Tensor) -> TensorStatistics:
    statistics = TensorStatistics()
    for batch in batches:
        statistics.update(batch)
    return statistics


def numpy_counts(x: torch.Tensor, exponent: int) -> np.ndarray:
    edges = np.linspace(-(2.0**exponent), 2.0**exponent, BINS + 1)
    return np.histogram(x.double().numpy(), edges)[0]


def histogram_of(statistics: TensorStatistics) -> Histogram:
    histogram = statistics.overall.histogram
    assert histogram is not None
    return histogram


@pytest.mark.parametrize("size", [1, 1000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_against_numpy(size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(size) * 3 + 1).to(dtype)
    x[: size // 3] = x[: size // 3].relu()
    full = x.double().numpy()
    found = collect(x).overall
    assert found.minimum == full.min()
    assert found.maximum == full.max()
    assert found.count == size
    assert found.zeros == (full == 0).sum()
    assert found.nonfinite == 0
    scale = np.abs(full).sum()
    assert found.total == pytest.approx(full.sum(), abs=SUM_TOLERANCE * scale)
    assert found.total_abs == pytest.approx(scale, rel=SUM_TOLERANCE)
    assert found.total_squared == pytest.approx((full**2).sum(), rel=SUM_TOLERANCE)
    exponent = found.histogram.exponent if found.histogram else 0
    assert 2.0 ** (exponent - 1) <= np.abs(full).max() < 2.0**exponent
    assert np.array_equal(histogram_of(collect(x)).counts, numpy_counts(x, exponent))


def test_counts_do_not_depend_on_the_order_of_batches() -> None:
    batches = [torch.randn(5000) * scale for scale in (1e-4, 1.0, 0.02, 50.0, 0.0, 7.0)]
    whole = collect(torch.cat(batches))
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 2, 4, 1]):
        one = collect(*(batches[i] for i in order))
        assert histogram_of(one).exponent == histogram_of(whole).exponent
        assert np.array_equal(histogram_of(one).counts, histogram_of(whole).counts)
        assert (one.minimum, one.maximum, one.count) == (
            whole.minimum,
            whole.maximum,
            whole.count,
        )


def test_range_that_grows_fifty_times() -> None:
    batches = [torch.randn(20_000), torch.randn(20_000) * 50]
    statistics = collect(*batches)
    x = torch.cat(batches)
    histogram = histogram_of(statistics)
    assert np.array_equal(histogram.counts, numpy_counts(x, histogram.exponent))
    assert histogram.counts.sum() == x.numel()


def test_zeros_first_do_not_cost_resolution() -> None:
    x = torch.randn(1000) * 1e-6
    histogram = histogram_of(collect(torch.zeros(10), x))
    assert 2.0 ** (histogram.exponent - 1) <= float(x.abs().max()) < 2.0**histogram.exponent


def test_one_nan_changes_nothing_but_a_counter() -> None:
    x = torch.randn(200_000)
    spoilt = x.clone()
    spoilt[[5, 150_000, 199_999]] = torch.tensor([math.nan, math.inf, -math.inf])
    clean = torch.cat([x[:5], x[6:150_000], x[150_001:-1]])
    ours, reference = collect(spoilt), collect(clean)
    assert ours.nonfinite == 3
    assert ours.count == reference.count
    assert (ours.minimum, ours.maximum) == (reference.minimum, reference.maximum)
    assert np.array_equal(histogram_of(ours).counts, histogram_of(reference).counts)
    assert ours.overall.total == pytest.approx(reference.overall.total, abs=0.1)
    assert ours.batch_ranges == reference.batch_ranges


@pytest.mark.parametrize(
    "x", [torch.empty(0), torch.full((3,), math.nan), torch.tensor([math.inf])], ids=repr
)
def test_nothing_finite(x: torch.Tensor) -> None:
    statistics = collect(x)
    assert statistics.count == 0
    assert statistics.nonfinite == x.numel()
    assert statistics.amax == 0
    assert statistics.ema_range(0.9) == (0.0, 0.0)
    assert statistics.batch_ranges == []


@pytest.mark.parametrize("amax", [1e-44, 1e-38, 1e-30, 1e18, 1e30, 3e38])
def test_extreme_magnitudes(amax: float) -> None:
    x = torch.linspace(-1, 1, 1001) * amax
    found = collect(x).overall
    histogram = histogram_of(collect(x))
    assert np.array_equal(histogram.counts, numpy_counts(x, histogram.exponent))
    assert math.isfinite(found.total_squared)
    assert found.total_squared == pytest.approx((x.double() ** 2).sum().item(), rel=SUM_TOLERANCE)


def test_one_summary_can_feed_several_statistics() -> None:
    x = torch.randn(1000)
    first, second = TensorStatistics(), TensorStatistics()
    summary = summarize(x)
    first.merge(summary)
    second.merge(summary)
    second.merge(summarize(x * 10))
    assert first.count == 1000
    assert second.count == 2000
    assert summary.count == 1000
    assert histogram_of(first).counts.sum() == 1000


def test_ema_range_is_the_recurrence() -> None:
    ends = [(-1.0, 2.0), (-3.0, 1.0), (0.5, 4.0)]
    statistics = collect(*(torch.tensor(pair) for pair in ends))
    assert statistics.ema_range(0.0) == (0.5, 4.0)
    low, high = statistics.ema_range(0.9)
    assert low == pytest.approx(-1 * 0.81 - 3 * 0.09 + 0.5 * 0.1)
    assert high == pytest.approx(2 * 0.81 + 1 * 0.09 + 4 * 0.1)


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "sliced": lambda x: torch.cat([x, x + 100], dim=3)[..., : x.shape[3]],
    "gradient": lambda x: x.requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = torch.randn(3, 4, 50, 60)
    expected = collect(x.clone())
    found = collect(LAYOUTS[layout](x))
    assert np.array_equal(histogram_of(found).counts, histogram_of(expected).counts)
    assert found.count == expected.count


@pytest.mark.parametrize("x", [torch.ones(3).int(), torch.ones(3).bool(), [1.0], None], ids=repr)
def test_other_types_are_refused(x: object) -> None:
    with pytest.raises(DataError):
        summarize(x)  # type: ignore[arg-type]
    assert issubclass(DataError, TunerError)


def test_summary_of_nothing_is_neutral() -> None:
    summary = summarize(torch.randn(100))
    for merged in (TensorSummary().merged(summary), summary.merged(TensorSummary())):
        assert (merged.minimum, merged.maximum) == (summary.minimum, summary.maximum)
        assert merged.histogram is not None
        assert summary.histogram is not None
        assert np.array_equal(merged.histogram.counts, summary.histogram.counts)
