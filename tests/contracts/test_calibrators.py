"""What every calibration method must keep, and how good each is on the full data."""

import math
from typing import Literal, get_args

import numpy as np
import pytest
import torch

from tuner import formats
from tuner.calibrate import calibrate
from tuner.calibrators import (
    CALIBRATORS,
    calibrated_range,
    calibrated_row_ranges,
    calibrator,
)
from tuner.errors import CalibrationWarning, SchemeError
from tuner.qparams import fake_quantize, qparams_from_range
from tuner.schemes import CalibrationMethod, TensorScheme
from tuner.statistics import TensorStatistics

SAMPLES = 200_000
PERCENTILE_TOLERANCE = 0.002
MSE_TOLERANCE = 1.005
FORMATS = ("int2", "int4", "int8", "uint8")
FOR_FLOATS = ("minmax", "ema", "percentile", "mse")


def data(name: str) -> torch.Tensor:
    normal = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1))
    return {
        "normal": normal,
        "relu": normal.relu(),
        "negative": -normal.abs(),
        "gelu": torch.nn.functional.gelu(normal * 2),
        "heavy tails": normal**3,
        "outliers": torch.cat([normal, torch.tensor([-9.0, 50.0])]),
        "uniform": torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2)) - 0.3,
    }[name]


DATA = ("normal", "relu", "negative", "gelu", "heavy tails", "outliers", "uniform")


def collect(*batches: torch.Tensor) -> TensorStatistics:
    statistics = TensorStatistics()
    for batch in batches:
        statistics.update(batch)
    return statistics


def scheme_for(method: str, symmetric: bool, **fields: object) -> TensorScheme:
    return TensorScheme.model_validate({"calibration": method, "symmetric": symmetric, **fields})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", CALIBRATORS)
class TestEveryCalibrator:
    @pytest.mark.parametrize("name", DATA)
    @pytest.mark.parametrize("fmt", FORMATS)
    def test_range_is_inside_what_was_seen(
        self, method: str, symmetric: bool, name: str, fmt: str
    ) -> None:
        statistics = collect(data(name))
        scheme = scheme_for(method, symmetric, format=fmt)
        low, high = calibrated_range(statistics, scheme)
        slack = 1e-6 * statistics.amax
        assert low <= high
        assert max(-low, high) <= statistics.amax + slack
        assert max(-low, high) > 0
        if not symmetric:
            assert statistics.minimum - slack <= low
            assert high <= statistics.maximum + slack
        assert calibrated_range(statistics, scheme) == (low, high)

    def test_nothing_seen(self, method: str, symmetric: bool) -> None:
        nothing = collect(torch.full((3,), math.nan))
        assert calibrated_range(nothing, scheme_for(method, symmetric)) == (0.0, 0.0)

    @pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-30])
    def test_one_value_is_kept(self, method: str, symmetric: bool, value: float) -> None:
        x = torch.full((5000,), value)
        scheme = scheme_for(method, symmetric)
        low, high = calibrated_range(collect(x), scheme)
        qparams = qparams_from_range(torch.tensor(low), torch.tensor(high), scheme)
        kept = fake_quantize(x[:1], scheme, qparams)
        torch.testing.assert_close(kept, x[:1], rtol=0.01, atol=0)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_one_non_finite_value_changes_nothing(
        self, method: str, symmetric: bool, value: float
    ) -> None:
        batches = data("gelu").split(70_000)
        spoilt = [torch.cat([batches[0], torch.tensor([value])]), *batches[1:]]
        scheme = scheme_for(method, symmetric)
        expected, found = collect(*batches), collect(*spoilt)
        assert (expected.nonfinite, found.nonfinite) == (0, 1)
        assert calibrated_range(found, scheme) == calibrated_range(expected, scheme)
        clean = calibrate(batches, scheme)
        with pytest.warns(CalibrationWarning, match="1 of 200001"):
            warned = calibrate(spoilt, scheme)
        assert (warned.scale, warned.zero_point) == (clean.scale, clean.zero_point)

    def test_order_of_batches(self, method: str, symmetric: bool) -> None:
        if method == "ema":
            pytest.skip("a moving average depends on the order by its definition")
        batches = [data("normal") * 0.1, data("gelu"), data("relu") * 5]
        scheme = scheme_for(method, symmetric, format="int4")
        expected = calibrated_range(collect(*batches), scheme)
        found = calibrated_range(collect(*reversed(batches)), scheme)
        assert found == pytest.approx(expected, rel=1e-12)

    def test_narrow_and_power_of_two_are_accepted(self, method: str, symmetric: bool) -> None:
        for fields in ({"narrow": True}, {"power_of_two_scale": True}, {"reduce_range": True}):
            low, high = calibrated_range(
                collect(data("gelu")), scheme_for(method, symmetric, format="int4", **fields)
            )
            assert high > 0 >= low


