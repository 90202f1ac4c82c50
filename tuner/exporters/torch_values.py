"""Which tensors PyTorch's integer kernels take, and how their codes are written for them.

oneDNN takes unsigned 8-bit activations with one scale, and signed 8-bit weights with a scale per
output channel and no zero point. Fewer bits are stored in eight. Signed activations are shifted by
128: the same numbers, but the kernels for signed ones are thousands of times slower on some CPUs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner import formats
from tuner.exporters.saturation import SHIFT, overflow
from tuner.exporters.tracing import TracedWeight
from tuner.granularity import PerChannel, PerGroup, PerTensor, PerToken
from tuner.packed_tensor import stored_qparams
from tuner.packing import unpack_codes
from tuner.quantizer import Quantizer
from tuner.ranges import symmetric_zero_point
from tuner.schemes import TensorScheme

_HALF = 8
_BITS = 4


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """`value = codes · scale`: int8 codes, one scale for each row of the first axis.

    Where `is_transposed`, the codes are those of the weight's transpose. Where rows have `groups`,
    `scale` is `[rows · groups]`.
    """

    codes: Tensor
    scale: Tensor
    is_transposed: bool = False
    groups: int = 1

    @property
    def fits_four_bits(self) -> bool:
        """Whether two codes fit into a byte."""
        return bool(self.codes.amin() >= -_HALF and self.codes.amax() < _HALF)

    def overflows(self, activation: int) -> bool:
        """Return whether two products with codes up to another are too large for 16 bits."""
        return overflow(int(self.codes.amin()), int(self.codes.amax()), activation)

    def packed(self) -> Tensor:
        """Return two rows of codes in one of bytes, uint8 `[rows / 2, columns]`.

        Row r of the first half has the low four bits of row r, that of the second half the high
        ones; codes are counted from -8, and an odd row is paired with zeros.
        """
        rows = self.codes.flatten(1).short() + _HALF
        if len(rows) % 2:
            rows = torch.cat([rows, torch.full_like(rows[:1], _HALF)])
        low, high = rows.chunk(2)
        return (low | high << _BITS).to(torch.uint8)


@dataclass(frozen=True)
class StaticCodes:
    """Scale and zero point of uint8 codes, and the ends of their range."""

    scale: float
    zero_point: int
    low: int
    high: int

    @property
    def is_full(self) -> bool:
        """Whether the codes use all of uint8."""
        return (self.low, self.high) == (0, 255)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        zero = self.zero_point
        return (self.low - zero) * self.scale, (self.high - zero) * self.scale


def why_no_int8(scheme: TensorScheme) -> str | None:
    """Return why a weight cannot be stored as int8 with a scale per row; None where it can."""
    fmt = formats.get(scheme.format)
    if fmt.kind != "int" or fmt.block is not None or fmt.bits > 8:
        return f"weights in {scheme.format} have no integer kernel: their values stay float"
    if not scheme.symmetric:
        return "weights with a zero point have no integer kernel: their values stay float"
    low, high = scheme.quant_range
    zero = symmetric_zero_point(scheme)
    if low - zero < -SHIFT or high - zero >= SHIFT:
        return f"codes from {low} to {high} around {zero} do not fit int8"
    return None


def int8_weight(weight: TracedWeight) -> Int8Weight | None:
    """Return a weight's codes for integer kernels, None where it has none."""
    scheme, shape = weight.scheme, weight.shape
    if why_no_int8(scheme) is not None:
        return None
    fmt = formats.get(scheme.format)
    codes = unpack_codes(weight.parts["codes"], fmt.bits, fmt.signed, shape)
    codes = (codes.short() - symmetric_zero_point(scheme)).to(torch.int8)
    scale = stored_qparams(weight.parts, scheme).scale
    assert isinstance(scale, Tensor)
    reach = scheme.granularity
    if isinstance(reach, PerTensor):
        return Int8Weight(codes, scale.expand(shape[0]).contiguous())
    if isinstance(reach, PerGroup):
        return _grouped(codes, scale, reach)
    if not isinstance(reach, PerChannel):
        return None
    axis = reach.axis % len(shape)
    if axis == 0:
        return Int8Weight(codes, scale)
    if axis == 1 and len(shape) == 2:
        return Int8Weight(codes.t().contiguous(), scale, is_transposed=True)
    return None


def _grouped(codes: Tensor, scale: Tensor, reach: PerGroup) -> Int8Weight | None:
    is_last = codes.dim() == 2 and reach.axis % 2 == 1
    if not is_last or codes.shape[1] % reach.size:
        return None
    return Int8Weight(codes, scale.reshape(-1), groups=codes.shape[1] // reach.size)


def why_not_static(scheme: TensorScheme) -> str | None:
    """Return why an activation cannot be uint8 codes with one known scale; None where it can."""
    fmt = formats.get(scheme.format)
    if fmt.kind != "int" or fmt.block is not None or fmt.bits > 8:
        return f"activations in {scheme.format} have no integer kernel"
    if scheme.is_dynamic:
        return "ranges taken at run time have an integer kernel in Linear only, one for each token"
    if not isinstance(scheme.granularity, PerTensor):
        return "activations with more than one scale have no integer kernel"
    return None


def why_not_per_token(scheme: TensorScheme) -> str | None:
    """Return why an activation cannot be 8-bit codes with a scale per token; None where it can."""
    fmt = formats.get(scheme.format)
    if fmt.kind != "int" or fmt.block is not None or fmt.bits > 8:
        return f"activations in {scheme.format} have no integer kernel"
    fits = isinstance(scheme.granularity, PerToken) and scheme.symmetric and fmt.signed
    if not fits or scheme.calibration != "minmax" or scheme.power_of_two_scale:
        return (
            "ranges taken at run time have an integer kernel for signed symmetric integers with "
            "one min-max range for each token"
        )
    return None


def static_codes(quantizer: Quantizer) -> StaticCodes | None:
    """Return how a quantizer's values are written as uint8 codes, None where they cannot be."""
    scheme, qparams = quantizer.scheme, quantizer.qparams
    if why_not_static(scheme) is not None or qparams is None:
        return None
    shift = SHIFT if formats.get(scheme.format).signed else 0
    low, high = scheme.quant_range
    zero = 0 if qparams.zero_point is None else int(torch.as_tensor(qparams.zero_point))
    scale = float(torch.as_tensor(qparams.scale))
    return StaticCodes(scale, zero + shift, low + shift, high + shift)
