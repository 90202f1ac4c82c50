"""How values in units of the scale become values of a format, and codes: one class a kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.float_layout import FP32_LARGEST, FloatLayout
from tuner.formats import Format
from tuner.kernels.buffers import POOL

Bound = float | Tensor
_EXPONENT_MASK = 0x7F800000
_SIGN_MASK = -(2**31)
_FP32_MANTISSA = 23
_FP32_BIAS = 127


class Codec(Protocol):
    """Rounds to the values of a format, and stores them as codes; a frozen dataclass."""

    def __hash__(self) -> int: ...

    def round_(self, steps: Tensor, low: Bound, high: Bound) -> Tensor:
        """Round in place (where it can) to the nearest value from `low` to `high`; NaN stays."""

    def encode(self, values: Tensor) -> Tensor:
        """Return the codes (int64) of values that the format holds."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes, in float64."""


def clamp_steps(steps: Tensor, low: Bound, high: Bound) -> Tensor:
    """Clamp in place (where torch can) and return the result; NaN stays."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # broadcasting, two binary operations are several times faster than one of three operands
        out = None if _cannot_write_out() else steps
        steps = torch.maximum(steps, torch.as_tensor(low), out=out)
        return torch.minimum(steps, torch.as_tensor(high), out=out)
    return steps.clamp_(low, high)


def _cannot_write_out() -> bool:
    """Whether a transform such as vmap is on, compiled or not: it cannot follow out=."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _signed(values: Tensor, like: Tensor) -> Tensor:
    """Give values the signs of `like` in place; they have these already, or none. Spoils `like`.

    On the bits of fp32 this takes half the time of copysign. With out=, vmap could not follow.
    """
    if values.dtype != torch.float32:
        return values.copysign_(like)
    signs = like.view(torch.int32).bitwise_and_(_SIGN_MASK)
    values.view(torch.int32).bitwise_or_(signs)
    return values


