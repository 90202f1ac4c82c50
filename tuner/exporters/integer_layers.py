"""Float layers and poolings in numpy: what a plan leaves float."""

import math
from typing import Any

import numpy as np

from tuner.exporters.integer_convolutions import Window, convolved, transposed, windows
from tuner.exporters.integer_functions import function, like, per_channel
from tuner.exporters.integer_values import Array


@function("matmul", "mm", "bmm")
def _matmul(self: Array, other: Any = None, mat2: Any = None) -> Array:
    return np.asarray(self @ (mat2 if other is None else other))


@function("linear")
def _linear(input: Array, weight: Array, bias: Array | None = None) -> Array:
    out = input @ weight.T
    return out if bias is None else out + bias


@function("addmm", "baddbmm")
def _addmm(
    self: Array,
    mat1: Any = None,
    mat2: Any = None,
    batch1: Any = None,
    batch2: Any = None,
    beta: float = 1,
    alpha: float = 1,
) -> Array:
    out = mat1 @ mat2 if batch1 is None else batch1 @ batch2
    return like(out, beta * self + alpha * out)


@function("einsum")
def _einsum(equation: str, tensors: list[Array], path: Any = None) -> Array:
    return np.asarray(np.einsum(equation.replace(" ", ""), *tensors, optimize=True))


@function("embedding")
def _embedding(weight: Any, indices: Array, **_: Any) -> Any:
    return weight[indices]


@function("conv1d", "conv2d", "conv3d")
def _conv(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Array:
    window = window_of(weight.shape[2:], stride, padding, dilation, groups)
    out = convolved(input, weight, window, np.zeros(()), np.matmul)
    return per_channel(input, out, None, bias)


@function("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Array:
    window = window_of(weight.shape[2:], stride, padding, dilation, groups)
    extra = each_axis(output_padding, weight.ndim - 2)
    out = transposed(input, weight, window, extra, np.zeros(()), np.matmul)
    return per_channel(input, out, None, bias)


def each_axis(value: Any, count: int) -> tuple[int, ...]:
    """Return one number for each spatial axis."""
    given = tuple(value) if isinstance(value, list | tuple) else (value,)
    return given * count if len(given) == 1 else given


def window_of(
    kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int
) -> Window:
    """Return a convolution's window; `padding` may be 'same' or 'valid' too."""
    count = len(kernel)
    dilations = each_axis(dilation, count)
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        edges = tuple((span // 2, span - span // 2) for span in spans)
    else:
        pads = each_axis(0 if padding == "valid" else padding, count)
        edges = tuple((p, p) for p in pads)
    return Window(each_axis(stride, count), edges, dilations, groups)


@function("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(
    self: Array,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Array:
    window = _pool_window(self, kernel_size, stride, padding, dilation, ceil_mode)
    kernel = each_axis(kernel_size, self.ndim - 2)
    seen = windows(self, kernel, window, np.asarray(-np.inf))
    return np.asarray(seen.max(axis=tuple(range(self.ndim, seen.ndim))))


@function("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(
    self: Array,
    kernel_size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    window = _pool_window(self, kernel_size, stride, padding, 1, ceil_mode)
    kernel = each_axis(kernel_size, self.ndim - 2)
    seen = windows(self.astype(np.float64), kernel, window, np.asarray(0.0))
    axes = tuple(range(self.ndim, seen.ndim))
    counts = _counted(self, kernel, window, each_axis(padding, len(kernel)), count_include_pad)
    return like(self, seen.sum(axis=axes) / (divisor_override or counts))


def _counted(
    x: Array, kernel: tuple[int, ...], window: Window, padding: tuple[int, ...], padded: bool
) -> Array:
    """Count the values in each window; padding counts where asked, what ceil_mode adds never."""
    inside = np.ones((1, 1, *x.shape[2:]))
    edges = window.padding
    if padded:
        inside = np.pad(inside, [(0, 0), (0, 0), *((p, p) for p in padding)], constant_values=1)
        edges = tuple((0, high - p) for (_, high), p in zip(edges, padding, strict=True))
    rest = Window(window.stride, edges, window.dilation)
    seen = windows(inside, kernel, rest, np.asarray(0.0))
    return np.asarray(seen.sum(axis=tuple(range(x.ndim, seen.ndim))))


def _pool_window(
    x: Array, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Window:
    count = x.ndim - 2
    kernel = each_axis(kernel_size, count)
    window = window_of(kernel, stride or kernel, padding, dilation, 1)
    if not ceil_mode:
        return window
    sides = zip(x.shape[2:], kernel, window.stride, window.padding, window.dilation, strict=True)
    return Window(window.stride, tuple(_ceiled(*side) for side in sides), window.dilation)


def _ceiled(n: int, k: int, step: int, padding: tuple[int, int], gap: int) -> tuple[int, int]:
    """Return the padding with which the last, incomplete window is one too."""
    low, high = padding
    span = gap * (k - 1) + 1
    count = math.ceil((n + low + high - span) / step) + 1
    count -= (count - 1) * step >= n + low  # a window must begin inside the tensor or left of it
    return low, max(high, (count - 1) * step + span - n - low)


@function("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d")
def _adaptive_avg_pool(self: Array, output_size: Any) -> Array:
    out = self.astype(np.float64)
    count = len(output_size)
    for axis, size in zip(range(self.ndim - count, self.ndim), output_size, strict=True):
        length = self.shape[axis]
        parts = [
            out.take(range(i * length // size, -(-(i + 1) * length // size)), axis).mean(axis)
            for i in range(size)
        ]
        out = np.stack(parts, axis)
    return like(self, out)


@function("scaled_dot_product_attention")
def _attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (np.repeat(x, repeats, axis=-3) for x in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.swapaxes(-1, -2)).astype(np.float64) * factor
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == bool
        scores = np.where(attn_mask, scores, -np.inf) if is_bool else scores + attn_mask
    most = scores.max(axis=-1, keepdims=True)
    shares = np.exp(scores - np.where(np.isneginf(most), 0, most))
    total = shares.sum(axis=-1, keepdims=True)  # 0 where all is masked: so is the output
    return np.asarray(like(query, shares / np.where(total == 0, 1, total)) @ value)
