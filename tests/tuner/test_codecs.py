"""Codecs by themselves: bounds, special values, and what they refuse."""

import copy
import math

import pytest
import torch

from tests.contracts.references import ML_FORMATS
from tuner import formats
from tuner.errors import DataError
from tuner.float_layout import FloatLayout
from tuner.kernels.codecs import (
    CodebookCodec,
    Codec,
    FloatCodec,
    FunctionCodec,
    IntegerCodec,
    clamp_steps,
    codec_of,
)

KINDS = {
    "int8": IntegerCodec,
    "uint3": IntegerCodec,
    "mxint8": IntegerCodec,
    "abfp4": IntegerCodec,
    "e4m3fn": FloatCodec,
    "mxfp4": FloatCodec,
    "fp32": FloatCodec,
    "nf4": CodebookCodec,
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_which_codec(name: str, kind: type) -> None:
    codec = codec_of(formats.get(name))
    assert type(codec) is kind
    assert codec is codec_of(formats.get(name))
    assert hash(codec) == hash(copy.copy(codec))


class TestClamp:
    def test_in_place_between_numbers(self) -> None:
        x = torch.tensor([-5.0, 0.5, 5.0, math.nan, math.inf, -math.inf])
        y = clamp_steps(x, -2.0, 3.0)
        assert y is x
        assert torch.equal(y.nan_to_num(9.0), torch.tensor([-2, 0.5, 3, 9, 3, -2]))

    @pytest.mark.parametrize(
        "low", [-1.0, torch.tensor([[-1.0], [-2.0]])], ids=["number", "tensor"]
    )
    def test_between_tensors(self, low: float | torch.Tensor) -> None:
        x = torch.tensor([[-5.0, 0.5, math.nan], [5.0, -5.0, 1.0]])
        high = torch.tensor([[0.0], [4.0]])
        y = clamp_steps(x.clone(), low, high)
        lows = torch.as_tensor(low).expand(2, 1)
        expected = torch.stack([x[k].clamp(float(lows[k]), float(high[k])) for k in range(2)])
        assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))

    def test_between_tensors_under_vmap(self) -> None:
        x = torch.tensor([[-5.0, 0.5, 7.0], [5.0, -5.0, 1.0]])
        low, high = torch.tensor(-1.0), torch.tensor([[4.0], [2.0]])
        y = torch.vmap(lambda row, top: clamp_steps(row.clone(), low, top))(x, high)
        assert y.tolist() == [[-1.0, 0.5, 4.0], [2.0, -1.0, 1.0]]


class TestInteger:
    def test_ties_go_to_even(self) -> None:
        x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 9.0])
        y = IntegerCodec().round_(x, -2.0, 3.0)
        assert y.tolist() == [-2, -2, 0, 0, 2, 2, 3, 3]

    def test_nan_has_no_code(self) -> None:
        with pytest.raises(DataError, match="NaN has no integer code"):
            IntegerCodec().encode(torch.tensor([math.nan]))


WAYS = {  # of rounding in fp32: whether the bits are rounded, or a sum rounds
    "e4m3fn": False,
    "e2m1": False,
    "e5m10": False,
    "e8m7": True,
    "e8m1": True,
    "e4m0": True,
    "e4m3b0": False,
    "e7m3": False,
}


@pytest.mark.parametrize(("name", "by_bits"), WAYS.items())
def test_which_way(name: str, by_bits: bool) -> None:
    layout = formats.get(name).layout
    assert layout is not None
    codec = FloatCodec(layout)
    assert codec.by_bits == by_bits
    largest = torch.tensor(codec.limit, dtype=torch.float64)
    if not by_bits:  # the constant that rounds must stay inside fp32
        assert float(largest) * codec.magic < torch.finfo(torch.float32).max


