"""How ONNX spells a quantized weight: codes as a small constant, and what makes floats of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner import formats
from tuner.exporters.onnx_activations import FLOAT8
from tuner.exporters.onnx_ops import DEQUANTIZE
from tuner.exporters.tracing import TracedWeight
from tuner.granularity import PerChannel, PerGroup, PerTensor
from tuner.packed_tensor import stored_qparams
from tuner.packing import unpack_codes
from tuner.schemes import TensorScheme

FOUR_BITS = "_codes4"
"""The end of the names of constants whose int8 codes are written as INT4."""


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """Codes in the shape of the weight (int8, int16 or an FP8 type), scales and zero points.

    `axis` is that of the scales, `group` how many codes share one along it (0: all of the other
    axes); `bits` is what a code takes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    group: int
    bits: int


def why_not_stored(scheme: TensorScheme) -> str | None:
    """Return why ONNX cannot hold codes of a scheme, None if it can."""
    fmt = formats.get(scheme.format)
    if fmt.block is not None or fmt.forward is not None:
        return f"ONNX has no {scheme.format}: its values are stored as floats"
    if fmt.kind == "int":
        if fmt.bits > 16:
            return f"{scheme.format} is wider than what DequantizeLinear reads"
    elif scheme.format not in FLOAT8:
        return f"ONNX has no {scheme.format}: its values are stored as floats"
    if not isinstance(scheme.granularity, PerTensor | PerChannel | PerGroup):
        return f"{scheme.granularity!r} cannot be spelled: its values are stored as floats"
    return None


def codes_of(weight: TracedWeight) -> WeightCodes:
    """Return the codes of a weight that ONNX can hold; unsigned ones are moved to be signed."""
    scheme, shape = weight.scheme, weight.shape
    fmt, qparams = formats.get(scheme.format), stored_qparams(weight.parts, scheme)
    codes = unpack_codes(weight.parts["codes"], fmt.bits, fmt.kind == "int" and fmt.signed, shape)
    scale = torch.as_tensor(qparams.scale).float()
    zero = torch.as_tensor(0 if qparams.zero_point is None else qparams.zero_point).expand_as(scale)
    if scheme.format in FLOAT8:
        dtype = FLOAT8[scheme.format]
        codes, zero = codes.to(torch.uint8).view(dtype), torch.zeros_like(scale).to(dtype)
    else:
        shift = 0 if fmt.signed else 2 ** (fmt.bits - 1)
        dtype = torch.int8 if fmt.bits <= 8 else torch.int16
        codes, zero = ((t.to(torch.int32) - shift).to(dtype) for t in (codes, zero))
    reach = scheme.granularity
    axis = 0 if isinstance(reach, PerTensor) else reach.axis % len(shape)  # type: ignore[union-attr]
    group = reach.size if isinstance(reach, PerGroup) else 0
    return WeightCodes(codes, scale, zero, axis, group, _width(fmt.bits))


def _width(bits: int) -> int:
    return 4 if bits <= 4 else 8 if bits <= 8 else 16


def has_block_spelling(codes: WeightCodes) -> bool:
    """Whether DequantizeLinear can say it: groups that divide their axis, or one scale a slice."""
    return not codes.group or codes.codes.shape[codes.axis] % codes.group == 0


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int) -> Tensor:
    """Return the floats of codes by DequantizeLinear."""
    values: Tensor = DEQUANTIZE(codes, scale, zero_point, axis, block)
    return values


def spelled_out(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int) -> Tensor:
    """Return the floats of codes in arithmetic, for groups that do not divide their axis."""
    length = codes.shape[axis]
    scale, zero = (t.repeat_interleave(group, axis) for t in (scale, zero_point))
    scale, zero = (t.narrow(axis, 0, length) for t in (scale, zero))
    return (codes.to(scale.dtype) - zero.to(scale.dtype)) * scale


def packed_rows(codes: Tensor) -> Tensor:
    """Pack pairs of neighbours of the last axis, an even number, into uint8: `low + 16 · high`."""
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
    return unsigned[..., ::2] | (unsigned[..., 1::2] << 4)


def looked_up(
    indices: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, group: int
) -> Tensor:
    """Look up rows of an embedding table: only the rows that are asked for become floats.

    Codes of 4 bits come packed (uint8), others as they are. Scale and zero point are `[rows, n]`
    where rows have their own (n = 1, or one for each group), else whatever every row shares.
    """
    rows = _rows(codes, indices)
    if codes.dtype == torch.uint8:
        low, high = torch.bitwise_and(rows, 15), torch.bitwise_right_shift(rows, 4)
        pairs = torch.stack((low.to(torch.int8), high.to(torch.int8)), -1)
        values = pairs.flatten(-2).to(scale.dtype) - 8
    else:
        values = rows.to(scale.dtype)
    if scale.dim() == 2:
        scale, zero_point = _rows(scale, indices), _rows(zero_point, indices)
    if group:
        values = values.unflatten(-1, (-1, group))
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    found = (values - zero_point.to(scale.dtype)) * scale
    return found.flatten(-2) if group else found


def _rows(table: Tensor, indices: Tensor) -> Tensor:
    return table.index_select(0, indices.reshape(-1)).reshape(*indices.shape, table.shape[1])
