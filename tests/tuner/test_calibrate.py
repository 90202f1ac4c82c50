"""Calibration over batches."""

import math
import warnings
from collections.abc import Iterator

import pytest
import torch

from tuner.calibrate import calibrate
from tuner.errors import CalibrationWarning, DataError, SchemeError
from tuner.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from tuner.qparams import QParams, compute_qparams, fake_quantize
from tuner.schemes import TensorScheme

METHODS = ("minmax", "ema", "percentile", "mse", "entropy")


def scheme_for(method: str, granularity: Granularity, **fields: object) -> TensorScheme:
    return TensorScheme.model_validate(
        {"calibration": method, "granularity": granularity, **fields}
    )


def scale_of(qparams: QParams) -> torch.Tensor:
    assert isinstance(qparams.scale, torch.Tensor)
    return qparams.scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_one_batch_is_the_tensor_itself(method: str, symmetric: bool) -> None:
    x = torch.randn(4, 30, 50)
    scheme = scheme_for(method, PerTensor(), symmetric=symmetric)
    found, expected = calibrate([x], scheme), compute_qparams(x, scheme)
    assert torch.equal(scale_of(found), scale_of(expected))
    if not symmetric:
        assert found.zero_point == expected.zero_point


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_batches_are_their_concatenation(method: str, symmetric: bool) -> None:
    batches = [torch.randn(500) * scale for scale in (1.0, 20.0, 3.0)]
    scheme = scheme_for(method, PerTensor(), symmetric=symmetric)
    whole = calibrate([torch.cat(batches)], scheme)
    assert torch.equal(scale_of(calibrate(batches, scheme)), scale_of(whole))
    assert torch.equal(scale_of(calibrate(iter(batches[::-1]), scheme)), scale_of(whole))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", [PerChannel(1), PerGroup(3, -1)], ids=repr)
def test_each_scale_sees_its_own_values(
    granularity: Granularity, method: str, symmetric: bool
) -> None:
    batches = [torch.randn(1, 4, 5) * torch.tensor([1, 10, 100, 0.1])[:, None] for _ in range(2)]
    found = calibrate(batches, scheme_for(method, granularity, symmetric=symmetric))
    axis = granularity.axis % 3 if isinstance(granularity, PerChannel | PerGroup) else 0
    size = granularity.size if isinstance(granularity, PerGroup) else 1
    alone = scheme_for(method, PerTensor(), symmetric=symmetric)
    if isinstance(granularity, PerChannel):
        expected = torch.stack(
            [scale_of(calibrate([b[:, i] for b in batches], alone)) for i in range(4)]
        )
    else:
        groups = zip(*(b.split(size, axis) for b in batches), strict=True)
        expected = torch.stack([each_line(group, axis, alone) for group in groups], axis)
    torch.testing.assert_close(scale_of(found), expected, rtol=1e-6, atol=0)


def each_line(batches: tuple[torch.Tensor, ...], axis: int, scheme: TensorScheme) -> torch.Tensor:
    lines = [b.movedim(axis, -1).flatten(0, -2) for b in batches]
    scales = [scale_of(calibrate(list(rows), scheme)) for rows in zip(*lines, strict=True)]
    shape = batches[0].movedim(axis, -1).shape[:-1]
    return torch.stack(scales).reshape(shape)


def test_ema_follows_the_batches() -> None:
    batches = [torch.tensor([-1.0, 1.0]), torch.tensor([-4.0, 0.5])]
    scheme = scheme_for("ema", PerTensor(), ema_decay=0.5)
    assert float(scale_of(calibrate(batches, scheme))) == pytest.approx(2.5 / 127)
    per_channel = scheme_for("ema", PerChannel(0), ema_decay=0.5)
    expected = torch.tensor([2.5, 0.75]) / 127
    torch.testing.assert_close(scale_of(calibrate(batches, per_channel)), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_non_finite_values_are_left_out_with_one_warning(
    granularity: Granularity, method: str
) -> None:
    clean = [torch.randn(2, 50) for _ in range(3)]
    spoilt = [
        torch.cat([b, torch.full((2, 1), v)], 1) for b, v in zip(clean, (1, 2, 3), strict=True)
    ]
    for batch, value in zip(spoilt, (math.nan, math.inf, -math.inf), strict=True):
        batch[:, -1] = value
    scheme = scheme_for(method, granularity)
    with pytest.warns(CalibrationWarning, match="6 of 306") as caught:
        found = calibrate(spoilt, scheme)
    assert len(caught) == 1
    assert torch.equal(scale_of(found), scale_of(calibrate(clean, scheme)))


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(CalibrationWarning) as caught:
        calibrate([torch.tensor([math.nan, 1.0])], TensorScheme())
    assert caught[0].filename == __file__


def test_a_ragged_group_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate([torch.randn(3, 7)], scheme_for("mse", PerGroup(4)))


def test_batches_are_read_once_and_left_alone() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    before = x.detach().clone()

    def stream() -> Iterator[torch.Tensor]:
        yield x
        yield x * 2

    qparams = calibrate(stream(), TensorScheme())
    assert torch.equal(x.detach(), before)
    assert not scale_of(qparams).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    qparams = calibrate([x], TensorScheme())
    expected = float(x.abs().max()) / 127
    assert float(scale_of(qparams)) == pytest.approx(expected, rel=1e-6)
    assert fake_quantize(x, TensorScheme(), qparams).dtype == dtype


DATA_ERRORS: dict[str, object] = {
    "empty": [],
    "exhausted": iter(()),
    "a tensor": torch.randn(3, 4),
    "not iterable": 3,
    "a string": "data",
    "integers": [torch.arange(3)],
    "a tuple": [(torch.randn(3), torch.randn(3))],
    "numbers": [1.0, 2.0],
    "no values": [torch.empty(0, 3)],
    "all NaN": [torch.full((3,), math.nan), torch.tensor([math.inf])],
}


@pytest.mark.parametrize("case", DATA_ERRORS)
def test_bad_data(case: str) -> None:
    with pytest.raises(DataError):
        calibrate(DATA_ERRORS[case], TensorScheme())  # type: ignore[arg-type]


def test_batches_of_other_channels() -> None:
    with pytest.raises(DataError, match="agree"):
        calibrate([torch.randn(3, 4), torch.randn(5, 4)], TensorScheme(granularity=PerChannel(0)))


@pytest.mark.parametrize(
    "scheme", [TensorScheme(dynamic=True), TensorScheme(granularity=PerToken())]
)
def test_dynamic_schemes(scheme: TensorScheme) -> None:
    with pytest.raises(SchemeError, match="dynamic"):
        calibrate([torch.randn(3)], scheme)


def test_wrong_axis() -> None:
    with pytest.raises(SchemeError, match="axis 4"):
        calibrate([torch.randn(3, 4)], TensorScheme(granularity=PerChannel(4)))
