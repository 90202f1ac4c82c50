"""Sums of products of integers, in accumulators of a given width."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tuner.exporters.integer_values import Array, saturated, wrapped

Overflow = Literal["saturate", "wrap"]
_EXACT_FLOATS = 1 << 53
_WORD = 32


@dataclass(eq=False)
class Accumulators:
    """What holds sums of products: `bits` wide; what does not fit saturates or wraps around.

    Saturation is that of a unit that adds one product after the other, in the order of memory.
    With `pairs`, as in the x86 instruction vpmaddubsw, only sums of two neighbouring products of
    raw codes are that narrow, and are then added in 32 bits. `overflowed` counts, by node, the sums
    (or the pairs) that did not fit.
    """

    bits: int = 64
    overflow: Overflow = "saturate"
    pairs: bool = False
    overflowed: dict[str, int] = field(default_factory=dict)

    def sums(self, name: str, codes: Array, zero_point: Array, levels: Array) -> Array:
        """Return (codes − zero_point) @ levels, `[…, m, k] @ […, k, n]`, as int64."""
        if self.pairs:
            return self._sums_of_pairs(name, codes, zero_point, levels)
        left = codes.astype(np.int64) - zero_point
        return self._held(name, left, levels)

    def added(self, name: str, sums: Array, bias: Array | None) -> Array:
        """Return sums + bias, held in the width."""
        if bias is None:
            return sums
        return self._fit(name, sums + bias, _WORD if self.pairs else self.bits)

    def _held(self, name: str, left: Array, right: Array) -> Array:
        exact = product(left, right)
        if self.bits >= 64 or self.overflow == "wrap":
            return self._fit(name, exact, self.bits)
        reach = product(np.abs(left), np.abs(right))
        doubtful = (reach >> (self.bits - 1)) > 0
        if not doubtful.any():
            return exact
        held = _one_by_one(left, right, self.bits)
        self._count(name, held != exact)
        return held

    def _sums_of_pairs(self, name: str, codes: Array, zero_point: Array, levels: Array) -> Array:
        odd = codes.shape[-1] % 2
        left = np.pad(codes.astype(np.int64), [(0, 0)] * (codes.ndim - 1) + [(0, odd)])
        right = np.pad(levels, [(0, 0)] * (levels.ndim - 2) + [(0, odd), (0, 0)])
        total = np.zeros((), dtype=np.int64)
        for k in range(0, left.shape[-1], 2):
            pair = left[..., k : k + 2] @ right[..., k : k + 2, :]
            total = total + self._fit(name, pair, self.bits)
        offset = zero_point * levels.sum(axis=-2, keepdims=True)
        return np.asarray(total - offset)

    def _fit(self, name: str, sums: Array, bits: int) -> Array:
        if bits >= 64:
            return sums
        held = saturated(sums, bits) if self.overflow == "saturate" else wrapped(sums, bits)
        self._count(name, held != sums)
        return held

    def _count(self, name: str, differs: Array) -> None:
        count = int(differs.sum())
        if count:
            self.overflowed[name] = self.overflowed.get(name, 0) + count


def product(left: Array, right: Array) -> Array:
    """Return left @ right exactly: by fp64 where every partial sum is an integer there."""
    largest = float(np.abs(left).max(initial=0)) * float(np.abs(right).max(initial=0))
    if largest * left.shape[-1] < _EXACT_FLOATS:
        return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.int64)
    return np.asarray(left.astype(np.int64) @ right.astype(np.int64))


def _one_by_one(left: Array, right: Array, bits: int) -> Array:
    total = np.zeros((), dtype=np.int64)
    for k in range(left.shape[-1]):
        total = saturated(total + left[..., k : k + 1] * right[..., k : k + 1, :], bits)
    return np.asarray(total)
