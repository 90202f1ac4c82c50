"""Statistics of channels, against exact ones of all values."""

import pytest
import torch
from torch import Tensor

from tuner import TensorScheme
from tuner.calibrators import calibrated_range
from tuner.recovery.channels import ChannelStatistics

_FP32 = 1e-6  # relative
_SAMPLED = 0.05  # of the standard deviation, of a sample of some thousand values
SHAPES = {
    "one row": ((5,), -1),
    "rows": ((12, 5), -1),
    "images": ((3, 5, 4, 4), -3),
    "one image": ((5, 4, 4), -3),
    "tokens": ((3, 7, 5), -1),
    "signals": ((3, 5, 7), -2),
}
SIZES = torch.tensor([1.0, 30.0, 0.02, 4.0, 0.3])


def along(values: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    return values.view(-1, *[1] * (-1 - axis)).expand(shape)


def batches(shape: tuple[int, ...], axis: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(shape) * along(SIZES, shape, axis) for _ in range(count)]


def seen(data: list[Tensor], axis: int, **options: int) -> ChannelStatistics:
    statistics = ChannelStatistics(axis, **options)
    for x in data:
        statistics.update(x)
    return statistics


@pytest.mark.parametrize("name", SHAPES)
def test_extremes_are_exact(name: str) -> None:
    shape, axis = SHAPES[name]
    data = batches(shape, axis)
    statistics = seen(data, axis, values=5)  # a sample of one position
    factors = torch.tensor([0.5, 20.0, 0.01, 7.0, 1.0])
    scaled = [x / along(factors, shape, axis) for x in data]
    found = statistics.scaled(factors)
    assert found.overall.minimum == min(float(x.min()) for x in scaled)
    assert found.overall.maximum == max(float(x.max()) for x in scaled)
    assert found.batch_ranges == [(float(x.min()), float(x.max())) for x in scaled]
    by_channel = torch.stack([x.abs().movedim(axis, 0).reshape(5, -1).amax(1) for x in data])
    assert torch.equal(statistics.magnitudes, by_channel.amax(0))
    assert statistics.count == len(data)


@pytest.mark.parametrize("name", SHAPES)
def test_shifted_statistics_are_those_of_shifted_values(name: str) -> None:
    shape, axis = SHAPES[name]
    data = batches(shape, axis)
    shifts, factors = torch.tensor([3.0, -20.0, 0.0, 7.0, 0.5]), SIZES
    statistics = seen(data, axis)
    found, expected = (
        statistics.shifted(shifts),
        seen([x - along(shifts, shape, axis) for x in data], axis),
    )
    assert torch.equal(found.magnitudes, expected.magnitudes)
    assert torch.equal(found.means, expected.means)
    assert all(map(torch.equal, found.extremes, expected.extremes))
    ours, others = found.scaled(factors), expected.scaled(factors)
    assert ours.batch_ranges == others.batch_ranges
    assert ours.overall.total == others.overall.total
    assert torch.equal(statistics.magnitudes, seen(data, axis).magnitudes)


@pytest.mark.parametrize("name", SHAPES)
def test_means_are_exact_where_all_positions_are_kept(name: str) -> None:
    shape, axis = SHAPES[name]
    data = batches(shape, axis)
    expected = torch.cat([x.abs().movedim(axis, 0).reshape(5, -1) for x in data], 1).mean(1)
    torch.testing.assert_close(seen(data, axis).means, expected, rtol=_FP32, atol=0.0)


@pytest.mark.parametrize("method", ["minmax", "ema", "mse", "percentile"])
def test_ranges_are_those_of_all_values(method: str) -> None:
    data = batches((64, 5, 4, 4), -3)
    factors = torch.tensor([0.5, 20.0, 0.01, 7.0, 1.0])
    scheme = TensorScheme(format="uint8", symmetric=False, calibration=method)
    exact = seen([x / along(factors, x.shape, -3) for x in data], -3).scaled(torch.ones(5))
    found = calibrated_range(seen(data, -3).scaled(factors), scheme)
    torch.testing.assert_close(found, calibrated_range(exact, scheme), rtol=_FP32, atol=0.0)


def test_a_sample_has_the_distribution_of_all_values() -> None:
    data = [x + i for i, x in enumerate(batches((64, 5, 8, 8), -3, 8))]  # batches differ
    found = seen(data, -3, values=20_000).scaled(SIZES).overall
    whole = torch.cat([x / along(SIZES, x.shape, -3) for x in data])
    deviation = float(whole.std())
    assert abs(found.total / found.count - float(whole.mean())) < _SAMPLED * deviation
    spread = (found.total_squared / found.count - (found.total / found.count) ** 2) ** 0.5
    assert abs(spread / deviation - 1) < _SAMPLED


@pytest.mark.parametrize("size", [1, 3, 500])
def test_the_sample_stays_within_its_bound_and_spans_all_batches(size: int) -> None:
    most = 200
    data = [torch.full((size, 5), float(i)) for i in range(90)]
    statistics = seen(data, -1, values=most)
    kept = torch.cat(statistics._rows)
    assert most / 4 < kept.numel() <= most
    distances = kept[:, 0].diff()
    assert float(kept[0, 0]) == 0
    assert float(distances.max()) <= 2 * 90 * 5 / most + 1  # no batch weighs more than others
    assert float(kept[-1, 0]) >= 90 - 2 * 90 * 5 / most - 1


def test_more_channels_than_values_keep_one_position() -> None:
    statistics = seen([torch.randn(4, 50) for _ in range(3)], -1, values=10)
    assert torch.cat(statistics._rows).shape == (1, 50)


def test_nan_and_inf_are_left_out() -> None:
    x = torch.tensor([[1.0, -2.0, float("nan")], [float("inf"), 3.0, float("nan")]])
    statistics = seen([x, torch.tensor([[0.5, float("-inf"), float("nan")]])], -1)
    assert statistics.magnitudes.tolist() == [1.0, 3.0, 0.0]
    found = statistics.scaled(torch.tensor([2.0, 1.0, 1.0]))
    assert (found.overall.minimum, found.overall.maximum) == (-2.0, 3.0)
    assert found.batch_ranges == [(-2.0, 3.0), (0.25, 0.25)]
    assert bool(statistics.means.isfinite().all())


def test_batches_without_a_finite_value_do_not_count() -> None:
    statistics = seen([torch.full((2, 3), float("nan")), torch.empty(0, 3)], -1)
    assert statistics.count == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5).to(dtype)
    assert torch.equal(seen([x], -1).magnitudes, x.abs().amax(0).float())


def test_what_is_seen_later_changes_nothing_that_was_kept() -> None:
    x = torch.randn(6, 5)
    statistics = seen([x], -1)
    before = statistics.scaled(torch.ones(5)).overall
    x.zero_()
    assert statistics.scaled(torch.ones(5)).overall.total == before.total
