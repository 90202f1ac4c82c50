"""Scales of channels against the papers' equations, and at channels without a range."""

import math

import pytest
import torch
from torch import Tensor

from tests.tuner.recovery.problems import normal
from tuner.errors import SchemeError
from tuner.recovery.scales import LARGEST_SCALE, equalize_scales, smooth_scales

FP32_ROUNDING = 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_smoothing_as_equation_4_has_it(alpha: float) -> None:
    acts, weights = [16.0, 1.0, 0.25, 3.0], [1.0, 2.0, 8.0, 0.5]
    expected = [a**alpha / w ** (1 - alpha) for a, w in zip(acts, weights, strict=True)]
    ours = smooth_scales(torch.tensor(acts), torch.tensor(weights), alpha)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=FP32_ROUNDING, atol=0)


def test_at_one_half_both_ranges_become_equal() -> None:
    acts, weights = normal(0, 8).abs(), normal(1, 8).abs()
    s = smooth_scales(acts, weights, 0.5)
    torch.testing.assert_close(acts / s, weights * s, rtol=FP32_ROUNDING, atol=0)


def test_equalized_ranges_are_the_geometric_mean() -> None:
    first, second = normal(0, 6, 5), normal(1, 4, 6)
    r1, r2 = first.abs().amax(1), second.abs().amax(0)
    s = equalize_scales(r1, r2)
    after = (first / s[:, None]).abs().amax(1), (second * s).abs().amax(0)
    for each in after:
        torch.testing.assert_close(each, (r1 * r2).sqrt(), rtol=FP32_ROUNDING, atol=0)


@pytest.mark.parametrize("scales", [smooth_scales, equalize_scales])
@pytest.mark.parametrize(
    ("first", "second"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (math.inf, 1.0), (1.0, math.inf)]
)
def test_a_channel_without_a_range_is_left_alone(
    scales: object, first: float, second: float
) -> None:
    assert callable(scales)
    found = scales(torch.tensor([first, 4.0]), torch.tensor([second, 1.0]))
    assert found.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("scales", [smooth_scales, equalize_scales])
def test_no_scale_is_beyond_the_span(scales: object) -> None:
    assert callable(scales)
    tiny, huge = torch.tensor([1e-30, 1e30]), torch.tensor([1e30, 1e-30])
    ends: Tensor = scales(tiny, huge)
    torch.testing.assert_close(
        ends, torch.tensor([1 / LARGEST_SCALE, LARGEST_SCALE]), rtol=FP32_ROUNDING, atol=0
    )


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_outside_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(SchemeError, match=f"alpha must be from 0 to 1, got {alpha}"):
        smooth_scales(torch.ones(2), torch.ones(2), alpha)


def test_ranges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"\[2\] and \[3\] channels"):
        equalize_scales(torch.ones(2), torch.ones(3))
    with pytest.raises(SchemeError, match="ranges are magnitudes, got -1"):
        equalize_scales(torch.tensor([-1.0]), torch.ones(1))
