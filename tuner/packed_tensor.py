"""A quantized tensor as it is stored: packed codes, and its scales in their own width."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tuner import formats
from tuner.blocks import mx_scale_of
from tuner.errors import SaveError
from tuner.kernels import codec_of
from tuner.packing import pack_codes, unpack_codes
from tuner.qparams import compute_qparams, dequantize, fake_quantize, quantize, whole_scale
from tuner.ranges import QParams, symmetric_zero_point
from tuner.schemes import TensorScheme

PART_NAMES = ("codes", "values", "scale", "zero_point", "global_scale")
StoredTensor = Mapping[str, Tensor]
"""Part name → tensor; see `pack_tensor`."""

_E8M0_BIAS, _E8M0_NAN = 127, 255


def pack_tensor(x: Tensor, scheme: TensorScheme, qparams: QParams | None = None) -> StoredTensor:
    """Return the parts that a tensor is stored as; without `qparams` they come from `x`.

    `codes`: uint8, packed in the width of the format; a function format has none and keeps its
    `values`. `scale`: uint8 E8M0 (the exponent + 127, 255 for NaN) for MX, uint8 E4M3 beside an
    fp32 `global_scale` for NVFP4, the largest magnitude in bf16 for abfp (0 stands for a scale of
    1), else fp32, or fp64 of an fp64 tensor; unscaled formats have none. `zero_point`: int32, of
    affine schemes only. Raises DataError for NaN that the format cannot hold.
    """
    fmt = formats.get(scheme.format)
    x = x.detach().cpu()
    qparams = compute_qparams(x, scheme) if qparams is None else qparams
    if fmt.has_codes:
        parts = {"codes": pack_codes(_codes(x, scheme, qparams), fmt.bits)}
    else:
        parts = {"values": fake_quantize(x, scheme, qparams).contiguous()}
    if not fmt.scaled:
        return parts
    parts["scale"] = _stored_scale(_as_scales(qparams.scale), scheme)
    if qparams.global_scale is not None:
        parts["global_scale"] = _as_scales(qparams.global_scale)
    if qparams.zero_point is not None and not scheme.symmetric:
        zero_point = torch.as_tensor(qparams.zero_point, dtype=torch.int32)
        parts["zero_point"] = zero_point.contiguous()
    return parts


def unpack_tensor(
    parts: StoredTensor, scheme: TensorScheme, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return the values that `fake_quantize` gave, bit for bit, in this shape and dtype."""
    if "values" in parts:
        return parts["values"].reshape(shape).to(dtype)
    fmt = formats.get(scheme.format)
    codes = unpack_codes(parts["codes"], fmt.bits, fmt.kind == "int" and fmt.signed, shape)
    qparams = stored_qparams(parts, scheme)
    scale = torch.as_tensor(whole_scale(qparams))
    if dtype == torch.float64:
        scale = scale.double()
    return _cast(dequantize(codes, scheme, QParams(scale, qparams.zero_point)), dtype)


def pack_current(
    current: Tensor,
    original: Tensor,
    scheme: TensorScheme,
    qparams: QParams | None = None,
    known: StoredTensor | None = None,
) -> StoredTensor:
    """Return the parts of a quantized tensor as it is on a model, trained further or not.

    `known` are parts that it was loaded from; else it was quantized from `original`.
    """
    current = current.detach().cpu()
    parts = pack_tensor(original, scheme, qparams) if known is None else known
    if not formats.get(scheme.format).has_codes:  # what a function returns may differ each time
        return {**parts, "values": current.contiguous().clone()}
    value = unpack_tensor(parts, scheme, tuple(current.shape), current.dtype)
    if bool(((value == current) | (value.isnan() & current.isnan())).all()):
        return parts
    return pack_tensor(current.to(original.dtype), scheme, qparams)


def stored_qparams(parts: StoredTensor, scheme: TensorScheme) -> QParams:
    """Return the quantization parameters among the parts."""
    if not formats.get(scheme.format).scaled:
        return QParams(1.0)
    scale = _read_scale(parts["scale"], scheme)
    zero_point = parts.get("zero_point")
    if zero_point is None and (middle := _middle(scheme)):
        zero_point = torch.full_like(scale, middle, dtype=torch.int32)
    return QParams(scale, zero_point, parts.get("global_scale"))


