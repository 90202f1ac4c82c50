"""Axes of plots: where values sit, and where the ticks are."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

_LARGEST = sys.float_info.max
_SPELLED_OUT = 1e15
"""Ticks this far apart, or this close, are labelled with an exponent."""


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    position: float
    label: str


@dataclass(frozen=True)
class Axis:
    """Maps values in low…high (logarithms where `log`) to positions from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the position of a value, that of the nearer end where it lies beyond."""
        share = (self._scaled(value) / 2 - self.low / 2) / self.half_length
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def half_length(self) -> float:
        """Half of high − low, which may itself be more than a float holds."""
        return self.high / 2 - self.low / 2

    def holds(self, value: float) -> bool:
        """Return whether a value lies on the axis."""
        slack = 2e-9 * self.half_length
        return self.low - slack <= self._scaled(value) <= self.high + slack

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def padded_axis(low: float, high: float, margin: float, start: float, end: float) -> Axis:
    """Return an axis from low − margin to high + margin, as far as floats go."""
    return Axis(max(low - margin, -_LARGEST), min(high + margin, _LARGEST), start, end)


def linear_ticks(axis: Axis) -> tuple[Tick, ...]:
    """Return about five ticks at multiples of 1, 2 or 5 times a power of ten."""
    rough = axis.half_length / 2.5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
    return tuple(Tick(axis.at(i * step), _label(i, step)) for i in range(first, last + 1))


def _label(index: int, step: float) -> str:
    """Return `index * step` with as many digits as the step needs, which is 1, 2 or 5 · 10ⁿ."""
    exponent = math.floor(math.log10(step))
    if 1 / _SPELLED_OUT < step < _SPELLED_OUT:
        return f"{index * step:.{max(0, -exponent)}f}"
    digits = len(str(abs(index) * round(step / 10.0**exponent)))
    return f"{index * step:.{digits}g}"


def log_ticks(axis: Axis, label: Callable[[float], str]) -> tuple[Tick, ...]:
    """Return ticks at 1, 2 and 5 times the powers of ten that the axis holds."""
    decades = range(math.floor(axis.low), math.ceil(axis.high) + 1)
    values = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    held = [value for value in values if axis.holds(value)]
    if len(held) < 2:
        held = [10.0 ** (axis.low + share * (axis.high - axis.low)) for share in (0.1, 0.5, 0.9)]
    return tuple(Tick(axis.at(value), label(value)) for value in held)
