"""Number formats as other libraries, or exact arithmetic on enumerated codes, know them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tuner.kernels.grid
import tuner.kernels.native

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

FP32_LARGEST = float(np.finfo(np.float32).max)
PATHS = ("native", "torch")


def take_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything that follows go through the native kernels, or through torch."""
    for module in (tuner.kernels.grid, tuner.kernels.native):
        chosen = (lambda x: False) if path == "torch" else module.takes
        monkeypatch.setattr(module, "takes", chosen)


@dataclass(frozen=True)
class MlFormat:
    """A format of ml_dtypes; `has_nan` and `has_negative_zero` as its documentation says."""

    dtype: type
    largest: float
    bits: int
    has_nan: bool = True
    has_negative_zero: bool = True

    def round(self, x: Floats) -> Floats:
        """Saturate and round to nearest even; NaN stays."""
        clamped = np.clip(x, -self.largest, self.largest)
        with np.errstate(invalid="ignore"):
            rounded = clamped.astype(self.dtype).astype(np.float32)
        return np.where(np.isnan(x), x, rounded)

    def codes(self, x: Floats) -> NDArray[np.integer]:
        """Return the bits of saturated and rounded values."""
        clamped = np.clip(x, -self.largest, self.largest).astype(self.dtype)
        return clamped.view(np.uint8 if self.bits <= 8 else np.uint16).astype(np.int64)

    def values(self) -> Floats:
        """Return the value of every code."""
        codes = np.arange(2**self.bits, dtype=np.uint8 if self.bits <= 8 else np.uint16)
        with np.errstate(invalid="ignore"):
            return codes.view(self.dtype).astype(np.float32)


ML_FORMATS = {
    "e4m3fn": MlFormat(ml_dtypes.float8_e4m3fn, 448.0, 8),
    "e4m3": MlFormat(ml_dtypes.float8_e4m3, 240.0, 8),
    "e4m3fnuz": MlFormat(ml_dtypes.float8_e4m3fnuz, 240.0, 8, has_negative_zero=False),
    "e4m3b11fnuz": MlFormat(ml_dtypes.float8_e4m3b11fnuz, 30.0, 8, has_negative_zero=False),
    "e5m2": MlFormat(ml_dtypes.float8_e5m2, 57344.0, 8),
    "e5m2fnuz": MlFormat(ml_dtypes.float8_e5m2fnuz, 57344.0, 8, has_negative_zero=False),
    "e3m4": MlFormat(ml_dtypes.float8_e3m4, 15.5, 8),
    "e2m3": MlFormat(ml_dtypes.float6_e2m3fn, 7.5, 6, has_nan=False),
    "e3m2": MlFormat(ml_dtypes.float6_e3m2fn, 28.0, 6, has_nan=False),
    "e2m1": MlFormat(ml_dtypes.float4_e2m1fn, 6.0, 4, has_nan=False),
    "fp16": MlFormat(np.float16, 65504.0, 16),
    "bf16": MlFormat(ml_dtypes.bfloat16, float.fromhex("0x1.fep127"), 16),
}
TORCH_FORMATS = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Enumerated:
    """A small float by the list of its numbers: code `c` is the `c`-th number from 0 on.

    Rounding looks the neighbours up; a tie goes to the even code, below the smallest normal number
    of a format without subnormals to 0.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str
    subnormals: bool = True
    saturating: bool = True

    @property
    def top(self) -> int:
        """The number of codes without the sign."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def finite_codes(self) -> int:
        """The number of codes without the sign that are numbers."""
        special = {"ieee": 1 << self.mantissa_bits, "fn": 1, "fnuz": 0, "finite": 0}
        return self.top - special[self.specials]

    def numbers(self, count: int) -> Doubles:
        """Return the numbers of the first `count` codes, special ones read as numbers too."""
        codes = np.arange(count)
        field, mantissa = codes >> self.mantissa_bits, codes % (1 << self.mantissa_bits)
        significand = np.where(field > 0, mantissa + (1 << self.mantissa_bits), mantissa)
        exponent = np.maximum(field, 1) - self.bias - self.mantissa_bits
        numbers = np.ldexp(significand.astype(np.float64), exponent)
        return numbers if self.subnormals else np.where(field > 0, numbers, 0.0)

    @property
    def values(self) -> Doubles:
        """Return the numbers up to the largest that fp32 holds, code by code."""
        numbers = _numbers(self)[: self.finite_codes]
        return numbers[numbers <= FP32_LARGEST]

    @property
    def overflow(self) -> float:
        """What a positive number becomes that is too large."""
        if self.saturating or self.specials == "finite":
            return float(self.values[-1])
        return np.inf if self.specials == "ieee" else np.nan

    def round(self, x: Floats) -> Doubles:
        """Return the nearest numbers in float64."""
        numbers = _numbers(self)[: len(self.values) + 1]  # and the one that is too large
        magnitude = np.minimum(np.abs(x.astype(np.float64)), numbers[-1])
        first = 0 if self.subnormals else (1 << self.mantissa_bits) - 1  # the code of 0
        above = first + np.searchsorted(numbers[first:], magnitude)
        above = above.clip(first + 1, len(numbers) - 1)
        down, up = magnitude - numbers[above - 1], numbers[above] - magnitude
        even = above % 2 == 0
        if not self.subnormals:
            even &= above > first + 1
        code = np.where((up < down) | ((up == down) & even), above, above - 1)
        rounded = np.where(code >= len(self.values), self.overflow, numbers[code])
        rounded = np.copysign(np.where(np.isnan(x), np.nan, rounded), x)
        return rounded + 0.0 if self.specials == "fnuz" else rounded


