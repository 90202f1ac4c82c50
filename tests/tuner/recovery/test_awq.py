"""Activation-aware scales against a search in the test, and what they promise."""

import pytest
import torch
from torch import Tensor

from tests.tuner.recovery.problems import correlated, normal
from tuner.errors import SchemeError
from tuner.granularity import PerChannel
from tuner.qparams import fake_quantize
from tuner.recovery.awq import awq_scales
from tuner.schemes import TensorScheme

GAIN = 0.7  # of the error without scales, where two of the inputs are far larger than the rest
FP32_SUMS = 1e-4
INT3 = TensorScheme(format="int3", granularity=PerChannel(0))


def outlier_inputs(width: int = 32) -> Tensor:
    """Return rows `[rows, in]` of which two channels are 30 times larger."""
    x = normal(5, 400, width)
    x[:, (3, 17)] *= 30
    return x


def output_error(weights: list[Tensor], x: Tensor, scales: Tensor) -> float:
    """Return the mean square error of all outputs, on the inputs themselves."""
    total = 0.0
    for weight in weights:
        rounded = fake_quantize(weight * scales, INT3)
        y = (x / scales) @ rounded.mT
        total += float((y - x @ weight.mT).square().sum(1).mean())
    return total


def moments(x: Tensor) -> Tensor:
    return (x.mT @ x / len(x)).unsqueeze(0)


def test_the_best_of_all_ratios_for_weights_that_share_an_input() -> None:
    x = outlier_inputs()
    weights = [normal(seed, 16, 32) for seed in range(3)]
    magnitude = x.abs().mean(0)
    errors = {}
    for step in range(11):
        s = magnitude ** (step / 10)
        s = s / (s.max() * s.min()).sqrt()
        errors[step / 10] = output_error(weights, x, s)
    scales, ratio = awq_scales(weights, moments(x), INT3, magnitude, grid=10)
    assert ratio == min(errors, key=lambda r: errors[r])
    assert 0 < ratio < 1
    ours = output_error(weights, x, scales)
    assert ours == pytest.approx(errors[ratio], rel=FP32_SUMS)
    assert ours < GAIN * errors[0.0]
    expected = magnitude**ratio
    expected /= (expected.max() * expected.min()).sqrt()
    torch.testing.assert_close(scales, expected, rtol=FP32_SUMS, atol=0)


def test_without_magnitudes_the_root_mean_square_takes_their_place() -> None:
    x = outlier_inputs()
    weights = [normal(0, 16, 32)]
    ours = awq_scales(weights, moments(x), INT3)
    theirs = awq_scales(weights, moments(x), INT3, x.square().mean(0).sqrt())
    assert ours[1] == theirs[1]
    torch.testing.assert_close(ours[0], theirs[0], rtol=FP32_SUMS, atol=0)


def test_a_weight_with_its_inputs_first() -> None:
    x, weight = outlier_inputs(), normal(0, 16, 32)
    turned = TensorScheme(format="int3", granularity=PerChannel(1))
    ours, ratio = awq_scales([weight.mT.contiguous()], moments(x), turned, axis=1)
    theirs, other = awq_scales([weight], moments(x), INT3)
    assert ratio == other
    torch.testing.assert_close(ours, theirs, rtol=FP32_SUMS, atol=0)


def test_channels_of_zeros_are_left_alone() -> None:
    x = outlier_inputs()
    x[:, 4] = 0
    scales, _ = awq_scales([normal(0, 16, 32)], moments(x), INT3)
    assert scales[4] == 1
    assert bool(scales.isfinite().all())
    nothing, ratio = awq_scales([normal(0, 16, 32)], torch.zeros(1, 32, 32), INT3)
    assert torch.equal(nothing, torch.ones(32))
    assert ratio == 0


def test_equal_inputs_need_no_scales() -> None:
    scales, _ = awq_scales([normal(0, 4, 8)], torch.eye(8).unsqueeze(0), INT3)
    assert torch.equal(scales, torch.ones(8))


@pytest.mark.parametrize(
    ("weights", "second"),
    [
        ([], torch.zeros(1, 4, 4)),
        ([torch.zeros(4, 2, 3, 3)], torch.zeros(1, 18, 18)),
        ([torch.zeros(4, 2)], torch.zeros(2, 2, 2)),
        ([torch.zeros(4, 5)], torch.zeros(1, 4, 4)),
    ],
)
def test_what_does_not_fit_is_refused(weights: list[Tensor], second: Tensor) -> None:
    with pytest.raises(SchemeError, match=r"scales need weights \[out, in\]|do not fit a weight"):
        awq_scales(weights, second, INT3)


def test_correlations_count() -> None:
    """The error is that of the outputs, not the sum over inputs: with H's diagonal it differs."""
    second = correlated(3, 1, 24)
    diagonal = torch.diag_embed(second.diagonal(dim1=1, dim2=2))
    found = {awq_scales([normal(s, 8, 24)], second, INT3, grid=40)[1] for s in range(6)}
    without = {awq_scales([normal(s, 8, 24)], diagonal, INT3, grid=40)[1] for s in range(6)}
    assert found != without
