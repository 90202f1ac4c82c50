"""Convolutions as matrix products: of integers and of floats alike."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tuner.exporters.integer_values import Array

Multiply = Callable[[Array, Array], Array]
"""Multiplies what the kernel sees, `[N, groups, positions, k]`, by `[groups, k, out]`."""


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves; one entry a spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1


def convolved(x: Array, weight: Array, window: Window, fill: Array, multiply: Multiply) -> Array:
    """Return `[N, C_out, …]` of x `[N, C_in, …]` and a weight `[C_out, C_in / groups, …]`."""
    seen = windows(x, weight.shape[2:], window, fill)
    places = seen.shape[2 : x.ndim]
    matrix = _kernel_matrix(weight, window.groups)
    out = multiply(_columns(seen, weight.ndim - 2, window.groups), matrix)
    return out.swapaxes(-1, -2).reshape(x.shape[0], weight.shape[0], *places)


def transposed(
    x: Array,
    weight: Array,
    window: Window,
    output_padding: tuple[int, ...],
    fill: Array,
    multiply: Multiply,
) -> Array:
    """Return a transposed convolution, as a convolution of x with fillers between its values.

    The weight is `[C_in, C_out / groups, …]`; the window is that of the transposed convolution.
    """
    spans = [d * (k - 1) for d, k in zip(window.dilation, weight.shape[2:], strict=True)]
    edges = zip(spans, window.padding, output_padding, strict=True)
    padding = tuple((span - low, span - high + more) for span, (low, high), more in edges)
    inner = Window((1,) * len(spans), padding, window.dilation, window.groups)
    spaced = _spread(x, window.stride, fill)
    return convolved(spaced, _turned(weight, window.groups), inner, fill, multiply)


def _columns(seen: Array, axes: int, groups: int) -> Array:
    """Return `[N, groups, positions, C / groups · kernel]` of what windows gives."""
    batch, channels = seen.shape[:2]
    grouped = seen.reshape(batch, groups, channels // groups, *seen.shape[2:])
    order = (0, 1, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes))
    places = int(np.prod(seen.shape[2 : 2 + axes]))
    return grouped.transpose(order).reshape(batch, groups, places, -1)


def windows(x: Array, kernel: tuple[int, ...], window: Window, fill: Array) -> Array:
    """Return `[N, C, *positions, *kernel]`, a view of x padded with `fill`."""
    axes = tuple(range(2, x.ndim))
    padded = _padded(x, window.padding, fill)
    spans = tuple(d * (k - 1) + 1 for d, k in zip(window.dilation, kernel, strict=True))
    seen = sliding_window_view(padded, spans, axis=axes)
    steps = tuple(slice(None, None, s) for s in window.stride)
    gaps = tuple(slice(None, None, d) for d in window.dilation)
    return seen[(slice(None), slice(None), *steps, *gaps)]


def _padded(x: Array, padding: tuple[tuple[int, int], ...], fill: Array) -> Array:
    """Pad the spatial axes; negative padding cuts off."""
    cuts = [slice(max(-low, 0), n - max(-high, 0)) for n, (low, high) in _edges(x, padding)]
    kept = x[(slice(None), slice(None), *cuts)]
    added = [(max(low, 0), max(high, 0)) for low, high in padding]
    return np.pad(kept, [(0, 0), (0, 0), *added], constant_values=fill)


def _edges(x: Array, padding: tuple[tuple[int, int], ...]) -> list[tuple[int, tuple[int, int]]]:
    return list(zip(x.shape[2:], padding, strict=True))


def _kernel_matrix(weight: Array, groups: int) -> Array:
    """Return a weight `[C_out, C_in / groups, …]` as `[groups, C_in / groups · kernel, out]`."""
    out = weight.shape[0] // groups
    return weight.reshape(groups, out, -1).transpose(0, 2, 1)


def _spread(x: Array, stride: tuple[int, ...], fill: Array) -> Array:
    """Return x with stride − 1 fillers between neighbours of each spatial axis."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = np.full((*x.shape[:2], *sizes), fill, dtype=x.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return wide


def _turned(weight: Array, groups: int) -> Array:
    """Return a transposed convolution's weight as that of the convolution that does the same.

    `[C_in, C_out / groups, …]` becomes `[C_out, C_in / groups, …]`, its kernel turned around.
    """
    channels, out = weight.shape[:2]
    kernel = weight.shape[2:]
    grouped = weight.reshape(groups, channels // groups, out, *kernel).swapaxes(1, 2)
    flipped = np.flip(grouped, axis=tuple(range(3, 3 + len(kernel))))
    return flipped.reshape(groups * out, channels // groups, *kernel)
