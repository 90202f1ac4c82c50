"""Integers with their scale, and the grid that they are on: what integer arithmetic works with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_HALF = 1 << 30


@dataclass(frozen=True, eq=False)
class Integers:
    """A quantized tensor: `value = (codes − zero_point) · scale`.

    `scale` and `zero_point` broadcast to the codes. Sums of products have no zero point.
    """

    codes: Array
    scale: Array
    zero_point: Array

    @property
    def levels(self) -> Array:
        """The codes without their zero point."""
        return self.codes.astype(np.int64) - self.zero_point

    def floats(self) -> Array:
        """Return the values, in fp32."""
        levels = self.levels
        if np.abs(levels).max(initial=0) < 1 << 24:  # as fp32 has them; else rounded once only
            return np.asarray(levels.astype(np.float32) * self.scale.astype(np.float32))
        return np.asarray((levels * self.scale).astype(np.float32))

    def moved(self, move: Callable[[Array], Any]) -> Any:
        """Apply what only moves values around; the result is Integers, or a list of them."""
        codes, scale, zero_point = (
            self._moved(move, part) for part in (self.codes, self.scale, self.zero_point)
        )
        if not isinstance(codes, list):
            return Integers(codes, scale, zero_point)
        parts = (p if isinstance(p, list) else [p] * len(codes) for p in (scale, zero_point))
        return [Integers(*each) for each in zip(codes, *parts, strict=True)]

    def _moved(self, move: Callable[[Array], Any], part: Array) -> Any:
        return move(np.broadcast_to(part, self.codes.shape)) if part.ndim else part


def broadcast_scale(
    part: Array, shape: tuple[int, ...], axis: int | None, group: int | None
) -> Array:
    """Return scales in a shape that broadcasts to codes of this shape.

    `axis` is the axis that they are for, None for one scale; each serves a run of `group` there.
    """
    if axis is None or not part.ndim:
        return part.reshape(())
    if group is None:
        return part.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return part.repeat(group, axis=axis).take(range(shape[axis]), axis=axis)


@dataclass(frozen=True, eq=False)
class Grid:
    """Where codes may lie: `low` … `high`, numbers or arrays that broadcast to the codes.

    A dynamic grid has no scale: it comes from each tensor, or from each vector on its last axis.
    """

    low: Any
    high: Any
    scale: Array | None
    zero_point: Array
    symmetric: bool = True
    per_token: bool = False
    power_of_two: bool = False

    def quantize(self, x: Array) -> Integers:
        """Return `clamp(rne(x / scale) + zero_point, low, high)`; NaN becomes the zero point."""
        scale, zero_point = self.parameters(x)
        steps = np.rint(x / scale.astype(np.float32))
        limit = float(1 << 40)
        steps = np.clip(np.nan_to_num(steps, nan=0.0, posinf=limit, neginf=-limit), -limit, limit)
        codes = np.clip(steps.astype(np.int64) + zero_point, self.low, self.high)
        return Integers(codes.astype(np.int32), scale, zero_point)

    def parameters(self, x: Array) -> tuple[Array, Array]:
        """Return scale and zero point for a tensor: the range of its values, extended to hold 0."""
        if self.scale is not None:
            return self.scale, self.zero_point
        axis = -1 if self.per_token else None
        least = np.minimum(x.min(axis=axis, keepdims=self.per_token), 0).astype(np.float64)
        most = np.maximum(x.max(axis=axis, keepdims=self.per_token), 0).astype(np.float64)
        if self.symmetric:
            sides = self.high - self.zero_point, self.zero_point - self.low
            span, levels = np.maximum(-least, most), min(sides) or max(sides)
        else:
            span, levels = most - least, self.high - self.low
        scale = span / levels
        if self.power_of_two:
            mantissa, exponent = np.frexp(scale)
            scale = np.ldexp(np.where(mantissa == 0.5, 0.5, 1.0), exponent)
        scale = np.where(span == 0, 1.0, scale)
        if self.symmetric:
            return scale.astype(np.float32), self.zero_point
        steps = np.rint(least / scale if self.power_of_two else least * levels / _or_one(span))
        zero_point = np.clip(self.low - steps, self.low, self.high).astype(np.int64)
        return scale.astype(np.float32), zero_point


def _or_one(span: Array) -> Array:
    return np.where(span == 0, 1.0, span)


def fixed_point(factor: Array) -> tuple[Array, Array]:
    """Return multiplier (int32, Q31) and right shift: `factor ≈ multiplier · 2^(−31 − shift)`.

    A multiplier is in 2^30 … 2^31 − 1, or 0; a negative shift goes left (Jacob et al., CVPR 2018,
    section 2.2).
    """
    mantissa, exponent = np.frexp(np.asarray(factor, dtype=np.float64))
    multiplier = np.rint(mantissa * 2.0**31).astype(np.int64)
    full = multiplier == 1 << 31
    multiplier, exponent = np.where(full, _HALF, multiplier), np.where(full, exponent + 1, exponent)
    shift = -exponent.astype(np.int64)
    tiny = shift > 31  # what an int32 times this rounds to is 0
    return (
        np.where(tiny, 0, multiplier).astype(np.int32),
        np.where(tiny, 31, shift).astype(np.int32),
    )


def rescaled(sums: Array, multiplier: Array, shift: Array, twice: bool = False) -> Array:
    """Return sums · multiplier · 2^(−31 − shift), to nearest with ties up.

    What leaves int32 before the product is saturated. With `twice` it is rounded as gemmlowp does
    (Jacob et al., CVPR 2018, section 2.2): first the high half of the doubled product, to nearest
    with ties up; then the right shift, to nearest with ties away from zero. One in 2^(1 + shift)
    results is then one too far from zero.
    """
    wide = sums.astype(np.int64) << np.clip(-shift.astype(np.int64), 0, 31)
    products = saturated(wide, 32) * multiplier.astype(np.int64)
    right = np.maximum(shift.astype(np.int64), 0)
    if not twice:
        return np.asarray((products + (_HALF << right)) >> (31 + right))
    high = (products + _HALF) >> 31
    half = (np.int64(1) << right) >> 1
    return np.asarray(np.sign(high) * ((np.abs(high) + half) >> right))


def saturated(sums: Array, bits: int) -> Array:
    """Return sums held in the range of signed integers of this width."""
    return np.clip(sums, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def wrapped(sums: Array, bits: int) -> Array:
    """Return sums modulo 2^bits, as signed integers."""
    if bits >= 64:
        return sums
    half = np.int64(1 << (bits - 1))
    return np.asarray(((sums + half) & np.int64((1 << bits) - 1)) - half)
