"""How ONNX spells the fake-quantization of an activation.

Integers of 8 and 16 bits are QuantizeLinear and DequantizeLinear; those of fewer bits have their
codes clipped between the two, so that runtimes still see 8 bits. Signed 8-bit codes are written
unsigned, their zero point moved by 128: runtimes have their fast kernels there. FP8, fp16 and bf16
are casts: of QuantizeLinear to FP8, ONNX Runtime believes that it makes a ReLU before it needless,
and that a product after it is one of integers. Scales that follow from the data, or lie along an
axis, are spelled out in arithmetic: exact, and not fast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner import formats
from tuner.exporters.onnx_ops import DEQUANTIZE, QUANTIZE
from tuner.granularity import PerChannel, PerTensor, PerToken
from tuner.quantizer import Quantizer
from tuner.schemes import TensorScheme

FLOAT8 = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_RANGES = {torch.uint8: (0, 255), torch.uint16: (0, 65535), torch.int16: (-32768, 32767)}


@dataclass(frozen=True, eq=False)
class Spelling:
    """Scale, zero point and the codes that are allowed, as QuantizeLinear takes them.

    `codes` is None where every code of the type is allowed.
    """

    scale: Tensor
    zero_point: Tensor
    codes: tuple[int, int] | None = None

    @property
    def values(self) -> tuple[float, float] | None:
        """The values of the smallest and largest code, None where every code is allowed."""
        if self.codes is None:
            return None
        low, high = (code - int(self.zero_point) for code in self.codes)
        return low * self.scale.item(), high * self.scale.item()


def why_not_spelled(scheme: TensorScheme) -> str | None:
    """Return why ONNX cannot say what a scheme does, None if it can."""
    fmt = formats.get(scheme.format)
    if fmt.block is not None or fmt.forward is not None:
        return f"ONNX has no {scheme.format}"
    if scheme.format in _HALF or scheme.format == "fp32":
        return None
    if fmt.kind == "int":
        if fmt.bits > 16:
            return f"ONNX quantizes to 16 bits at most, not to {scheme.format}"
        if scheme.is_dynamic and not isinstance(scheme.granularity, PerTensor | PerToken):
            return f"a dynamic {scheme.granularity!r} cannot be spelled in ONNX"
        known = isinstance(scheme.granularity, PerTensor | PerChannel | PerToken)
        return None if known else f"static {scheme.granularity!r} cannot be spelled in ONNX"
    if scheme.format not in FLOAT8:
        return f"ONNX has no {scheme.format}"
    if scheme.is_dynamic or not isinstance(scheme.granularity, PerTensor | PerChannel):
        return f"{scheme.format} is spelled with static scales only, one or one a channel"
    return None


def is_pair(scheme: TensorScheme) -> bool:
    """Whether a scheme is spelled as QuantizeLinear and DequantizeLinear with one scale."""
    fmt = formats.get(scheme.format)
    is_static = not scheme.is_dynamic and isinstance(scheme.granularity, PerTensor)
    return is_static and fmt.kind == "int"


def spelling_of(quantizer: Quantizer) -> Spelling:
    """Return the parameters of QuantizeLinear for a static per-tensor quantizer."""
    scheme, qparams = quantizer.scheme, quantizer.qparams
    assert qparams is not None
    scale = torch.as_tensor(qparams.scale, dtype=torch.float32).reshape(()).clone()
    zero = 0 if qparams.zero_point is None else int(qparams.zero_point)
    low, high = scheme.quant_range
    dtype, shift = _code_type(low, high)
    whole = _RANGES[dtype] == (low + shift, high + shift)
    codes = None if whole else (low + shift, high + shift)
    return Spelling(scale, torch.tensor(zero + shift, dtype=dtype), codes)


def _code_type(low: int, high: int) -> tuple[torch.dtype, int]:
    """Return the type that holds codes from low to high, and by how much they are moved."""
    if low >= 0:
        return (torch.uint8 if high <= 255 else torch.uint16), 0
    return (torch.uint8, 128) if high <= 127 and low >= -128 else (torch.int16, 0)


def paired(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    codes: tuple[int, int] | None,
    values: tuple[float, float] | None,
    name: str,
    scale_out: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize by one scale; `codes` and `values` are limits after and before.

    With another `scale_out` the floats are multiplied by `scale_out / scale`.
    """
    limited = x if values is None else x.clamp(*values)
    quantized = QUANTIZE(limited, scale, zero_point, name)
    if codes is not None:
        quantized = quantized.clamp(*codes)
    to_floats = scale if scale_out is None else scale_out
    dequantized: Tensor = DEQUANTIZE(quantized, to_floats, zero_point, 1, 0, "")
    return dequantized


def arithmetic(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Fake-quantize in plain arithmetic, as `why_not_spelled` allows."""
    scheme = quantizer.scheme
    if scheme.format == "fp32":
        return x
    if scheme.format in _HALF:
        return _cast(x, _HALF[scheme.format])
    if scheme.format in FLOAT8:
        scale, _ = _static(x, quantizer)
        return _cast(x / scale, FLOAT8[scheme.format]) * scale
    scale, zero_point = _dynamic(x, scheme) if quantizer.qparams is None else _static(x, quantizer)
    low, high = scheme.quant_range
    codes = (torch.round(x / scale) + zero_point).clamp(low, high)
    return (codes - zero_point) * scale


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype).to(x.dtype)


def _static(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    qparams, reach = quantizer.qparams, quantizer.scheme.granularity
    assert qparams is not None
    scale = torch.as_tensor(qparams.scale, dtype=torch.float32)
    zero = torch.as_tensor(0 if qparams.zero_point is None else qparams.zero_point)
    if isinstance(reach, PerChannel):
        shape = [1] * x.dim()
        shape[reach.axis] = -1
        scale = scale.reshape(shape)
        zero = zero.reshape(shape) if zero.dim() else zero
    return scale, zero.to(torch.float32)


def _dynamic(x: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """Return scale and zero point from x as `qparams_from_range` does, in fp64 on the ranges."""
    axes = [-1] if isinstance(scheme.granularity, PerToken) else list(range(x.dim()))
    low = x.amin(axes, keepdim=True).double().clamp(max=0.0)
    high = x.amax(axes, keepdim=True).double().clamp(min=0.0)
    first, last = scheme.quant_range
    if scheme.symmetric:
        middle = 0 if first < 0 else (first + last + 1) // 2
        amax = torch.maximum(-low, high)
        sides = last - middle, middle - first
        scale = torch.where(amax == 0, 1.0, amax / (min(sides) or max(sides)))
        return scale.to(x.dtype), torch.full((), float(middle))
    span = high - low
    is_empty = span == 0
    span = torch.where(is_empty, 1.0, span)
    scale = torch.where(is_empty, 1.0, span / (last - first))
    steps = torch.where(is_empty, 0.0, torch.round(low * (last - first) / span))
    return scale.to(x.dtype), (first - steps).clamp(first, last).to(x.dtype)
