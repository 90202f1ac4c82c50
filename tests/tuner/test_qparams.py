"""Integer numerics against torch's own operators and against int64 arithmetic."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuner import formats
from tuner.errors import DataError, SchemeError, TunerError
from tuner.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from tuner.qparams import (
    QParams,
    compute_qparams,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
)
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme

NEAR_TIE = 1e-3  # torch multiplies by 1/s: closer to a tie it may choose the other level
ONE_ULP = 2.0**-23

GRANULARITIES: list[Granularity] = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerChannel(-1),
    PerGroup(2),
    PerGroup(3),
    PerGroup(4, 0),
    PerGroup(2, -2),
    PerGroup(100, 1),
    PerToken(),
    PerBlock(4),
]
FORMATS_TO_8 = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]
FORMATS_FROM_9 = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(9, 17)]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of_ties(scale: float, steps: int) -> torch.Tensor:
    """All multiples of a quarter step up to and beyond the range: every tie is among them."""
    return torch.arange(-4 * steps - 9, 4 * steps + 10) * (scale / 4)


def zero_point_for(scheme: TensorScheme) -> int:
    low, high = scheme.quant_range
    if not scheme.symmetric:
        return low + (high - low) // 3
    return 0 if formats.get(scheme.format).signed else 2 ** (scheme.bits - 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("name", FORMATS_TO_8)
class TestAgainstTorch:
    def scheme(self, name: str, narrow: bool, symmetric: bool, **fields: object) -> TensorScheme:
        if narrow and name.startswith("u"):
            fields["quant_min"] = 1
        return TensorScheme(
            format=name,
            narrow=narrow,
            symmetric=symmetric,
            **fields,  # type: ignore[arg-type]
        )

    @pytest.mark.parametrize("scale", [2.0**-7, 1.0, 2.0**5])
    def test_per_tensor_bit_for_bit(
        self, name: str, narrow: bool, symmetric: bool, scale: float
    ) -> None:
        scheme = self.scheme(name, narrow, symmetric)
        zero = zero_point_for(scheme)
        x = torch.cat([grid_of_ties(scale, 2**scheme.bits), values(5000) * scale * 2**scheme.bits])
        ours = fake_quantize(x, scheme, QParams(scale, zero))
        theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero, *scheme.quant_range)
        assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_per_channel_bit_for_bit(
        self, name: str, narrow: bool, symmetric: bool, axis: int
    ) -> None:
        scheme = self.scheme(name, narrow, symmetric, granularity=PerChannel(axis))
        x = values(5, 6, 7) * 2 ** (scheme.bits - 1)
        channels = x.shape[axis]
        scale = 2.0 ** torch.arange(-2, channels - 2)
        zero = torch.full((channels,), zero_point_for(scheme), dtype=torch.int32)
        ours = fake_quantize(x, scheme, QParams(scale, zero))
        theirs = torch.fake_quantize_per_channel_affine(
            x, scale, zero, axis % 3, *scheme.quant_range
        )
        assert torch.equal(ours, theirs)

    def test_any_scale_up_to_near_ties(self, name: str, narrow: bool, symmetric: bool) -> None:
        scheme = self.scheme(name, narrow, symmetric)
        x = values(20000) * 3
        qparams = compute_qparams(x, scheme)
        scale = float(qparams.scale)
        zero = 0 if qparams.zero_point is None else int(qparams.zero_point)
        theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero, *scheme.quant_range)
        steps = x.double() / scale
        far = ((steps - steps.floor()) - 0.5).abs() > NEAR_TIE
        assert far.float().mean() > 0.99
        assert torch.equal(fake_quantize(x, scheme, qparams)[far], theirs[far])

    def test_gradient(self, name: str, narrow: bool, symmetric: bool) -> None:
        scheme = self.scheme(name, narrow, symmetric)
        scale, zero = 0.25, zero_point_for(scheme)
        x = values(3000) * scale * 2**scheme.bits
        low, high = (code - zero for code in scheme.quant_range)
        # torch rounds before it compares: within half a step of the ends the two differ
        steps = x / scale
        same = ((steps - low).abs() > 0.5) & ((steps - high).abs() > 0.5)
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        upstream = values(3000, seed=1)
        fake_quantize(ours, scheme, QParams(scale, zero)).backward(upstream)
        torch.fake_quantize_per_tensor_affine(theirs, scale, zero, *scheme.quant_range).backward(
            upstream
        )
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad[same], theirs.grad[same])


def round_half_even(numerator: np.ndarray, denominator: int) -> np.ndarray:
    """Divide int64 by a positive integer, rounding ties to even, in integers alone."""
    quotient, rest = np.divmod(numerator, denominator)
    up = (2 * rest > denominator) | ((2 * rest == denominator) & (quotient % 2 == 1))
    return quotient + up


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", FORMATS_FROM_9)
def test_wide_formats_against_int64_arithmetic(name: str, affine: bool) -> None:
    scheme = TensorScheme(format=name, symmetric=not affine)
    low, high = scheme.quant_range
    zero = zero_point_for(scheme)
    rng = np.random.default_rng(0)
    # x = k / 2^6 and s = 3 / 2^4, hence x / s = k / 12: all of it exact in integers
    k = np.concatenate([rng.integers(-(2**23), 2**23, 20000), np.arange(-2000, 2000) * 6])
    codes = np.clip(round_half_even(k, 12) + zero, low, high)
    x = torch.from_numpy(k).double().div(64).float()
    qparams = QParams(3 / 16, zero)
    ours = quantize(x, scheme, qparams)
    assert np.array_equal(ours.numpy(), codes)
    expected = torch.from_numpy((codes - zero) * 3).double() / 16
    assert torch.equal(dequantize(ours, scheme, qparams).double(), expected)
    assert torch.equal(fake_quantize(x, scheme, qparams).double(), expected)


CODE_DTYPES = {
    "int2": torch.int8,
    "int8": torch.int8,
    "uint3": torch.uint8,
    "uint8": torch.uint8,
    "int9": torch.int16,
    "int16": torch.int16,
    "uint15": torch.int16,
    "uint16": torch.int32,
}


@pytest.mark.parametrize(("name", "dtype"), CODE_DTYPES.items())
def test_code_dtype(name: str, dtype: torch.dtype) -> None:
    scheme = TensorScheme(format=name)
    x = values(30)
    assert quantize(x, scheme, compute_qparams(x, scheme)).dtype == dtype


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["int8", "uint8", "int3", "uint5", "int12", "uint16"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_codes_and_values_agree(granularity: Granularity, name: str, symmetric: bool) -> None:
    scheme = TensorScheme(format=name, granularity=granularity, symmetric=symmetric)
    x = values(8, 6, 9)
    qparams = compute_qparams(x, scheme)
    y = fake_quantize(x, scheme, qparams)
    codes = quantize(x, scheme, qparams)
    low, high = scheme.quant_range
    assert codes.min() >= low
    assert codes.max() <= high
    assert torch.equal(dequantize(codes, scheme, qparams), y)
    assert torch.equal(fake_quantize(x, scheme), y)
    assert torch.equal(fake_quantize(y, scheme, qparams), y)


SHAPES = {
    PerTensor(): (),
    PerChannel(1): (6,),
    PerChannel(-1): (9,),
    PerGroup(4): (8, 6, 3),
    PerGroup(4, 1): (8, 2, 9),
    PerGroup(4, -3): (2, 6, 9),
    PerToken(): (8, 6, 1),
    PerBlock(3): (8, 6, 3),
}


@pytest.mark.parametrize(("granularity", "shape"), SHAPES.items(), ids=repr)
@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
def test_parameter_shapes(
    granularity: Granularity, shape: tuple[int, ...], calibration: str
) -> None:
    for symmetric in (True, False):
        scheme = TensorScheme(
            granularity=granularity,
            symmetric=symmetric,
            calibration=calibration,  # type: ignore[arg-type]
        )
        qparams = compute_qparams(values(8, 6, 9), scheme)
        assert isinstance(qparams.scale, torch.Tensor)
        assert tuple(qparams.scale.shape) == shape
        if not symmetric:
            assert isinstance(qparams.zero_point, torch.Tensor)
            assert tuple(qparams.zero_point.shape) == shape


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy", "ema"])
@pytest.mark.parametrize(("size", "axis"), [(3, -1), (4, -1), (4, 0), (3, 1)])
def test_a_group_is_a_tensor_of_its_own(
    size: int, axis: int, calibration: str, symmetric: bool
) -> None:
    x = values(5, 4, 7)
    fields = {"format": "int6", "calibration": calibration, "symmetric": symmetric}
    grouped = TensorScheme.model_validate({**fields, "granularity": PerGroup(size, axis)})
    alone = TensorScheme.model_validate({**fields, "granularity": PerChannel(0)})
    y = fake_quantize(x, grouped).movedim(axis, -1)
    rows = x.movedim(axis, -1)
    for start in range(0, rows.shape[-1], size):
        part = rows[..., start : start + size]
        flat = part.reshape(-1, part.shape[-1])
        expected = fake_quantize(flat, alone).reshape(part.shape)
        assert torch.equal(y[..., start : start + size], expected)


RANGE_TABLE = [
    # low, high, fields, scale, zero_point
    (-1.0, 2.0, {"format": "int8"}, 2 / 127, None),
    (-3.0, 2.0, {"format": "int8"}, 3 / 127, None),
    (-3.0, 2.0, {"format": "int8", "narrow": True}, 3 / 127, None),
    (-3.0, 2.0, {"format": "int8", "reduce_range": True}, 3 / 63, None),
    (-3.0, 2.0, {"format": "int2"}, 3.0, None),
    (-3.0, 2.0, {"format": "uint8"}, 3 / 127, 128),
    (-3.0, 2.0, {"format": "uint8", "reduce_range": True}, 3 / 63, 64),
    (-3.0, 2.0, {"format": "int8", "quant_min": -5, "quant_max": 10}, 3 / 5, None),
    (-3.0, 2.0, {"format": "int8", "quant_min": 0}, 3 / 127, None),
    (1.0, 2.0, {"format": "int4"}, 2 / 7, None),
    (0.0, 2.55, {"format": "uint8", "symmetric": False}, 0.01, 0),
    (0.0, 2.55, {"format": "int8", "symmetric": False}, 0.01, -128),
    (-1.0, 1.0, {"format": "uint8", "symmetric": False}, 2 / 255, 128),
    (-1.0, 1.0, {"format": "int8", "symmetric": False}, 2 / 255, 0),
    (1.0, 2.0, {"format": "uint4", "symmetric": False}, 2 / 15, 0),
    (-2.0, -1.0, {"format": "uint4", "symmetric": False}, 2 / 15, 15),
    (-1.0, 2.0, {"format": "uint2", "symmetric": False}, 1.0, 1),
    (-3.0, 2.0, {"format": "int8", "power_of_two_scale": True}, 2.0**-5, None),
    (-1.0, 127 / 128, {"format": "int8", "power_of_two_scale": True}, 2.0**-6, None),
    (-127 / 128, 0.5, {"format": "int8", "power_of_two_scale": True}, 2.0**-7, None),
    (0.0, 3.0, {"format": "uint8", "symmetric": False, "power_of_two_scale": True}, 2.0**-6, 0),
    (0.0, 0.0, {"format": "int8"}, 1.0, None),
    (0.0, 0.0, {"format": "uint8", "symmetric": False}, 1.0, 0),
    (0.0, 0.0, {"format": "int8", "power_of_two_scale": True}, 1.0, None),
    (0.0, 1e-30, {"format": "uint8", "symmetric": False}, 1e-30 / 255, 0),
    (-1e-12, 0.0, {"format": "int8"}, 1e-12 / 127, None),
]


@pytest.mark.parametrize(("low", "high", "fields", "scale", "zero_point"), RANGE_TABLE)
def test_qparams_from_range(
    low: float, high: float, fields: dict[str, object], scale: float, zero_point: int | None
) -> None:
    scheme = TensorScheme.model_validate(fields)
    qparams = qparams_from_range(torch.tensor(low), torch.tensor(high), scheme)
    assert float(qparams.scale) == pytest.approx(scale, rel=2 * ONE_ULP)
    found = None if qparams.zero_point is None else int(qparams.zero_point)
    assert found == zero_point


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("amax", [1e-45, 1e-41, 1e-38, 1e-12, 1e12, 1e38, 3.4e38])
def test_extreme_ranges_stay_finite(amax: float, symmetric: bool) -> None:
    scheme = TensorScheme(symmetric=symmetric)
    x = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0]) * amax
    qparams = compute_qparams(x, scheme)
    y = fake_quantize(x, scheme, qparams)
    assert float(qparams.scale) > 0
    assert torch.isfinite(y).all()
    assert ((y - x).abs() <= 0.01 * amax + 2.0**-149).all()


# beyond 2^126 the least value of the grid would be -inf: there the scale is cut, see above
@given(
    st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=20),
    st.sampled_from(["int2", "int4", "uint4", "int8", "uint8", "int16"]),
    st.booleans(),
)
def test_error_is_at_most_half_a_step(data: list[float], name: str, symmetric: bool) -> None:
    scheme = TensorScheme(format=name, symmetric=symmetric)
    x = torch.tensor(data)
    qparams = compute_qparams(x, scheme)
    y = fake_quantize(x, scheme, qparams)
    # the zero point of an affine scheme is rounded too: half a step more at the ends
    steps = 0.5 if symmetric else 1.0
    bound = steps * float(qparams.scale) + 2**-20 * float(x.abs().max())
    assert torch.isfinite(y).all()
    assert ((y.double() - x.double()).abs() <= bound * (1 + 1e-6)).all()
    assert torch.equal(dequantize(quantize(x, scheme, qparams), scheme, qparams), y)
    assert (y[x == 0] == 0).all()


def test_scale_of_one_rounds_to_the_format_itself() -> None:
    x = torch.tensor([-300.0, -2.5, -0.4, 0.5, 1.5, 2.4, 300.0])
    expected = torch.tensor([-128.0, -2.0, 0.0, 0.0, 2.0, 2.0, 127.0])
    for granularity in (PerTensor(), PerChannel(0), PerToken()):
        scheme = TensorScheme(granularity=granularity)
        assert torch.equal(fake_quantize(x, scheme, QParams(scale=1.0)), expected)
    unsigned = fake_quantize(x, TensorScheme(format="uint8"), QParams(scale=1.0))
    assert torch.equal(unsigned, torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 255.0]))


def test_nan_stays_and_infinity_saturates() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    for granularity in (PerTensor(), PerChannel(0), PerToken(), PerGroup(2)):
        for zero_point in (None, 3):
            scheme = TensorScheme(granularity=granularity, symmetric=zero_point is None)
            scale: torch.Tensor | float = 0.5
            if granularity == PerChannel(0):
                scale = torch.full((4,), 0.5)
            zero = zero_point or 0
            y = fake_quantize(x, scheme, QParams(scale, zero_point))
            assert y[0].isnan()
            assert y[1:].tolist() == [(127 - zero) / 2, (-128 - zero) / 2, 1.0]
    with pytest.raises(DataError, match="NaN"):
        quantize(x, TensorScheme(), QParams(0.5))
    assert quantize(x[1:], TensorScheme(), QParams(0.5)).tolist() == [127, -128, 2]


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(100, 1)], ids=repr)
def test_non_finite_values_do_not_spoil_the_range(
    granularity: Granularity, calibration: str
) -> None:
    scheme = TensorScheme(granularity=granularity, calibration=calibration)  # type: ignore[arg-type]
    x = values(8, 60, 2)
    x[0, 0, 0] = 0.0
    clean = compute_qparams(x, scheme).scale
    x[0, 0, 0] = float("nan")
    spoilt = compute_qparams(x, scheme).scale
    assert isinstance(clean, torch.Tensor)
    assert isinstance(spoilt, torch.Tensor)
    if calibration == "percentile":  # a value less moves the rank by a little
        torch.testing.assert_close(spoilt, clean, rtol=1e-3, atol=0)
    else:
        assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerToken(), PerGroup(3)])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, granularity: Granularity) -> None:
    x = values(40, 16).to(dtype)
    for symmetric in (True, False):
        scheme = TensorScheme(granularity=granularity, symmetric=symmetric)
        qparams = compute_qparams(x, scheme)
        y = fake_quantize(x, scheme, qparams)
        assert y.dtype == dtype
        assert isinstance(qparams.scale, torch.Tensor)
        assert qparams.scale.dtype == torch.float32
        assert torch.equal(y, fake_quantize(x.float(), scheme, qparams).to(dtype))
        codes = quantize(x, scheme, qparams)
        assert torch.equal(codes, quantize(x.float(), scheme, qparams))


def test_half_precision_does_not_overflow() -> None:
    x = torch.tensor([-65504.0, 65504.0, float("inf")], dtype=torch.float16)
    for name in ("int8", "uint4", "int2"):
        y = fake_quantize(x, TensorScheme(format=name, symmetric=False))
        assert torch.isfinite(y).all()


def test_double_is_rounded_once() -> None:
    x = torch.tensor([0.5 + 2.0**-40, 1.5 - 2.0**-40], dtype=torch.float64)
    scheme = TensorScheme()
    y = fake_quantize(x, scheme, QParams(scale=1.0))
    assert y.dtype == torch.float64
    assert y.tolist() == [1.0, 1.0]
    assert quantize(x, scheme, QParams(scale=1.0)).tolist() == [1, 1]
    qparams = compute_qparams(torch.tensor([0.1], dtype=torch.float64), scheme)
    assert float(qparams.scale) == pytest.approx(0.1 / 127, rel=1e-15)


def test_division_is_exact() -> None:
    # 127 · s / s is 127 for every s, while 127 · s · (1 / s) is not
    scales = values(2000).abs() + 0.01
    x = scales.double() * 63.5
    keep = x.float().double() == x  # ties that fp32 holds exactly
    for scale, tie in zip(scales[keep].tolist(), x[keep].float(), strict=True):
        assert quantize(tie, TensorScheme(), QParams(scale)).item() == 64


LAYOUTS = {
    "contiguous": lambda: values(2, 8, 6, 4),
    "channels_last": lambda: values(2, 8, 6, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: values(4, 6, 8, 2).permute(3, 2, 1, 0),
    "sliced": lambda: values(2, 16, 6, 9)[:, ::2, :, 1:5],
    "expanded": lambda: values(2, 1, 6, 4).expand(2, 8, 6, 4),
    "large": lambda: values(40, 8, 60, 40),
    "large channels_last": lambda: values(40, 8, 60, 40).to(memory_format=torch.channels_last),
    "large sliced": lambda: values(40, 16, 60, 40)[:, ::2],
    "large half": lambda: values(40, 8, 60, 40).bfloat16(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "granularity",
    [PerTensor(), PerChannel(1), PerToken(), PerGroup(4, 1), PerGroup(3, 2)],
    ids=repr,
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_layouts(layout: str, granularity: Granularity, symmetric: bool) -> None:
    x = LAYOUTS[layout]()
    before = x.clone()
    scheme = TensorScheme(granularity=granularity, symmetric=symmetric)
    y = fake_quantize(x, scheme)
    # an element's value does not depend on how the tensor lies in memory, nor on chunks
    part = slice(1, 2)
    qparams = compute_qparams(x, scheme)
    codes = quantize(x.contiguous(), scheme, qparams)
    assert torch.equal(y, dequantize(codes, scheme, qparams).to(x.dtype))
    assert torch.equal(y[part], fake_quantize(x, scheme, qparams)[part])
    assert torch.equal(x, before)
    if "channels_last" in layout:
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.shape == x.shape


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("granularity", [*GRANULARITIES[:2], PerGroup(2), PerToken()], ids=repr)
def test_empty_tensors(shape: tuple[int, ...], granularity: Granularity) -> None:
    x = torch.empty(shape)
    for symmetric in (True, False):
        scheme = TensorScheme(granularity=granularity, symmetric=symmetric)
        qparams = compute_qparams(x, scheme)
        assert fake_quantize(x, scheme, qparams).shape == shape
        assert quantize(x, scheme, qparams).shape == shape


def test_0d_tensors() -> None:
    x = torch.tensor(1.3)
    y = fake_quantize(x, TensorScheme(format="int4"), QParams(0.5))
    assert y.shape == ()
    assert y.item() == 1.5
    assert fake_quantize(x, TensorScheme(format="int4")).item() == pytest.approx(1.3)


class TestGradient:
    def test_is_one_on_the_closed_range_and_zero_outside(self) -> None:
        x = torch.tensor([-64.5, -64.0, -3.3, 0.0, 63.5, 63.6, 70.0], requires_grad=True)
        fake_quantize(x, TensorScheme(), QParams(0.5)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 1, 1, 1, 1, 0, 0]

    def test_the_largest_value_of_every_tensor_is_inside(self) -> None:
        for seed in range(50):
            x = values(64, seed=seed).requires_grad_()
            fake_quantize(x, TensorScheme()).sum().backward()
            assert x.grad is not None
            assert (x.grad == 1).all()

    @pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
    def test_per_granularity(self, granularity: Granularity) -> None:
        scheme = TensorScheme(format="int4", granularity=granularity, symmetric=False)
        x = values(8, 6, 9)
        qparams = compute_qparams(x / 2, scheme)
        leaf = x.clone().requires_grad_()
        fake_quantize(leaf, scheme, qparams).sum().backward()
        bottom, top = (fake_quantize(x.fill_(end), scheme, qparams) for end in (-1e9, 1e9))
        inside = (leaf >= bottom) & (leaf <= top)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad == 1, inside)
        assert inside.any()
        assert not inside.all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=repr)
    def test_infinity_is_outside_even_where_the_range_leaves_fp32(
        self, granularity: Granularity, dtype: torch.dtype
    ) -> None:
        x = torch.tensor([[1e38, torch.inf, -torch.inf, torch.nan]], dtype=dtype).requires_grad_()
        scale = torch.tensor([2e37])  # 127 · 2e37 > 3.4e38
        qparams = QParams(scale if granularity == PerChannel(0) else 2e37)
        fake_quantize(x, TensorScheme(granularity=granularity), qparams).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[1, 0, 0, 0]]

    def test_half_precision_keeps_its_dtype(self) -> None:
        x = values(10).bfloat16().requires_grad_()
        fake_quantize(x, TensorScheme()).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


ERRORS = {
    "integers": lambda: fake_quantize(torch.ones(3, dtype=torch.int32), TensorScheme()),
    "bool": lambda: compute_qparams(torch.ones(3, dtype=torch.bool), TensorScheme()),
    "complex": lambda: fake_quantize(torch.ones(3, dtype=torch.complex64), TensorScheme()),
    "no tensor": lambda: fake_quantize([1.0], TensorScheme()),  # type: ignore[arg-type]
    "quantize integers": lambda: quantize(torch.ones(3).int(), TensorScheme(), QParams(1.0)),
    "dequantize floats": lambda: dequantize(torch.ones(3), TensorScheme(), QParams(1.0)),
    "axis": lambda: compute_qparams(values(3, 4), TensorScheme(granularity=PerChannel(2))),
    "negative axis": lambda: compute_qparams(
        values(3, 4), TensorScheme(granularity=PerGroup(2, -3))
    ),
    "0-d channels": lambda: fake_quantize(
        torch.tensor(1.0), TensorScheme(granularity=PerChannel(0))
    ),
    "0-d token": lambda: fake_quantize(torch.tensor(1.0), TensorScheme(granularity=PerToken())),
    "channel count": lambda: fake_quantize(
        values(3, 4), TensorScheme(granularity=PerChannel(0)), QParams(torch.ones(4))
    ),
    "per-tensor vector": lambda: fake_quantize(values(3), TensorScheme(), QParams(torch.ones(3))),
    "zero point shape": lambda: fake_quantize(
        values(3, 4),
        TensorScheme(granularity=PerChannel(0)),
        QParams(torch.ones(3), torch.ones(4, dtype=torch.int32)),
    ),
    "zero scale": lambda: fake_quantize(values(3), TensorScheme(), QParams(0.0)),
    "negative scale": lambda: quantize(values(3), TensorScheme(), QParams(-1.0)),
    "nan scale": lambda: Quantizer(TensorScheme(), QParams(float("nan"))),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_our_tree(case: str) -> None:
    with pytest.raises(TunerError) as caught:
        ERRORS[case]()
    assert isinstance(caught.value, DataError | SchemeError)


class TestQuantizer:
    SCHEMES = (
        TensorScheme(),
        TensorScheme(symmetric=False),
        TensorScheme(format="uint4", granularity=PerChannel(1), symmetric=False),
        TensorScheme(granularity=PerGroup(4)),
        TensorScheme(dynamic=True, symmetric=False),
        TensorScheme(granularity=PerToken()),
        TensorScheme(granularity=PerToken(), symmetric=False, calibration="mse"),
    )

    @pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_equals_fake_quantize(self, scheme: TensorScheme, dtype: torch.dtype) -> None:
        x = values(3, 12, 8).to(dtype)
        qparams = None if scheme.is_dynamic else compute_qparams(values(3, 12, 8), scheme)
        quantizer = Quantizer(scheme, qparams)
        before = x.clone()
        for one in (quantizer, copy.deepcopy(quantizer)):
            assert torch.equal(one(x), fake_quantize(x, scheme, qparams))
        with torch.inference_mode():
            assert torch.equal(quantizer(x), fake_quantize(x, scheme, qparams))
        assert torch.equal(x, before)

    def test_gradient(self) -> None:
        x = torch.tensor([1.0, 500.0], requires_grad=True)
        Quantizer(TensorScheme(), QParams(1.0))(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [1.0, 0.0]
        with torch.no_grad():
            assert not Quantizer(TensorScheme(), QParams(1.0))(x).requires_grad

    DESCRIPTIONS = (
        (
            TensorScheme(symmetric=False),
            QParams(torch.tensor(0.0123), torch.tensor(12)),
            "int8 per-tensor affine, scale 0.0123, zero point 12",
        ),
        (
            TensorScheme(format="int4", granularity=PerChannel(0)),
            QParams(torch.tensor([0.5, 0.25])),
            "int4 per-channel symmetric, scale 0.25 to 0.5",
        ),
        (TensorScheme(granularity=PerToken()), None, "int8 per-token symmetric, dynamic"),
    )

    @pytest.mark.parametrize(("scheme", "qparams", "text"), DESCRIPTIONS)
    def test_describe(self, scheme: TensorScheme, qparams: QParams | None, text: str) -> None:
        assert Quantizer(scheme, qparams).describe() == text


@pytest.mark.parametrize("name", ["int2", "int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_per_channel_beats_every_other_range(name: str, symmetric: bool) -> None:
    x = values(6, 2000) * torch.tensor([0.01, 0.1, 1, 1, 10, 1000.0])[:, None]
    x[3] = x[3] ** 3
    x[4].relu_()
    scheme = TensorScheme(
        format=name, granularity=PerChannel(0), calibration="mse", symmetric=symmetric
    )

    def errors(qparams: QParams) -> torch.Tensor:
        return (fake_quantize(x, scheme, qparams) - x).square().mean(-1)

    low, high = x.amin(-1), x.amax(-1)
    if symmetric:
        high = x.abs().amax(-1)
        low = -high
    ratios = np.geomspace(1, 0.05, 150)
    best = torch.stack(
        [errors(qparams_from_range(low * r, high * r, scheme)) for r in ratios]
    ).amin(0)
    allowance = 1.02  # 2000 values: at 8 bits the errors of near ranges differ by chance
    assert (errors(compute_qparams(x, scheme)) <= allowance * best).all()
