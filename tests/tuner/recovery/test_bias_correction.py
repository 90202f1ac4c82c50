"""After the correction the mean output is that of the float weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.tuner.recovery.problems import normal, watched
from tuner.errors import SchemeError
from tuner.qparams import fake_quantize
from tuner.recovery.bias_correction import bias_correction
from tuner.recovery.moments import moments_for
from tuner.schemes import TensorScheme

FP32_SUMS = 1e-5
INT2 = TensorScheme(format="int2")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (40, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (8, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), (8, 4, 9)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, padding=1, output_padding=1),
        (8, 4, 5, 6),
    ),
}


def mean_output(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x).transpose(0, 1).flatten(1).double().mean(1)


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_of_every_output_is_as_before(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build(), normal(0, *shape) + 1
    assert isinstance(layer.weight, Tensor)
    assert isinstance(layer.bias, Tensor)
    ops, calls = watched(layer, x)
    seen, ref = calls[""][0], ops[""].weights[0]
    moments = moments_for(seen.call, ref, x, max_rows=10**6, expected_calls=1)
    assert moments is not None
    moments.update(seen.call, x)
    assert moments.mean is not None
    before = mean_output(layer, x)
    weight = layer.weight.detach().clone()
    rounded = fake_quantize(weight, INT2)
    layer.weight.data = rounded
    off = (mean_output(layer, x) - before).abs().max()
    layer.bias.data += bias_correction(weight, rounded, moments.mean, ref.axis)
    torch.testing.assert_close(mean_output(layer, x), before, rtol=FP32_SUMS, atol=FP32_SUMS)
    assert float(off) > 100 * FP32_SUMS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = normal(0, 3, 4).to(dtype)
    shift = bias_correction(weight, weight * 0, torch.ones(1, 4))
    assert shift.dtype == dtype
    torch.testing.assert_close(shift, weight.double().sum(1).to(dtype))


@pytest.mark.parametrize("mean", [torch.ones(4), torch.ones(1, 5)])
def test_a_mean_that_does_not_fit_is_refused(mean: Tensor) -> None:
    with pytest.raises(SchemeError, match="do not fit each other"):
        bias_correction(torch.zeros(3, 4), torch.zeros(3, 4), mean)
    with pytest.raises(SchemeError, match="do not fit each other"):
        bias_correction(torch.zeros(3, 4), torch.zeros(3, 5), torch.ones(1, 4))
