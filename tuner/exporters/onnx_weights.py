"""How ONNX spells a quantized weight: codes as a small constant, and what makes floats of them."""

import math
from dataclasses import dataclass, replace

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

_LEAST_GROUP = 16
"""The shortest groups that are worth a split: below, rows are padded instead."""

FOUR_BITS, FOUR_BITS_READ_AS_EIGHT = "int4", "int4 as int8"
"""How DequantizeLinear's codes are stored where not as they are; runtimes multiply int8 only."""

HALVES = {"fp16": "_fp16", "bf16": "_bf16"}
"""Format → the end of the names of float constants that are written in it."""


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """Codes in the shape of the weight (int8, int16 or an FP8 type), scales and zero points.

    `axis` is that of the scales, `group` how many codes share one along it (0: each has its own,
    which it shares with the other axes). Groups fill the axis: its first `length` codes are the
    weight's, the others are padding. `bits` is what a code takes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int
    group: int
    length: int
    bits: int

    def transposed(self) -> "WeightCodes":
        """Return the codes of the transposed matrix."""
        codes, scale, zero_point = (
            t.t().contiguous() if t.dim() == 2 else t
            for t in (self.codes, self.scale, self.zero_point)
        )
        return replace(self, codes=codes, scale=scale, zero_point=zero_point, axis=1 - self.axis)


def why_not_stored(scheme: TensorScheme) -> str | None:
    """Return why ONNX cannot hold codes of a scheme, None if it can."""
    fmt = formats.get(scheme.format)
    if fmt.block is not None or fmt.forward is not None:
        return f"ONNX has no {scheme.format}: its values are stored as floats"
    if scheme.format in HALVES:
        return None
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
    found = WeightCodes(codes, scale, zero, axis, group, shape[axis], _width(fmt.bits))
    return _filled(found) if group else found


def _filled(found: WeightCodes) -> WeightCodes:
    """Let groups fill their axis: runtimes read no others."""
    axis, length, group = found.axis, found.length, min(found.group, found.length)
    if group == length and found.codes.dim() == 2:  # a scale for each row or column
        scale, zero = found.scale.reshape(-1), found.zero_point.reshape(-1)
        return replace(
            found,
            scale=scale,
            zero_point=zero,
            axis=1 - axis,
            group=0,
            length=found.codes.shape[1 - axis],
        )
    shared = math.gcd(group, length)
    if shared == group:
        return replace(found, group=group)
    if shared >= _LEAST_GROUP:
        scale, zero = (
            t.repeat_interleave(group // shared, axis).narrow(axis, 0, length // shared)
            for t in (found.scale, found.zero_point)
        )
        return replace(found, scale=scale, zero_point=zero, group=shared)
    return replace(found, codes=_padded(found.codes, axis, -length % group), group=group)


def _padded(codes: Tensor, axis: int, count: int) -> Tensor:
    shape = list(codes.shape)
    shape[axis] = count
    return torch.cat((codes, codes.new_zeros(shape)), axis)


def _width(bits: int) -> int:
    return 4 if bits <= 4 else 8 if bits <= 8 else 16


def dequantized(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    block: int,
    length: int,
    stored: str,
) -> Tensor:
    """Return the floats of codes by DequantizeLinear; what lies beyond `length` is padding."""
    values: Tensor = DEQUANTIZE(codes, scale, zero_point, axis, block, stored)
    return values if codes.shape[axis] == length else values.narrow(axis, 0, length)


def guarded(values: Tensor) -> Tensor:
    """Return the same values by an op that no runtime looks through."""
    most = torch.finfo(values.dtype).max
    return values.clamp(-most, most)


def packed_rows(codes: Tensor) -> Tensor:
    """Pack pairs of neighbours of the last axis, an even number, into uint8: `low + 16 · high`."""
    unsigned = (codes.to(torch.int16) + 8).to(torch.uint8)
    return unsigned[..., ::2] | (unsigned[..., 1::2] << 4)


def why_not_looked_up(codes: WeightCodes) -> str | None:
    """Return why rows of an embedding table cannot become floats one by one, None if they can."""
    if codes.group and codes.axis == 0:
        return "its groups lie across the rows of the table"
    if codes.codes.dtype in FLOAT8.values():
        return "runtimes look no rows of FP8 up: its values are stored as floats"
    return None


def looked_up(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: int,
    width: int,
    packed: bool,
) -> Tensor:
    """Look up rows of an embedding table: only the rows that are asked for become floats.

    Codes of 4 bits may come `packed` (uint8), others as they are. Scale and zero point are
    `[rows, n]` where rows have their own (n = 1, or one for each group), else whatever every row
    shares. What lies beyond `width` is padding.
    """
    rows = _rows(codes, indices)
    if packed:
        # by floats: OpenVINO's shifts of 8 bits round to nearest
        pairs = rows.to(scale.dtype)
        high = torch.floor(pairs / 16)
        values = torch.stack((pairs - 16 * high, high), -1).flatten(-2) - 8
    else:
        values = rows.to(scale.dtype)
    if scale.dim() == 2:
        scale, zero_point = _rows(scale, indices), _rows(zero_point, indices)
    if group:
        values = values.unflatten(-1, (-1, group))
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    found = (values - zero_point.to(scale.dtype)) * scale
    found = found.flatten(-2) if group else found
    return found if found.shape[-1] == width else found.narrow(-1, 0, width)


def _rows(table: Tensor, indices: Tensor) -> Tensor:
    return table.index_select(0, indices.reshape(-1)).reshape(*indices.shape, table.shape[1])