def check_parts(parts: StoredTensor, scheme: TensorScheme, name: str) -> None:
    """Raise SaveError where a part is missing that the scheme's format needs."""
    fmt = formats.get(scheme.format)
    needed = ["codes" if fmt.has_codes else "values"]
    needed += ["scale"] if fmt.scaled else []
    needed += ["global_scale"] if fmt.block is not None and fmt.block.scale == "e4m3" else []
    missing = [part for part in needed if part not in parts]
    if missing:
        raise SaveError(
            f"no {f'{name}.{missing[0]}'!r} was saved, which {scheme.format} needs: the weights "
            "were not written with this plan"
        )


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert as rounding does: what a narrower type cannot hold is its largest number, not inf."""
    if dtype == values.dtype:
        return values
    most = torch.finfo(dtype).max
    return torch.where(values.isinf(), values, values.clamp(-most, most)).to(dtype)


def _codes(x: Tensor, scheme: TensorScheme, qparams: QParams) -> Tensor:
    """Quantize; the codes of an MX block that is NaN as a whole, by its scale, do not matter."""
    scale = torch.as_tensor(qparams.scale)
    if not bool(scale.isnan().any()):
        return quantize(x, scheme, qparams)
    numbers = torch.where(fake_quantize(x, scheme, qparams).isnan(), 0.0, x)
    return quantize(numbers, scheme, QParams(scale.nan_to_num(nan=1.0)))


def _middle(scheme: TensorScheme) -> int:
    is_integer = formats.get(scheme.format).kind == "int"
    return symmetric_zero_point(scheme) if is_integer and scheme.symmetric else 0


def _as_scales(scale: Tensor | float) -> Tensor:
    """Keep float64 scales (of float64 models) as they are; all others are float32."""
    tensor = torch.as_tensor(scale).detach().cpu()
    tensor = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    return tensor.contiguous()


def _stored_scale(scale: Tensor, scheme: TensorScheme) -> Tensor:
    """Return the scale in the width of its format, if that is exact; else as it is."""
    stored = _narrowed(scale, scheme)
    same = torch.equal(_read_scale(stored, scheme).nan_to_num(nan=0.0), scale.nan_to_num(nan=0.0))
    return stored if same else scale


def _narrowed(scale: Tensor, scheme: TensorScheme) -> Tensor:
    block = formats.get(scheme.format).block
    if block is None or block.scale == "fp32":
        return scale
    if block.scale == "e4m3":
        return codec_of(formats.get("e4m3fn")).encode(scale).to(torch.uint8)
    if block.scale == "e8m0":
        exponent = torch.frexp(scale.double() / _e8m0_unit(scheme)).exponent - 1
        return torch.where(scale.isnan(), _E8M0_NAN, exponent + _E8M0_BIAS).to(torch.uint8)
    amax = (scale.double() * scheme.quant_range[1]).to(torch.bfloat16)
    return torch.where(amax.float() / scheme.quant_range[1] == scale, amax, 0.0)


def _read_scale(stored: Tensor, scheme: TensorScheme) -> Tensor:
    """Return the scale in fp32 or fp64, whatever width it is stored in."""
    block = formats.get(scheme.format).block
    if stored.dtype == torch.bfloat16:
        scale = stored.float() / scheme.quant_range[1]
        return torch.where(scale == 0, 1.0, scale)
    if stored.dtype != torch.uint8 or block is None:
        return stored
    if block.scale == "e4m3":
        return codec_of(formats.get("e4m3fn")).decode(stored).float()
    ones = torch.ones(stored.shape, dtype=torch.float64)
    scale = torch.ldexp(ones, stored.int() - _E8M0_BIAS) * _e8m0_unit(scheme)
    return torch.where(stored == _E8M0_NAN, torch.nan, scale).float()


def _e8m0_unit(scheme: TensorScheme) -> float:
    """Return what a scale of 2^0 stands for: MXINT8 counts in units of 2^-6, others in 1."""
    mx = mx_scale_of(scheme)
    is_integer = formats.get(scheme.format).kind == "int"
    return 2.0**-mx.mantissa if mx is not None and is_integer else 1.0
