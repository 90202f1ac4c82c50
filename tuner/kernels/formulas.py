"""Fake-quantization as plain arithmetic, which a compiler fuses into one pass over memory.

The functions do what snap.c and codecs.py do, bit for bit, in whatever way they are compiled: every
product that is summed (`power · magic`) is exact, so it may be contracted to an fma; signs travel
as bits, so `-fno-signed-zeros` changes nothing; a comparison with NaN fails, so NaN stays. Only the
division must be rounded as IEEE 754 says. Parameters are tensors that broadcast against `x`, so one
graph serves all numbers. Results go to `out`; nothing is returned but an empty tuple.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.kernels.codecs import Codec, FloatCodec, IntegerCodec
from tuner.kernels.native import MxScale

Formula = Callable[..., tuple[()]]
_EXPONENT = 0x7F800000
_MANTISSA = 0x7FFFFF
_MAGNITUDE = 0x7FFFFFFF
_SIGN = -0x80000000
_SMALLEST_SCALE = 0x400000  # the bits of 2^-127, which the subnormal numbers hold
_MOST_MANTISSA_BITS = 22  # more is fp32 itself
_MXINT8_UNIT = 2.0**-6


def snap_integer(x: Tensor, out: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[()]:
    """Store `clamp(rne(x / scale), low, high) · scale`."""
    steps = (x.float() / scale).round()
    steps = torch.where(low > steps, low, steps)
    steps = torch.where(high < steps, high, steps)
    return _store(steps * scale, out)


def snap_plain_float(x: Tensor, out: Tensor, scale: Tensor, constants: Tensor) -> tuple[()]:
    """Round to a float that saturates and has subnormals and −0, by a sum; see FloatCodec."""
    steps = x.float() / scale
    return _store(_by_sum(steps, *constants.unbind()[:3]) * scale, out)


def snap_plain_float_by_inverse(
    x: Tensor, out: Tensor, scale: Tensor, inverse: Tensor, constants: Tensor
) -> tuple[()]:
    """Do the same to `x · inverse`."""
    steps = x.float() * inverse
    return _store(_by_sum(steps, *constants.unbind()[:3]) * scale, out)


def snap_float(
    x: Tensor, out: Tensor, scale: Tensor, constants: Tensor, masks: Tensor
) -> tuple[()]:
    """Round to any float of FloatCodec that is not rounded by its bits."""
    steps = x.float() / scale
    limit, normal, magic, *_ = constants.unbind()
    magnitude = _clamped_magnitude(steps, limit)
    rounded = _sum_rounded(magnitude, normal, magic)
    return _store(_finished(steps, magnitude, rounded, constants, masks) * scale, out)


def snap_float_by_bits(
    x: Tensor, out: Tensor, scale: Tensor, constants: Tensor, masks: Tensor
) -> tuple[()]:
    """Round to a float whose sums would leave fp32, or that has no mantissa."""
    steps = x.float() / scale
    limit, *_, small_limit, small_sum = constants.unbind()
    _, shift, parity, half, kept = masks.unbind()
    magnitude = _clamped_magnitude(steps, limit)
    bits = torch.where(magnitude <= limit, magnitude, limit).view(torch.int32)  # without NaN
    odd = ((bits >> shift) ^ parity) & 1
    rounded = ((bits + odd + half) & kept).view(torch.float32)
    small = (magnitude + small_sum) - small_sum
    rounded = torch.where(magnitude < small_limit, small, rounded)
    rounded = torch.where(magnitude == magnitude, rounded, magnitude)
    return _store(_finished(steps, magnitude, rounded, constants, masks) * scale, out)


def pass_inside(x: Tensor, out: Tensor, low: Tensor, high: Tensor, gradient: Tensor) -> tuple[()]:
    """Store the gradient where `low <= x <= high`, and 0 elsewhere."""
    value = x.float()
    out.copy_(torch.where((value >= low) & (value <= high), gradient, 0.0))
    return ()


def snap_mx_blocks(x: Tensor, out: Tensor, constants: Tensor, masks: Tensor) -> tuple[()]:
    """Round blocks `[blocks, size]` to an MX format, each on its own power of two.

    OCP Microscaling Formats v1.0, section 6.3. The roundings of the scale differ in constants only.
    """
    return _store(_mx_levels(x.float(), constants, masks), out)


def snap_mx_rows(size: int, x: Tensor, out: Tensor, constants: Tensor, masks: Tensor) -> tuple[()]:
    """Do the same to rows `[rows, n]` whose last block is shorter than `size`."""
    rows, length = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -length % size)).view(rows, -1, size)
    return _store(_mx_levels(blocks, constants, masks).view(rows, -1)[:, :length], out)


def in_groups(
    formula: Formula, shared: int, x: Tensor, out: Tensor, group: Tensor, *inputs: Tensor
) -> tuple[()]:
    """Call a formula on rows `[rows, n]`; the first `shared` inputs are `[rows, groups]`.

    `group`, `[n]`, says which one a column belongs to.
    """
    spread = (parameter[:, group] for parameter in inputs[:shared])
    return formula(x, out, *spread, *inputs[shared:])


def _mx_levels(values: Tensor, constants: Tensor, masks: Tensor) -> Tensor:
    amax = (values.view(torch.int32) & _MAGNITUDE).amax(-1, keepdim=True)
    scale = _mx_scale(amax, constants, masks)
    limit, normal, magic, unit, _ = constants.unbind()
    steps = values * (1.0 / scale) * (1.0 / unit)  # all of them powers of two
    return _by_sum(steps, limit, normal, magic) * (scale * unit)


def _mx_scale(amax: Tensor, constants: Tensor, masks: Tensor) -> Tensor:
    """Return the scales of blocks from the bits of their largest magnitudes."""
    divisor = constants[-1]
    carry, above, emax = masks.unbind()
    finite = amax < _EXPONENT
    bits = torch.where(finite, amax, 0)
    bits = (bits.view(torch.float32) / divisor).view(torch.int32) + carry
    is_above = ((bits & _MANTISSA) != 0) & (bits > _SMALLEST_SCALE)
    exponent = (bits >> 23) - 127 + torch.where(is_above, above, 0) - emax
    exponent = exponent.clamp(-127, 127)
    scale = torch.where(exponent == -127, _SMALLEST_SCALE, (exponent + 127) << 23)
    return torch.where(finite, scale.view(torch.float32), math.nan)


def _by_sum(steps: Tensor, limit: Tensor, normal: Tensor, magic: Tensor) -> Tensor:
    rounded = _sum_rounded(_clamped_magnitude(steps, limit), normal, magic)
    sign = steps.view(torch.int32) & _SIGN
    return (rounded.view(torch.int32) | sign).view(torch.float32)


def _clamped_magnitude(steps: Tensor, limit: Tensor) -> Tensor:
    magnitude = (steps.view(torch.int32) & _MAGNITUDE).view(torch.float32)
    return torch.where(magnitude > limit, limit, magnitude)


def _sum_rounded(magnitude: Tensor, normal: Tensor, magic: Tensor) -> Tensor:
    power = (magnitude.view(torch.int32) & _EXPONENT).view(torch.float32)
    constant = torch.where(normal > power, normal, power) * magic
    return (magnitude + constant) - constant


def _finished(
    steps: Tensor, magnitude: Tensor, rounded: Tensor, constants: Tensor, masks: Tensor
) -> Tensor:
    """Let what is too large overflow, flush subnormals, and give the sign back, as formats have it.

    A format that does none of that has constants which change nothing.
    """
    _, normal, _, largest, overflow, half_normal, flushed_below, *_ = constants.unbind()
    rounded = torch.where(rounded > largest, overflow, rounded)
    kept = torch.where(magnitude > half_normal, normal, 0.0)
    bits = torch.where(magnitude < flushed_below, kept, rounded).view(torch.int32)
    sign = steps.view(torch.int32) & _SIGN
    sign = torch.where(bits == 0, sign & masks[0], sign)
    return (bits | sign).view(torch.float32)


def _store(levels: Tensor, out: Tensor) -> tuple[()]:
    """Convert to the dtype of `out`: what is too large saturates, inf (of an overflow) stays."""
    if out.dtype != torch.float32:
        largest = torch.finfo(out.dtype).max
        magnitude = (levels.view(torch.int32) & _MAGNITUDE).view(torch.float32)
        levels = torch.where(magnitude == math.inf, levels, levels.clamp(-largest, largest))
    out.copy_(levels)
    return ()


@dataclass(frozen=True)
class Rounding:
    """How a codec rounds: a formula, and the constants that it takes."""

    formula: Formula
    floats: tuple[float, ...] = ()
    integers: tuple[int, ...] = ()


def rounding_of(codec: Codec) -> Rounding | None:
    """Return how a codec rounds; None where only torch can say."""
    if isinstance(codec, IntegerCodec):
        return Rounding(snap_integer)
    if not isinstance(codec, FloatCodec) or codec.layout.mantissa_bits > _MOST_MANTISSA_BITS:
        return None
    layout, normal = codec.layout, codec.layout.smallest_normal
    plain = codec.limit, normal, codec.magic
    if layout.saturating and layout.subnormals and layout.has_negative_zero and not codec.by_bits:
        return Rounding(snap_plain_float, plain)
    flushed_below = 0.0 if layout.subnormals else normal
    floats = *plain, layout.largest, layout.overflow, normal / 2, flushed_below
    sign = _SIGN if layout.has_negative_zero else 0
    if not codec.by_bits:
        return Rounding(snap_float, floats, (sign,))
    shift = 23 - layout.mantissa_bits
    masks = sign, shift, codec.parity, (1 << (shift - 1)) - 1, -1 << shift
    return Rounding(snap_float_by_bits, (*floats, 2 * normal, normal * codec.magic), masks)


def mx_rounding(mx: MxScale, codec: Codec) -> Rounding | None:
    """Return how the blocks of an MX format round; None for elements that only torch can round.

    MXINT8 counts in 1/64: whole numbers are floats with one binade for all of them.
    """
    divisor = mx.largest if mx.rounding == "rceil" else 1.0
    masks = (
        1 << (22 - mx.mantissa) if mx.rounding == "even" else 0,
        int(mx.rounding in ("ceil", "rceil")),
        0 if mx.rounding == "rceil" else mx.emax,
    )
    if isinstance(codec, IntegerCodec):
        floats = 127.0, 128.0, 1.5 * 2.0**16, _MXINT8_UNIT, divisor
        return Rounding(snap_mx_blocks, floats, masks)
    found = rounding_of(codec)
    if found is None or found.formula is not snap_plain_float:
        return None
    return Rounding(snap_mx_blocks, (*found.floats, 1.0, divisor), masks)