@lru_cache(maxsize=4)
def _numbers(fmt: Enumerated) -> Doubles:
    return fmt.numbers(fmt.top + 1)


def float32_neighbours(x: Doubles) -> Floats:
    """Return numbers as fp32, both neighbours of each, and all of them with the other sign."""
    inside = x[np.abs(x) <= FP32_LARGEST].astype(np.float32)
    up = np.nextafter(inside, np.float32(np.inf))
    down = np.nextafter(inside, np.float32(-np.inf))
    near = np.concatenate([inside, up, down])
    return np.concatenate([near, -near])


@lru_cache(maxsize=1)
def everywhere() -> Floats:
    """Return every power of two with its neighbours, ±0, ±inf, NaN, and the ends of fp32."""
    powers = np.ldexp(1.0, np.arange(-149, 128))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, FP32_LARGEST, -FP32_LARGEST])
    return np.concatenate([float32_neighbours(powers), special.astype(np.float32)])


def adversarial(numbers: Doubles) -> Floats:
    """Return numbers, their midpoints and their neighbours, and what `everywhere` has."""
    between = (numbers[1:] + numbers[:-1]) / 2
    return np.concatenate([float32_neighbours(numbers), float32_neighbours(between), everywhere()])


def random_bits(count: int, seed: int = 0) -> Floats:
    """Return fp32 numbers of uniformly random bits, NaNs and infinities among them."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def random_near(numbers: Doubles, count: int, seed: int = 0) -> Floats:
    """Return fp32 numbers spread evenly over the exponents between the smallest and the largest."""
    rng = np.random.default_rng(seed)
    positive = numbers[numbers > 0]
    low, high = np.log2(positive.min()) - 2, min(np.log2(positive.max()) + 2, 127.9)
    magnitudes = np.exp2(rng.uniform(low, high, count))
    return (magnitudes * rng.choice([-1.0, 1.0], count)).astype(np.float32)


def assert_same_bits(ours: torch.Tensor | NDArray, theirs: NDArray, x: NDArray) -> None:
    """Compare bit for bit, the sign of 0 included; any NaN equals any other."""
    ours = ours.numpy() if isinstance(ours, torch.Tensor) else ours
    assert ours.dtype == theirs.dtype, f"{ours.dtype} against {theirs.dtype}"
    integers = {2: np.uint16, 4: np.uint32, 8: np.uint64}[ours.itemsize]
    same = (ours.view(integers) == theirs.view(integers)) | (np.isnan(ours) & np.isnan(theirs))
    if not same.all():
        rows = [
            f"{a!r} ({float(a).hex()}) -> {b!r}, not {c!r}"
            for a, b, c in _some(x, ours, theirs, ~same)
        ]
        raise AssertionError(f"{(~same).sum()} of {same.size} differ:\n" + "\n".join(rows))


def _some(
    x: NDArray, ours: NDArray, theirs: NDArray, where: NDArray[np.bool_]
) -> Iterator[tuple[np.floating, np.floating, np.floating]]:
    where = where.reshape(-1)
    columns = (part.reshape(-1)[where][:12] for part in (x, ours, theirs))
    return zip(*columns, strict=True)
