"""Ranges for formats whose levels are not equally spaced."""

import pytest
import torch
from torch import Tensor

from tuner import formats
from tuner.calibrate import calibrate
from tuner.errors import SchemeError
from tuner.granularity import PerChannel
from tuner.qparams import compute_qparams, fake_quantize
from tuner.ranges import QParams
from tuner.schemes import TensorScheme

TOLERANCE = 1.005  # of the least squared error
FORMATS = ("e4m3fn", "e3m4", "e3m2", "e2m3", "e2m1", "accutune_test_codebook")

formats.register("accutune_test_codebook", codebook=[-1, -0.5, -0.2, 0, 0.1, 0.3, 0.6, 1])


def data(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(30_000, generator=generator)
    chi = torch.randn(30_000, 3, generator=generator).square().mean(1)
    return {"normal": normal, "relu": normal.relu(), "student t": normal / chi.sqrt()}[name]


def squared_error(x: Tensor, scheme: TensorScheme, scale: float) -> float:
    return float((fake_quantize(x, scheme, QParams(scale)).double() - x.double()).square().sum())


@pytest.mark.parametrize("name", ["normal", "relu", "student t"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_mse_finds_the_best_range(fmt: str, name: str) -> None:
    x = data(name)
    scheme = TensorScheme(format=fmt, calibration="mse")
    rows = TensorScheme(format=fmt, calibration="mse", granularity=PerChannel(0))
    full = float(x.abs().max()) / formats.get(fmt).largest
    least = min(squared_error(x, scheme, full * 0.98**k) for k in range(250))
    for qparams in (calibrate(x.split(7000), scheme), compute_qparams(x[None], rows)):
        assert squared_error(x, scheme, float(qparams.scale)) <= TOLERANCE * least


@pytest.mark.parametrize("method", ["entropy", "aciq", "histogram"])
def test_methods_for_equal_steps_are_refused(method: str) -> None:
    scheme = TensorScheme.model_validate({"format": "e4m3fn", "calibration": method})
    with pytest.raises(SchemeError, match=f"{method}.*e4m3fn.*minmax"):
        calibrate([torch.ones(3)], scheme)


def test_many_bits_keep_the_whole_range() -> None:
    x = data("student t")
    scheme = TensorScheme(format="e8m10", calibration="mse")
    minmax = scheme.model_copy(update={"calibration": "minmax"})
    assert calibrate([x], scheme).scale == calibrate([x], minmax).scale


@pytest.mark.parametrize("fmt", ["fp16", "bf16", "fp32"])
def test_formats_without_a_scale_get_one(fmt: str) -> None:
    assert calibrate([data("normal")], TensorScheme(format=fmt)).scale == 1.0
