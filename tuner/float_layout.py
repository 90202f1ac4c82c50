"""The layout of a small float, ExMy: which numbers its codes stand for."""

from dataclasses import dataclass
from functools import cached_property
from math import inf, nan
from typing import Literal

from tuner.errors import TunerError

FP32_LARGEST = (2 - 2.0**-23) * 2.0**127
_FP32_SMALLEST_NORMAL = -126

Specials = Literal["ieee", "fn", "fnuz", "finite"]


@dataclass(frozen=True)
class FloatLayout:
    """One sign bit, `exponent_bits` and `mantissa_bits`, in this order from the top.

    A code with exponent field `f > 0` and mantissa `m` is `(1 + m / 2^M) · 2^(f − bias)`; with
    `f = 0` it is `m / 2^M · 2^(1 − bias)`, or 0 without `subnormals`. `specials` says what the top
    codes mean: `ieee` keeps the largest exponent for ±inf and NaN; `fn` has one NaN, all ones, and
    no inf; `fnuz` puts the only NaN on the code of −0; `finite` has neither. Where `saturating`,
    what is too large becomes the largest number, else inf, or NaN if there is no inf.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = "ieee"
    subnormals: bool = True
    saturating: bool = True

    def __post_init__(self) -> None:
        shown = f"e{self.exponent_bits}m{self.mantissa_bits} with a bias of {self.bias}"
        if not (1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= 23):
            raise TunerError(f"{shown}: choose 1 to 8 exponent bits and 0 to 10 mantissa bits")
        if not _FP32_SMALLEST_NORMAL - 1 <= self.emin <= 127:
            # below, the kernels would have to tell the binades of fp32's own subnormals apart
            raise TunerError(f"{shown} is outside the range of fp32: choose a bias of -126 to 128")
        if not self.largest > 0:
            raise TunerError(f"{shown} ({self.specials}) holds no number but 0: add bits")

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def has_negative_zero(self) -> bool:
        """Whether −0 has a code."""
        return self.specials != "fnuz"

    @cached_property
    def largest(self) -> float:
        """The largest finite number; what fp32 cannot hold is left out."""
        return min(self.number(self.largest_code), (2 - 2.0**-self.mantissa_bits) * 2.0**127)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with an exponent field above 0."""
        return 2.0**self.emin

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        quantum = 2.0 ** (self.emin - self.mantissa_bits)
        return quantum if self.subnormals else self.smallest_normal

    @property
    def overflow(self) -> float:
        """What a positive number becomes that is too large."""
        if self.saturating:
            return self.largest
        return {"ieee": inf, "finite": self.largest}.get(self.specials, nan)

    @property
    def largest_code(self) -> int:
        """The code of the largest finite number, without the sign."""
        codes = 1 << (self.exponent_bits + self.mantissa_bits)
        top = 1 << self.mantissa_bits
        return {"ieee": codes - top - 1, "fn": codes - 2}.get(self.specials, codes - 1)

    @property
    def nan_code(self) -> int | None:
        """A code that means NaN, None if there is none."""
        sign = 1 << (self.exponent_bits + self.mantissa_bits)
        if self.specials == "fnuz":
            return sign
        if self.specials == "fn":
            return sign - 1
        if self.specials == "ieee" and self.mantissa_bits:
            return self.infinity_code | 1 << (self.mantissa_bits - 1)
        return None

    @property
    def infinity_code(self) -> int:
        """The code of +inf in an IEEE layout."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    def number(self, code: int) -> float:
        """Return the number of a code without the sign; special codes are read as numbers."""
        field, mantissa = divmod(code, 1 << self.mantissa_bits)
        fraction = mantissa / (1 << self.mantissa_bits)
        if field:
            return float((1 + fraction) * 2.0 ** (field - self.bias))
        return fraction * 2.0**self.emin if self.subnormals else 0.0