@pytest.mark.parametrize("method", CALIBRATORS)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_a_method_that_does_not_fit_the_format_is_refused(
    method: str, kind: Literal["int", "float"], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = scheme_for(method, True)
    monkeypatch.setattr(formats, "get", lambda name: formats.Format("some8", kind, 8))
    if kind == "int" or method in FOR_FLOATS:
        assert calibrator(scheme) is CALIBRATORS[method]
        return
    message = f"'{method}' does not work for some8.*minmax, ema, percentile, mse, or .* int$"
    with pytest.raises(SchemeError, match=message):
        calibrated_range(collect(torch.ones(3)), scheme)
    with pytest.raises(SchemeError, match=message):
        calibrated_row_ranges(torch.ones(2, 3), scheme)


def test_every_method_of_a_scheme_exists() -> None:
    assert set(CALIBRATORS) == set(get_args(CalibrationMethod))


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_is_exact(symmetric: bool) -> None:
    x = data("outliers")
    assert calibrated_range(collect(x), scheme_for("minmax", symmetric)) == (-9.0, 50.0)


def test_ema_uses_the_decay_of_the_scheme() -> None:
    statistics = collect(torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 2.0]))
    found = calibrated_range(statistics, scheme_for("ema", False, ema_decay=0.75))
    assert found == (-1.5, 1.25)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", ["normal", "relu", "negative", "gelu", "uniform"])
def test_percentile_against_numpy(name: str, percentile: float) -> None:
    x = data(name)
    batches = x.split(30_000)
    low, high = calibrated_range(
        collect(*batches), scheme_for("percentile", True, percentile=percentile)
    )
    expected = np.percentile(x.abs().numpy(), percentile)
    assert -low == high == pytest.approx(expected, rel=PERCENTILE_TOLERANCE)
    ends = calibrated_range(
        collect(*batches), scheme_for("percentile", False, percentile=percentile)
    )
    expected_ends = np.percentile(x.numpy(), [100 - percentile, percentile])
    tolerance = PERCENTILE_TOLERANCE * float(x.abs().max())
    assert ends == pytest.approx(expected_ends, rel=PERCENTILE_TOLERANCE, abs=tolerance)


def error_of(x: torch.Tensor, low: float, high: float, scheme: TensorScheme) -> float:
    qparams = qparams_from_range(torch.tensor(low), torch.tensor(high), scheme)
    return float((fake_quantize(x, scheme, qparams) - x).square().mean(dtype=torch.float64))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(
    "fields",
    [
        {"format": "int2"},
        {"format": "int3", "narrow": True},
        {"format": "int4"},
        {"format": "uint4"},
        {"format": "int8"},
        {"format": "int4", "power_of_two_scale": True},
        {"format": "int8", "quant_min": -20, "quant_max": 60},
    ],
    ids=str,
)
def test_symmetric_mse_against_brute_force(name: str, fields: dict[str, object]) -> None:
    x = data(name)
    statistics = collect(x)
    scheme = scheme_for("mse", True, **fields)
    amax = statistics.amax
    best = min(error_of(x, -t, t, scheme) for t in np.geomspace(1, 0.01, 40) * amax)
    low, high = calibrated_range(statistics, scheme)
    assert error_of(x, low, high, scheme) <= MSE_TOLERANCE * best


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("fmt", ["int2", "uint4", "int8"])
def test_affine_mse_against_brute_force(name: str, fmt: str) -> None:
    x = data(name)[::4].contiguous()
    statistics = collect(x)
    scheme = scheme_for("mse", False, format=fmt)
    ratios = np.geomspace(1, 0.02, 14)
    lows = ratios * statistics.minimum if statistics.minimum < 0 else [0.0]
    highs = ratios * statistics.maximum if statistics.maximum > 0 else [0.0]
    best = min(error_of(x, low, high, scheme) for low in lows for high in highs)
    low, high = calibrated_range(statistics, scheme)
    assert error_of(x, low, high, scheme) <= MSE_TOLERANCE * best


def test_mse_clips_outliers_that_minmax_keeps() -> None:
    x = data("outliers")
    statistics = collect(x)
    scheme = scheme_for("mse", True, format="int4")
    low, high = calibrated_range(statistics, scheme)
    assert error_of(x, low, high, scheme) < 0.1 * error_of(x, -50.0, 50.0, scheme)


def test_mse_knows_that_zeros_cost_nothing() -> None:
    # one far value among many: a level is finer than a bin, and most of the values are 0
    x = torch.cat([torch.zeros(3_000_000), torch.randn(1_500_000).abs(), torch.tensor([30.0])])
    scheme = scheme_for("mse", False, format="uint8")
    best = min(error_of(x, 0.0, high, scheme) for high in np.geomspace(3.0, 30.0, 25))
    low, high = calibrated_range(collect(x), scheme)
    assert error_of(x, low, high, scheme) <= MSE_TOLERANCE * best


def test_entropy_leaves_out_exact_zeros() -> None:
    x = data("relu")
    scheme = scheme_for("entropy", False, format="uint8")
    with_zeros, without = (calibrated_range(collect(v), scheme) for v in (x, x[x > 0]))
    assert with_zeros[1] == without[1]
