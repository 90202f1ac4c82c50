import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor

from tuner.calibrators import calibrated_range
from tuner.calibrators.aciq import gauss_factor, laplace_factor
from tuner.qparams import fake_quantize, qparams_from_range
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

SAMPLES = 100_000
PRINTED = 0.01  # the paper cuts some of its figures and rounds others
FIT_TOLERANCE = 0.001  # of a histogram against all values
ONE_SIDED_LOSS = 1.1  # error against that of the best range, at 8 and 4 bits

# Banner et al., NeurIPS 2019: α / b and α / σ by bits
LAPLACE = {2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89}
GAUSS = {2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}


@pytest.mark.parametrize("bits", LAPLACE)
def test_published_table(bits: int) -> None:
    assert laplace_factor(2**bits) == pytest.approx(LAPLACE[bits], abs=PRINTED)
    assert gauss_factor(2**bits) == pytest.approx(GAUSS[bits], abs=PRINTED)


@pytest.mark.parametrize("levels", [3, 15, 16, 255, 2**12, 2**16])
def test_laplace_factor_against_lambert(levels: int) -> None:
    expected = special.lambertw(3 * levels**2).real
    assert laplace_factor(levels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("levels", [4, 15, 16, 255, 2**10])
@pytest.mark.parametrize(
    ("distribution", "factor"), [(stats.laplace, laplace_factor), (stats.norm, gauss_factor)]
)
def test_factor_is_where_the_error_is_least(distribution, factor, levels: int) -> None:
    def error(alpha: float) -> float:
        clipped = integrate.quad(
            lambda x: (x - alpha) ** 2 * distribution.pdf(x), alpha, 60, epsabs=0, limit=200
        )[0]
        return 2 * clipped + alpha**2 / (3 * levels**2)

    best = optimize.minimize_scalar(error, bounds=(0.5, 25), method="bounded").x
    assert factor(levels) == pytest.approx(best, rel=1e-4)


def data(name: str) -> Tensor:
    rng = np.random.default_rng(3)
    normal, laplace = rng.standard_normal(SAMPLES), rng.laplace(size=SAMPLES)
    values = {
        "normal": normal,
        "laplace": laplace,
        "shifted laplace": 2 * laplace + 1,
        "uniform": rng.uniform(-1, 1, SAMPLES),
        "student-t": rng.standard_t(3, SAMPLES),
        "mostly zeros": np.where(rng.random(SAMPLES) < 0.7, 0, normal + 1),
        "growing": normal * np.linspace(1, 50, SAMPLES),
        "relu": normal.clip(min=0),
        "relu of laplace": laplace.clip(min=0),
    }[name]
    return torch.from_numpy(values).float()


TWO_SIDED = (
    "normal",
    "laplace",
    "shifted laplace",
    "uniform",
    "student-t",
    "mostly zeros",
    "growing",
)


def found_range(x: Tensor, method: str, **fields: object) -> tuple[float, float]:
    statistics = TensorStatistics()
    for batch in x.split(30_000):
        statistics.update(batch)
    scheme = TensorScheme.model_validate({"calibration": method, **fields})
    return calibrated_range(statistics, scheme)


def alpha_of(x: Tensor, method: str, levels: int) -> float:
    """α from all values."""
    values = x.double()
    deviation = values - values.mean()
    if method == "aciq_laplace":
        return laplace_factor(levels) * float(deviation.abs().mean())
    return gauss_factor(levels) * float(deviation.square().mean().sqrt())


@pytest.mark.parametrize("method", ["aciq_laplace", "aciq_gauss"])
@pytest.mark.parametrize("name", TWO_SIDED)
@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        ({"format": "int4"}, 16),
        ({"format": "int4", "narrow": True}, 15),
        ({"format": "int8", "reduce_range": True}, 128),
        ({"format": "uint3"}, 8),
    ],
    ids=str,
)
def test_range_against_all_values(
    method: str, name: str, fields: dict[str, object], levels: int
) -> None:
    x = data(name)
    mean, alpha = float(x.double().mean()), alpha_of(x, method, levels)
    amax = min(abs(mean) + alpha, float(x.abs().max()))
    low, high = found_range(x, method, symmetric=True, **fields)
    assert -low == high == pytest.approx(amax, rel=FIT_TOLERANCE)
    found = found_range(x, method, symmetric=False, **fields)
    expected = max(mean - alpha, float(x.min())), min(mean + alpha, float(x.max()))
    assert found == pytest.approx(expected, rel=FIT_TOLERANCE, abs=FIT_TOLERANCE * alpha)


