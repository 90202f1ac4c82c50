"""The channels of layers, against what the layers really compute."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tuner.recovery.layers import (
    channel_axis,
    input_channels,
    input_magnitudes,
    on_input_channels,
    on_output_channels,
    output_axis,
    output_channels,
    output_magnitudes,
)

_ROUNDING = 1e-12  # relative, in fp64


@dataclass(frozen=True)
class Case:
    """A layer without a bias, and the shape of an input that reaches all of its kernel."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "linear": Case(lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "conv1d": Case(lambda: nn.Conv1d(6, 4, 3, bias=False), (1, 6, 5)),
    "conv1d of groups": Case(lambda: nn.Conv1d(6, 4, 3, groups=2, bias=False), (1, 6, 5)),
    "conv2d": Case(lambda: nn.Conv2d(3, 5, (3, 2), bias=False), (1, 3, 4, 4)),
    "conv2d of groups": Case(lambda: nn.Conv2d(6, 9, 3, groups=3, bias=False), (1, 6, 4, 4)),
    "depthwise": Case(lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (1, 4, 4, 4)),
    "depthwise, two each": Case(lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (1, 4, 4, 4)),
    "channels last": Case(
        lambda: nn.Conv2d(6, 9, 3, groups=3, bias=False).to(memory_format=torch.channels_last),
        (1, 6, 4, 4),
    ),
    "conv3d": Case(lambda: nn.Conv3d(4, 6, 2, groups=2, bias=False), (1, 4, 3, 3, 3)),
    "transposed 1d": Case(lambda: nn.ConvTranspose1d(4, 6, 3, bias=False), (1, 4, 3)),
    "transposed 1d of groups": Case(
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (1, 4, 3)
    ),
    "transposed 2d of groups": Case(
        lambda: nn.ConvTranspose2d(6, 9, 2, stride=2, groups=3, bias=False), (1, 6, 2, 2)
    ),
    "transposed, channels last": Case(
        lambda: nn.ConvTranspose2d(6, 9, 2, groups=3, bias=False).to(
            memory_format=torch.channels_last
        ),
        (1, 6, 2, 2),
    ),
    "transposed 3d of groups": Case(
        lambda: nn.ConvTranspose3d(4, 2, 2, groups=2, bias=False), (1, 4, 2, 2, 2)
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    chosen = CASES[request.param]
    return chosen.make().double(), torch.randn(chosen.shape, dtype=torch.float64)


def factors_of(channels: int) -> Tensor:
    """Return factors that all differ."""
    return torch.logspace(-2, 2, channels, dtype=torch.float64)


def along(factors: Tensor, layer: nn.Module) -> Tensor:
    return factors.view(-1, *[1] * (-1 - channel_axis(layer)))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=_ROUNDING, atol=_ROUNDING)


@torch.no_grad()
def test_factors_of_output_channels_multiply_the_output(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    factors = factors_of(output_channels(layer))
    expected = layer(x) * along(factors, layer)
    layer.weight.data = on_output_channels(layer, layer.weight, factors)
    assert_same(layer(x), expected)


@torch.no_grad()
def test_factors_of_input_channels_multiply_the_input(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    factors = factors_of(input_channels(layer))
    expected = layer(x * along(factors, layer))
    layer.weight.data = on_input_channels(layer, layer.weight, factors)
    assert_same(layer(x), expected)


@torch.no_grad()
def test_weights_keep_shape_and_memory_format(case: tuple[nn.Module, Tensor]) -> None:
    layer, _ = case
    for function, channels in (
        (on_output_channels, output_channels(layer)),
        (on_input_channels, input_channels(layer)),
    ):
        found = function(layer, layer.weight, factors_of(channels))
        assert found.shape == layer.weight.shape
        assert found.stride() == layer.weight.stride()


def test_magnitudes_are_those_of_the_jacobian(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    jacobian = torch.autograd.functional.jacobian(layer, x).abs()  # type: ignore[no-untyped-call]
    axis_in, axis_out = x.dim() + channel_axis(layer), channel_axis(layer)
    by_output = jacobian.movedim(x.dim() + axis_out, 0).flatten(1).amax(1)
    by_input = jacobian.movedim(x.dim() + axis_in, 0).flatten(1).amax(1)
    assert_same(output_magnitudes(layer, layer.weight.detach()), by_output)
    assert_same(input_magnitudes(layer, layer.weight.detach()), by_input)


@pytest.mark.parametrize(
    ("module", "axis"),
    [
        (nn.Linear(2, 2), -1),
        (nn.LayerNorm(2), -1),
        (nn.RMSNorm(2), -1),
        (nn.Conv1d(2, 2, 1), -2),
        (nn.ConvTranspose3d(2, 2, 1), -4),
        (nn.BatchNorm2d(2), -3),
        (nn.BatchNorm3d(2), -4),
        (nn.BatchNorm1d(2), None),
        (nn.GroupNorm(1, 2), None),
    ],
)
def test_the_axis_of_the_output(module: nn.Module, axis: int | None) -> None:
    assert output_axis(module) == axis
