"""Ranges from statistics against ranges from all values, on data that stays and data that grows."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner.calibrators import calibrated_range
from tuner.histogram import Histogram
from tuner.qparams import fake_quantize, qparams_from_range
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

SAMPLES = 40_000
BATCHES = 8
GROWTH = 50
PERCENTILE_TOLERANCE = 0.002
MSE_TOLERANCE = 1.005

DISTRIBUTIONS = ("normal", "laplace", "uniform", "relu", "student-t")
DATA = list(product(DISTRIBUTIONS, ("stationary", "growing")))


def batches_of(name: str, course: str) -> list[Tensor]:
    rng = np.random.default_rng(7)
    values = {
        "normal": lambda: rng.standard_normal(SAMPLES),
        "laplace": lambda: rng.laplace(size=SAMPLES),
        "uniform": lambda: rng.uniform(-1, 1, SAMPLES),
        "relu": lambda: rng.standard_normal(SAMPLES).clip(min=0),
        "student-t": lambda: rng.standard_t(3, SAMPLES),
    }[name]()
    batches = torch.from_numpy(values).float().chunk(BATCHES)
    factors = torch.linspace(1, GROWTH if course == "growing" else 1, BATCHES)
    return [batch * factor for batch, factor in zip(batches, factors, strict=True)]


def collect(batches: list[Tensor]) -> TensorStatistics:
    statistics = TensorStatistics()
    for batch in batches:
        statistics.update(batch)
    return statistics


def scheme_of(method: str, **fields: object) -> TensorScheme:
    return TensorScheme.model_validate({"calibration": method, **fields})


@pytest.mark.parametrize("percentile", [99.0, 99.9])
@pytest.mark.parametrize(("name", "course"), DATA)
def test_percentile(name: str, course: str, percentile: float) -> None:
    batches = batches_of(name, course)
    x = torch.cat(batches).double().numpy()
    scheme = scheme_of("percentile", percentile=percentile)
    found = calibrated_range(collect(batches), scheme)[1]
    assert found == pytest.approx(np.percentile(np.abs(x), percentile), rel=PERCENTILE_TOLERANCE)
    low, high = calibrated_range(
        collect(batches), scheme_of("percentile", percentile=percentile, symmetric=False)
    )
    expected = np.percentile(x, [100 - percentile, percentile])
    # every range is extended to hold 0, a value that histograms count as one of the first bin
    assert min(low, 0.0) == pytest.approx(min(expected[0], 0.0), rel=PERCENTILE_TOLERANCE)
    assert high == pytest.approx(expected[1], rel=PERCENTILE_TOLERANCE)


def error_of(x: Tensor, low: float, high: float, scheme: TensorScheme) -> float:
    qparams = qparams_from_range(torch.tensor(low), torch.tensor(high), scheme)
    return float((fake_quantize(x, scheme, qparams) - x).square().mean(dtype=torch.float64))


def least_error(x: Tensor, scheme: TensorScheme) -> float:
    """The error of the best of many ranges, measured on the values themselves."""
    minimum, maximum = float(x.min()), float(x.max())
    if scheme.symmetric:
        ends = np.geomspace(1, 0.03, 150) * max(-minimum, maximum)
        return min(error_of(x, -end, end, scheme) for end in ends)
    ratios = np.geomspace(1, 0.03, 22)
    lows = ratios * minimum if minimum < 0 else [0.0]
    highs = (ratios if minimum < 0 else np.geomspace(1, 0.03, 150)) * maximum
    return min(error_of(x, low, high, scheme) for low in lows for high in highs)


SCHEMES = {
    "int4": {"format": "int4"},
    "int8": {"format": "int8"},
    "uint2 affine": {"format": "uint2", "symmetric": False},
    "uint4 affine": {"format": "uint4", "symmetric": False},
    "uint8 affine": {"format": "uint8", "symmetric": False},
}


@pytest.mark.parametrize("fields", SCHEMES)
@pytest.mark.parametrize(("name", "course"), DATA)
def test_mse(name: str, course: str, fields: str) -> None:
    batches = batches_of(name, course)
    x, scheme = torch.cat(batches), scheme_of("mse", **SCHEMES[fields])
    low, high = calibrated_range(collect(batches), scheme)
    assert error_of(x, low, high, scheme) <= MSE_TOLERANCE * least_error(x, scheme)


def divergence(counts: np.ndarray, kept: int, groups: int) -> float:
    """KL(P‖Q) as TensorRT defines it, step by step."""
    p = counts[:kept].astype(float)
    p[-1] += counts[kept:].sum()
    filled = counts[:kept] > 0
    group_of = np.arange(kept) * groups // kept
    mass = np.bincount(group_of, counts[:kept], groups)
    members = np.bincount(group_of, filled, groups)
    q = np.where(filled, (mass / members.clip(min=1))[group_of], 0.0)
    if q.sum() == 0 or (p[q == 0] > 0).any():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p[filled] * np.log(p[filled] / q[filled])).sum())


def best_amax(x: Tensor, histogram: Histogram, groups: int) -> float:
    """The last amax of least divergence over the bins of the histogram."""
    magnitudes = x[x != 0].abs().double().numpy()
    bins = int(magnitudes.max() // histogram.width) + 1
    counts = np.histogram(magnitudes, np.arange(bins + 1) * histogram.width)[0]
    divergences = [divergence(counts, kept, groups) for kept in range(groups, bins + 1)]
    last = max(i for i, d in enumerate(divergences) if d <= min(divergences) + 1e-12)
    return min((groups + last) * histogram.width, float(magnitudes.max()))


def assert_entropy(batches: list[Tensor], fields: dict[str, object], groups: int) -> None:
    statistics = collect(batches)
    histogram = statistics.overall.histogram
    assert histogram is not None
    high = calibrated_range(statistics, scheme_of("entropy", **fields))[1]
    assert high == pytest.approx(best_amax(torch.cat(batches), histogram, groups), rel=1e-6)


@pytest.mark.parametrize(("fmt", "groups"), [("int4", 8), ("int8", 128)])
@pytest.mark.parametrize(("name", "course"), DATA)
def test_entropy(name: str, course: str, fmt: str, groups: int) -> None:
    assert_entropy(batches_of(name, course), {"format": fmt}, groups)


# fields of the scheme, and how many codes a magnitude can take
LEVELS = [
    ("normal", {"format": "int5", "narrow": True}, 16),
    ("student-t", {"format": "uint3"}, 4),
    ("student-t", {"format": "int8", "quant_min": -10, "quant_max": 20}, 11),
    ("normal", {"format": "uint4", "symmetric": False}, 8),
    ("relu", {"format": "uint4", "symmetric": False}, 16),
    ("relu", {"format": "int5", "symmetric": False}, 32),
]


@pytest.mark.parametrize(("name", "fields", "groups"), LEVELS)
def test_entropy_counts_the_levels_of_the_scheme(
    name: str, fields: dict[str, object], groups: int
) -> None:
    assert_entropy(batches_of(name, "stationary"), fields, groups)