def error_of(x: Tensor, ends: tuple[float, float], scheme: TensorScheme) -> float:
    low, high = torch.tensor(ends, dtype=torch.float64)
    rounded = fake_quantize(x, scheme, qparams_from_range(low.float(), high.float(), scheme))
    return float((rounded - x).square().mean(dtype=torch.float64))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fmt", ["uint2", "uint4", "uint8"])
@pytest.mark.parametrize("name", [*TWO_SIDED, "relu", "relu of laplace"])
def test_aciq_is_the_better_of_both(name: str, fmt: str, symmetric: bool) -> None:
    x, scheme = data(name), TensorScheme(format=fmt, symmetric=symmetric)
    fields = {"format": fmt, "symmetric": symmetric}
    candidates = [found_range(x, f"aciq_{kind}", **fields) for kind in ("laplace", "gauss")]
    assert found_range(x, "aciq", **fields) == min(
        candidates, key=lambda ends: error_of(x, ends, scheme)
    )


@pytest.mark.parametrize(("name", "kind"), [("normal", "gauss"), ("laplace", "laplace")])
def test_aciq_knows_its_own_distributions(name: str, kind: str) -> None:
    x = data(name)
    expected = found_range(x, f"aciq_{kind}", format="int4", symmetric=False)
    assert found_range(x, "aciq", format="int4", symmetric=False) == expected


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize(("name", "kind"), [("relu", "gauss"), ("relu of laplace", "laplace")])
def test_half_range_has_twice_the_levels(name: str, kind: str, bits: int, sign: int) -> None:
    x = sign * data(name)
    # b and σ of what was before the ReLU are 1
    factor = {"gauss": GAUSS, "laplace": LAPLACE}[kind][bits + 1]
    before = {"gauss": 1.0, "laplace": 1.0}[kind]
    low, high = found_range(x, f"aciq_{kind}", format=f"uint{bits}", symmetric=False)
    near, far = (low, high) if sign > 0 else (-high, -low)
    assert near == 0
    assert far == pytest.approx(min(factor * before, float(x.abs().max())), rel=0.02)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("name", ["relu", "relu of laplace"])
def test_half_range_is_nearly_best(name: str, bits: int) -> None:
    x, fields = data(name), {"format": f"uint{bits}", "symmetric": False}
    scheme = TensorScheme.model_validate(fields)
    errors = [error_of(x, found_range(x, m, **fields), scheme) for m in ("aciq", "mse")]
    assert errors[0] <= ONE_SIDED_LOSS * errors[1]


def test_exact_zeros_of_a_relu_do_not_count() -> None:
    x = data("relu")
    more = torch.cat([x, torch.zeros(SAMPLES)])
    for method in ("aciq", "aciq_laplace", "aciq_gauss"):
        ranges = [found_range(v, method, format="uint4", symmetric=False) for v in (x, more)]
        assert ranges[0] == pytest.approx(ranges[1], rel=1e-12)


def test_far_from_zero_nothing_cancels() -> None:
    x = data("normal") * 0.1 + 5
    x[0] = -1e-3  # two-sided
    low, high = found_range(x, "aciq_gauss", format="int4", symmetric=False)
    assert high - low == pytest.approx(2 * alpha_of(x, "aciq_gauss", 16), rel=0.005)