@pytest.mark.parametrize("name", ["e4m3fn", "e8m7", "e4m0", "e4m3fnuz", "e3m2_nosub"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_tensors(name: str, dtype: torch.dtype) -> None:
    codec = codec_of(formats.get(name))
    layout = formats.get(name).layout
    assert layout is not None
    ends = -layout.largest, layout.largest
    for shape in ((), (0,), (0, 3), (2, 3)):
        x = torch.full(shape, 1.3, dtype=dtype)
        assert codec.round_(x.clone(), *ends).shape == shape
    x = torch.randn(6, 8, dtype=dtype)
    whole = codec.round_(x.clone(), *ends)
    assert torch.equal(codec.round_(x.clone()[:, ::2], *ends), whole[:, ::2])
    assert torch.equal(codec.round_(x.clone().t(), *ends), whole.t())
    assert torch.equal(codec.round_(whole.clone(), *ends), whole)


def test_double_precision_becomes_fp32() -> None:
    codec = codec_of(formats.get("fp32"))
    x = torch.tensor([1 + 2.0**-40, 1e300, -1e300, math.nan, 1e-50], dtype=torch.float64)
    largest = float(torch.finfo(torch.float32).max)
    y = codec.round_(x.clone(), -largest, largest)
    assert y.dtype == torch.float64
    assert torch.equal(y.nan_to_num(9.0), torch.tensor([1, largest, -largest, 9, 0]).double())


class TestFloatCodes:
    def test_bits_by_hand(self) -> None:
        codec = FloatCodec(FloatLayout(4, 3, 7, "fn"))
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-9, 448.0, -448.0, math.nan])
        codes = [0x00, 0x80, 0x38, 0xB8, 0x01, 0x7E, 0xFE, 0x7F]
        assert codec.encode(values).tolist() == codes
        decoded = codec.decode(torch.tensor(codes))
        assert torch.equal(decoded[:-1], values[:-1].double())
        assert bool(torch.signbit(decoded[1]))
        assert bool(decoded[-1].isnan())

    @pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m0", "e3m2_nosub"])
    def test_without_nan(self, name: str) -> None:
        with pytest.raises(DataError, match=r"has no NaN: replace the NaN values before quantize"):
            codec_of(formats.get(name)).encode(torch.tensor([1.0, math.nan]))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_codes_of_any_integer_type(self, dtype: torch.dtype) -> None:
        codes = torch.arange(256).to(dtype)
        decoded = codec_of(formats.get("e5m2")).decode(codes)
        theirs = torch.from_numpy(ML_FORMATS["e5m2"].values()).double()
        assert torch.equal(decoded.nan_to_num(9.0), theirs.nan_to_num(9.0))


class TestCodebook:
    codec = CodebookCodec((-1.0, 0.0, 0.5, 4.0))

    def test_ties_go_down(self) -> None:
        x = torch.tensor([-0.5, 0.25, 2.25, -9.0, 9.0, math.inf, -math.inf, -0.0])
        y = self.codec.round_(x, -1.0, 4.0)
        assert y.tolist() == [-1, 0, 0.5, -1, 4, 4, -1, 0]

    def test_codes_are_indices(self) -> None:
        codes = self.codec.encode(torch.tensor([4.0, -1.0, 0.5]))
        assert codes.tolist() == [3, 0, 2]
        assert self.codec.decode(codes).tolist() == [4, -1, 0.5]

    def test_columns_raise_no_warning(self) -> None:
        x = torch.randn(7, 5)
        ours = self.codec.round_(x.t(), -1.0, 4.0)
        assert torch.equal(ours, self.codec.round_(x.clone(), -1.0, 4.0).t())


class TestFunction:
    def test_its_result_is_taken(self) -> None:
        codec = FunctionCodec("mine", lambda v: v.double().floor())
        y = codec.round_(torch.tensor([1.5, -0.5]), 0.0, 0.0)
        assert y.tolist() == [1, -1]
        assert y.dtype == torch.float32

    def test_another_shape_is_refused(self) -> None:
        codec: Codec = FunctionCodec("mine", lambda v: v[:1])
        with pytest.raises(DataError, match=r"'mine' returned \[1\] for a tensor of shape \[3\]"):
            codec.round_(torch.ones(3), 0.0, 0.0)
