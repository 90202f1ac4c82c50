"""The L2 search against that of torch, which knows one number of levels only: the dtype's."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization.observer import HistogramObserver

from tuner.calibrators import calibrated_range
from tuner.qparams import QParams, fake_quantize, qparams_from_range
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

SAMPLES = 100_000
RANGE_TOLERANCE = 0.003  # of the range, where torch's search ends for the same reason
PATH_LOSS = 1.2  # of one path against the best of all ranges

DATA = ("normal", "laplace", "uniform", "relu", "student-t", "gelu", "skewed")
# elsewhere torch stops at the first rise, or with its lower end stuck in a full bin
COMPARABLE = ("uniform", "positive", "clipped", "tanh")


def data(name: str) -> Tensor:
    rng = np.random.default_rng(7)
    normal = torch.from_numpy(rng.standard_normal(SAMPLES)).float()
    return {
        "normal": normal,
        "laplace": torch.from_numpy(rng.laplace(size=SAMPLES)).float(),
        "uniform": torch.from_numpy(rng.uniform(-1, 1, SAMPLES)).float(),
        "relu": normal.relu(),
        "student-t": torch.from_numpy(rng.standard_t(3, SAMPLES)).float(),
        "gelu": torch.nn.functional.gelu(2 * normal),
        "positive": torch.from_numpy(rng.uniform(0, 1, SAMPLES)).float(),
        "clipped": normal.clamp(-2, 2),
        "tanh": normal.tanh(),
        "skewed": torch.from_numpy(rng.gamma(2, size=SAMPLES) - 1).float(),
    }[name]


def found_range(x: Tensor, scheme: TensorScheme) -> tuple[float, float]:
    statistics = TensorStatistics()
    statistics.update(x)
    return calibrated_range(statistics, scheme)


def error_of(x: Tensor, scheme: TensorScheme, qparams: QParams) -> float:
    return float((fake_quantize(x, scheme, qparams) - x).square().mean(dtype=torch.float64))


def own_error(x: Tensor, scheme: TensorScheme) -> float:
    low, high = (torch.tensor(end) for end in found_range(x, scheme))
    return error_of(x, scheme, qparams_from_range(low, high, scheme))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def torch_qparams(x: Tensor, scheme: TensorScheme) -> QParams:
    low, high = scheme.quant_range
    observer = HistogramObserver(
        dtype=torch.qint8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine,
    )
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    return QParams(scale[0], zero_point[0].int())


def scheme_of(fmt: str, symmetric: bool, **fields: object) -> TensorScheme:
    values = {"format": fmt, "symmetric": symmetric, "calibration": "histogram", **fields}
    return TensorScheme.model_validate(values)


@pytest.mark.parametrize("name", COMPARABLE)
def test_eight_bits_as_torch(name: str) -> None:
    x, scheme = data(name), scheme_of("int8", False)
    low, high = (torch.tensor(end) for end in found_range(x, scheme))
    found, expected = qparams_from_range(low, high, scheme), torch_qparams(x, scheme)
    assert float(found.scale) == pytest.approx(float(expected.scale), rel=RANGE_TOLERANCE)
    assert int(found.zero_point) == pytest.approx(int(expected.zero_point), abs=1)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("fmt", ["int2", "int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_never_worse_than_torchs(name: str, fmt: str, symmetric: bool) -> None:
    x, scheme = data(name), scheme_of(fmt, symmetric)
    assert own_error(x, scheme) <= error_of(x, scheme, torch_qparams(x, scheme))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(
    "fields",
    [
        {"format": "int2"},
        {"format": "int4", "narrow": True},
        {"format": "int8", "reduce_range": True},
        {"format": "int8", "quant_min": -3, "quant_max": 4},
        {"format": "uint4"},
        {"format": "int12"},
    ],
    ids=str,
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_levels_of_the_scheme_count(
    name: str, fields: dict[str, object], symmetric: bool
) -> None:
    x = data(name)
    scheme = TensorScheme.model_validate(
        {"calibration": "histogram", "symmetric": symmetric, **fields}
    )
    best = own_error(x, scheme.model_copy(update={"calibration": "mse"}))
    assert own_error(x, scheme) <= PATH_LOSS * best


def test_fewer_codes_give_a_narrower_range() -> None:
    x = data("normal")
    ends = [found_range(x, scheme_of(f"int{bits}", False))[1] for bits in (8, 6, 4, 3, 2)]
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > 2 * ends[-1]


def test_one_far_value_is_left_out() -> None:
    x = torch.cat([data("normal"), torch.tensor([80.0])])
    low, high = found_range(x, scheme_of("int4", False))
    assert high < 4
    assert low == pytest.approx(-high, rel=0.3)