@dataclass(frozen=True)
class IntegerCodec:
    """Whole numbers: `rne(v)`, clamped."""

    def round_(self, steps: Tensor, low: Bound, high: Bound) -> Tensor:
        """Round in place to whole numbers."""
        return clamp_steps(steps.round_(), low, high)

    def encode(self, values: Tensor) -> Tensor:
        """Return the whole numbers themselves; NaN has none."""
        if bool(values.isnan().any()):
            raise DataError("NaN has no integer code: replace the NaN values before quantize()")
        return values.to(torch.int64)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the whole numbers as floats."""
        return codes.double()


@dataclass(frozen=True)
class FloatCodec:
    """The numbers of a FloatLayout, to nearest, ties to even.

    A value with exponent e is a multiple of 2^(e − M): adding and subtracting 1.5 · 2^(23 − M + e)
    rounds it in fp32 (Knuth, TAOCP vol. 2, section 4.2.2). Where that constant leaves fp32, and
    without a mantissa, the bits are rounded as integers instead.
    """

    layout: FloatLayout

    @property
    def by_bits(self) -> bool:
        """Whether the bits must be rounded as integers."""
        top = math.frexp(self.layout.largest)[1]
        return self.layout.mantissa_bits == 0 or top + _FP32_MANTISSA - self._mantissa + 1 > 127

    @property
    def magic(self) -> float:
        """What the power of two of a value is multiplied with to get the rounding constant."""
        return float(1.5 * 2.0 ** (_FP32_MANTISSA - self._mantissa))

    @property
    def limit(self) -> float:
        """Where magnitudes are cut before they are rounded: rounded up, more would overflow."""
        if self.layout.saturating:
            return self.layout.largest
        return min(2.0 ** math.frexp(self.layout.largest)[1], FP32_LARGEST)

    @property
    def parity(self) -> int:
        """Without a mantissa the exponent field decides ties: whether its parity is not fp32's."""
        return (_FP32_BIAS - self.layout.bias) % 2 if self._mantissa == 0 else 0

    def _can_cast(self, steps: Tensor) -> bool:
        """Whether torch's cast to bfloat16 does the same; a compiler would drop the two casts."""
        if torch.compiler.is_compiling() or steps.dtype != torch.float32:
            return False
        return self.layout == FloatLayout(8, 7, 127)

    @property
    def _mantissa(self) -> int:
        return self.layout.mantissa_bits

    def round_(self, steps: Tensor, low: Bound, high: Bound) -> Tensor:
        """Round to numbers of the layout; the bounds are the layout's own."""
        if self._mantissa >= _FP32_MANTISSA:
            clamped = steps.clamp_(-self.layout.largest, self.layout.largest)
            return clamped.float().to(steps.dtype)
        if self._can_cast(steps):
            largest = self.layout.largest
            return steps.copy_(steps.clamp_(-largest, largest).to(torch.bfloat16))
        steps.clamp_(-self.limit, self.limit)
        if steps.dtype == torch.float64:
            rounded = self._rounded_double(steps.abs())
        else:
            rounded = self._by_bits(steps.abs()) if self.by_bits else self._by_sum(steps)
        if not self.layout.saturating:
            rounded.masked_fill_(rounded.abs() > self.layout.largest, self.layout.overflow)
        if not self.layout.subnormals:
            rounded = self._flushed(steps.abs(), rounded.abs())
        rounded = _signed(rounded, steps)
        return rounded if self.layout.has_negative_zero else rounded.add_(0.0)  # −0 + 0 = 0

    def _by_sum(self, steps: Tensor) -> Tensor:
        bits, total = None, None
        if not _cannot_write_out():
            bits, total = POOL.empty_like(steps).view(torch.int32), POOL.empty_like(steps)
        bits = torch.bitwise_and(steps.view(torch.int32), _EXPONENT_MASK, out=bits)
        power = bits.view(torch.float32).clamp_(min=self.layout.smallest_normal)
        total = torch.add(steps, power, alpha=self.magic, out=total)
        return total.sub_(power, alpha=self.magic)

    def _by_bits(self, magnitude: Tensor) -> Tensor:
        shift = _FP32_MANTISSA - self._mantissa
        bits = magnitude.view(torch.int32)
        odd = bits.bitwise_right_shift(shift).bitwise_xor_(self.parity).bitwise_and_(1)
        bits = odd.add_(bits).add_((1 << (shift - 1)) - 1).bitwise_and_(-1 << shift)
        power = self.layout.smallest_normal * self.magic
        small = magnitude.add(power).sub_(power)
        rounded = torch.where(
            magnitude < 2 * self.layout.smallest_normal, small, bits.view(torch.float32)
        )
        return torch.where(magnitude.isnan(), magnitude, rounded)

    def _rounded_double(self, magnitude: Tensor) -> Tensor:
        exponent = torch.frexp(magnitude).exponent - 1
        exponent = exponent.clamp_(min=self.layout.emin)
        unit = torch.ldexp(torch.ones_like(magnitude), exponent - self._mantissa)
        steps = magnitude / unit
        rounded = steps.round()
        if self._mantissa == 0:  # 1.5 lies between fields f and f + 1: the even one wins
            odd = ((exponent + self.layout.bias) % 2 == 1) & (magnitude >= unit)
            rounded = torch.where(steps == 1.5, torch.where(odd, 2.0, 1.0).double(), rounded)
        return rounded * unit

    def _flushed(self, magnitude: Tensor, rounded: Tensor) -> Tensor:
        """Round what lies below the smallest normal number to it or to 0; a tie goes to 0."""
        normal = self.layout.smallest_normal
        kept = torch.where(magnitude > normal / 2, normal, 0.0).to(rounded.dtype)
        return torch.where(magnitude < normal, kept, rounded)

    def encode(self, values: Tensor) -> Tensor:
        """Return codes with the sign on top, as the format's definition orders the bits."""
        layout = self.layout
        x = values.double()
        mantissa, exponent = torch.frexp(x.abs())
        field = (exponent - 1 + layout.bias).clamp(min=0)
        normal = x.abs() >= layout.smallest_normal
        fraction = torch.where(normal, mantissa * 2 - 1, x.abs() / layout.smallest_normal)
        fraction = torch.where(x.isfinite(), fraction, 0.0)
        codes = (fraction * 2**layout.mantissa_bits).long()
        codes += torch.where(normal, field, 0).long() << layout.mantissa_bits
        codes = torch.where(x.isinf(), layout.infinity_code, codes)
        codes += torch.signbit(x).long() << (layout.exponent_bits + layout.mantissa_bits)
        if bool(x.isnan().any()):
            if layout.nan_code is None:
                raise DataError("this format has no NaN: replace the NaN values before quantize()")
            codes = torch.where(x.isnan(), layout.nan_code, codes)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers of codes, inf and NaN included."""
        layout = self.layout
        codes = codes.long()
        width = layout.exponent_bits + layout.mantissa_bits
        magnitude = codes & ((1 << width) - 1)
        field = magnitude >> layout.mantissa_bits
        fraction = (magnitude & ((1 << layout.mantissa_bits) - 1)).double()
        fraction /= 2**layout.mantissa_bits
        exponent = torch.where(field > 0, field - layout.bias, layout.emin)
        small = fraction if layout.subnormals else torch.zeros_like(fraction)
        x = torch.ldexp(torch.where(field > 0, 1 + fraction, small), exponent)
        x = torch.where(magnitude > layout.largest_code, math.nan, x)
        if layout.specials == "ieee":
            x = torch.where(magnitude == layout.infinity_code, math.inf, x)
        x = torch.copysign(x, torch.where(codes >> width & 1 == 1, -1.0, 1.0).double())
        if layout.has_negative_zero:
            return x
        return torch.where(codes == 1 << width, math.nan, x + 0.0)  # −0 + 0 = 0


@dataclass(frozen=True)
class CodebookCodec:
    """The entries of a sorted table, to nearest; a tie goes to the lower one."""

    entries: tuple[float, ...]

    def round_(self, steps: Tensor, low: Bound, high: Bound) -> Tensor:
        """Return the nearest entries."""
        nearest = self._table(steps)[self._index(steps)]
        return torch.where(steps.isnan(), steps, nearest)

    def encode(self, values: Tensor) -> Tensor:
        """Return the index of the nearest entry."""
        if bool(values.isnan().any()):
            raise DataError("NaN is no codebook entry: replace the NaN values before quantize()")
        return self._index(values)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the entries."""
        table = torch.tensor(self.entries, dtype=torch.float64, device=codes.device)
        return table[codes.long()]

    def ends(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Return the largest number of a dtype that each entry but the last is nearest to."""
        entries = torch.tensor(self.entries, dtype=torch.float64, device=device)
        between = (entries[1:] + entries[:-1]) / 2  # exact: entries are fp32 numbers
        ends = between.to(dtype)
        below = ends.nextafter(torch.full_like(ends, -math.inf))
        return torch.where(ends > between, below, ends)

    def _index(self, x: Tensor) -> Tensor:
        return torch.bucketize(x.contiguous(), self.ends(x.dtype, x.device))

    def _table(self, like: Tensor) -> Tensor:
        return torch.tensor(self.entries, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class FunctionCodec:
    """Whatever a user's function returns; NaN and the bounds are its own affair."""

    name: str
    forward: Callable[[Any], Any]

    def round_(self, steps: Tensor, low: Bound, high: Bound) -> Tensor:
        """Call the function, and check what it returns."""
        result = self.forward(steps)
        if not isinstance(result, Tensor) or result.shape != steps.shape:
            shown = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise DataError(
                f"the forward function of format {self.name!r} returned {shown} for a tensor of "
                f"shape {list(steps.shape)}: it must return a tensor of the same shape"
            )
        return result.to(steps.dtype)

    def encode(self, values: Tensor) -> Tensor:
        """Raise DataError: a function has no codes."""
        raise DataError(
            f"format {self.name!r} is a function: it has no codes. Use fake_quantize(), or "
            "register it as a codebook"
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Raise DataError: a function has no codes."""
        return self.encode(codes)


_KNOWN: dict[str, Codec] = {}


def codec_of(fmt: Format) -> Codec:
    """Return the codec of a format's values."""
    codec = _KNOWN.get(fmt.name)
    if codec is None:
        codec = _KNOWN[fmt.name] = _codec(fmt)
    return codec


def _codec(fmt: Format) -> Codec:
    if fmt.kind == "int":
        return IntegerCodec()
    if fmt.layout is not None:
        return FloatCodec(fmt.layout)
    if fmt.forward is not None:
        return FunctionCodec(fmt.name, fmt.forward)
    return CodebookCodec(fmt.codebook)
