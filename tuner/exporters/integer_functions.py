"""Float functions of ATen in numpy, by the names of their operators: what stays beside integers.

Arguments have the names of the ATen schemas. One entry serves all overloads of an operator.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tuner.exporters.integer_values import Array

Function = Callable[..., Any]
FUNCTIONS: dict[str, Function] = {}
_ERF_STEPS, _ERF_END = 256, 6


def function(*names: str) -> Callable[[Function], Function]:
    """Enter a function in the table under the names of its operators."""

    def enter(fn: Function) -> Function:
        FUNCTIONS.update(dict.fromkeys(names, fn))
        return fn

    return enter


def axes_of(dim: Any) -> tuple[int, ...] | None:
    """Return dimensions as numpy takes them: none for all."""
    if dim is None or dim == []:
        return None
    return tuple(dim) if isinstance(dim, list | tuple) else (dim,)


def as_dtype(x: Any, dtype: str | None) -> Any:
    """Return x in a dtype, unless that is None."""
    return x if dtype is None else np.asarray(x).astype(dtype)


def erf(x: Array) -> Array:
    """Return the error function, by Taylor series around the points of a table, to 1e-10."""
    bound = np.clip(np.asarray(x, dtype=np.float64), -_ERF_END, _ERF_END)
    index = np.rint(np.nan_to_num(bound) * _ERF_STEPS).astype(np.int64)
    near = index / _ERF_STEPS
    h = bound - near
    slope = 2 / math.sqrt(math.pi) * np.exp(-near * near)
    series = h * (1 - h * (near - h * (2 * near * near - 1) / 3))
    return _ERF[index + _ERF_STEPS * _ERF_END] + slope * series


_ERF = np.array(
    [math.erf(k / _ERF_STEPS) for k in range(-_ERF_STEPS * _ERF_END, _ERF_STEPS * _ERF_END + 1)]
)


def like(x: Array, values: Array) -> Array:
    """Return values in the dtype of x, if that is a float type: sums are made in fp64."""
    return values.astype(x.dtype if np.issubdtype(x.dtype, np.floating) else np.float32)


def _floats(x: Any) -> Array:
    array = np.asarray(x)
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32)


def _unary(fn: Callable[[Array], Array]) -> Function:
    def apply(self: Any, **_: Any) -> Array:
        x = _floats(self)
        with np.errstate(all="ignore"):
            return like(x, fn(x.astype(np.float64)))

    return apply


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


FUNCTIONS |= {
    "exp": _unary(np.exp),
    "log": _unary(np.log),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: 1 / np.sqrt(x)),
    "reciprocal": _unary(lambda x: 1 / x),
    "sin": _unary(np.sin),
    "cos": _unary(np.cos),
    "tanh": _unary(np.tanh),
    "erf": _unary(erf),
    "sigmoid": _unary(_sigmoid),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "hardswish": _unary(lambda x: x * np.clip(x + 3, 0, 6) / 6),
    "hardsigmoid": _unary(lambda x: np.clip(x + 3, 0, 6) / 6),
    "mish": _unary(lambda x: x * np.tanh(np.logaddexp(0, x))),
    "log1p": _unary(np.log1p),
    "relu": lambda self: np.maximum(self, 0),
    "relu6": lambda self: np.clip(self, 0, 6),
    "abs": lambda self: np.abs(self),
    "neg": lambda self: -self,
    "floor": lambda self: np.floor(self),
    "sign": lambda self: np.sign(self),
    "isneginf": lambda self: np.isneginf(self),
    "isinf": lambda self: np.isinf(self),
    "isnan": lambda self: np.isnan(self),
    "bitwise_not": lambda self: np.invert(self),
    "logical_not": lambda self: np.logical_not(self),
}


@function("round")
def _round(self: Array, decimals: int = 0) -> Array:
    if not decimals:
        return np.rint(self)
    power = like(self, np.asarray(10.0 ** abs(decimals)))
    return np.rint(self * power) / power if decimals > 0 else np.rint(self / power) * power


@function("gelu")
def _gelu(self: Array, approximate: str = "none") -> Array:
    x = self.astype(np.float64)
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return like(self, 0.5 * x * (1 + np.tanh(inner)))
    return like(self, 0.5 * x * (1 + erf(x / math.sqrt(2))))


@function("leaky_relu")
def _leaky_relu(self: Array, negative_slope: float = 0.01) -> Array:
    return like(self, np.where(self > 0, self, self * negative_slope))


@function("elu")
def _elu(self: Array, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Array:
    low = alpha * np.expm1(np.minimum(self, 0) * input_scale)
    return like(self, scale * np.where(self > 0, self, low))


@function("softplus")
def _softplus(self: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    scaled = self * beta
    return like(self, np.where(scaled > threshold, self, np.logaddexp(0, scaled) / beta))


@function("prelu", "_prelu_kernel")
def _prelu(self: Array, weight: Array) -> Array:
    slopes = weight.reshape(-1, *[1] * (self.ndim - 2)) if weight.ndim == 1 else weight
    return like(self, np.where(self > 0, self, self * slopes))


@function("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(
    self: Array, min: Any = None, max: Any = None, min_val: Any = None, max_val: Any = None
) -> Array:
    low, high = (a if b is None else b for a, b in ((min, min_val), (max, max_val)))
    x = self if low is None else np.maximum(self, low)
    return (x if high is None else np.minimum(x, high)).astype(self.dtype)


@function("softmax", "_softmax")
def _softmax(self: Array, dim: int, dtype: str | None = None, half_to_float: bool = False) -> Array:
    x = _floats(as_dtype(self, dtype))
    with np.errstate(invalid="ignore"):  # a row of −inf is NaN, as torch has it
        shares = np.exp(x.astype(np.float64) - x.max(axis=dim, keepdims=True))
        return like(x, shares / shares.sum(axis=dim, keepdims=True))


@function("log_softmax", "_log_softmax")
def _log_softmax(
    self: Array, dim: int, dtype: str | None = None, half_to_float: bool = False
) -> Array:
    x = _floats(as_dtype(self, dtype))
    shifted = x.astype(np.float64) - x.max(axis=dim, keepdims=True)
    return like(x, shifted - np.log(np.exp(shifted).sum(axis=dim, keepdims=True)))


@function("layer_norm")
def _layer_norm(
    input: Array,
    normalized_shape: list[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Array:
    axes = tuple(range(-len(normalized_shape), 0))
    return _normalized(input, axes, eps, weight, bias)


@function("rms_norm")
def _rms_norm(
    input: Array, normalized_shape: list[int], weight: Array | None = None, eps: Any = None
) -> Array:
    axes = tuple(range(-len(normalized_shape), 0))
    x = input.astype(np.float64)
    least = float(np.finfo(input.dtype).eps) if eps is None else eps
    out = x / np.sqrt((x * x).mean(axis=axes, keepdims=True) + least)
    return like(input, out if weight is None else out * weight)


@function("group_norm")
def _group_norm(
    input: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Array:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    out = _normalized(grouped, (-1,), eps, None, None).reshape(input.shape)
    return per_channel(input, out, weight, bias)


@function("batch_norm")
def _batch_norm(
    input: Array,
    weight: Array | None,
    bias: Array | None,
    running_mean: Array,
    running_var: Array,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Array:
    shape = (-1, *[1] * (input.ndim - 2))
    mean, var = (part.astype(np.float64).reshape(shape) for part in (running_mean, running_var))
    return per_channel(input, (input - mean) / np.sqrt(var + eps), weight, bias)


def per_channel(x: Array, out: Array, weight: Array | None, bias: Array | None) -> Array:
    """Return out · weight + bias along the second axis, in the dtype of x."""
    shape = (-1, *[1] * (x.ndim - 2))
    out = out if weight is None else out * weight.reshape(shape)
    return like(x, out if bias is None else out + bias.reshape(shape))


def _normalized(
    x: Array, axes: tuple[int, ...], eps: float, weight: Array | None, bias: Array | None
) -> Array:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=axes, keepdims=True)
    out = centred / np.sqrt((centred * centred).mean(axis=axes, keepdims=True) + eps)
    out = out if weight is None else out * weight
    return like(x, out if bias is None else out + bias)


def _binary(fn: Callable[[Any, Any], Any]) -> Function:
    def apply(self: Any, other: Any) -> Any:
        with np.errstate(all="ignore"):
            return _weak(fn, self, other)

    return apply


def _weak(fn: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
    """Call fn; fp64 numbers of Python, and arrays without axes, do not widen the other one."""
    return fn(_plain(one, other), _plain(other, one))


def _plain(x: Any, beside: Any) -> Any:
    has_no_axes = isinstance(x, np.ndarray | np.generic) and not x.ndim
    return x.item() if has_no_axes and isinstance(beside, np.ndarray) and beside.ndim else x


@function("add")
def _add(self: Any, other: Any, alpha: float = 1) -> Any:
    return _weak(np.add, self, other if alpha == 1 else other * alpha)


def _sub(self: Any, other: Any, alpha: float = 1) -> Any:
    return _weak(np.subtract, self, other if alpha == 1 else other * alpha)


def _rsub(self: Any, other: Any, alpha: float = 1) -> Any:
    return _weak(np.subtract, other, self if alpha == 1 else self * alpha)


@function("div", "true_divide")
def _div(self: Any, other: Any, rounding_mode: str | None = None) -> Any:
    with np.errstate(all="ignore"):
        if rounding_mode is None:
            return _weak(np.true_divide, _floats(self), other)
        quotient = _weak(np.floor_divide, self, other)
        return quotient if rounding_mode == "floor" else np.trunc(_weak(np.divide, self, other))


@function("pow")
def _pow(self: Any, exponent: Any) -> Any:
    return _weak(np.power, self, exponent)


@function("where")
def _where(condition: Array, self: Any, other: Any) -> Any:
    return _weak(lambda a, b: np.where(condition, a, b), self, other)


@function("masked_fill")
def _masked_fill(self: Array, mask: Array, value: Any) -> Array:
    return np.where(mask, np.asarray(value, dtype=self.dtype), self)


FUNCTIONS |= {
    "sub": _sub,
    "rsub": _rsub,
    "mul": _binary(np.multiply),
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "remainder": _binary(np.remainder),
    "floor_divide": _binary(np.floor_divide),
    "eq": _binary(np.equal),
    "ne": _binary(np.not_equal),
    "lt": _binary(np.less),
    "le": _binary(np.less_equal),
    "gt": _binary(np.greater),
    "ge": _binary(np.greater_equal),
    "logical_and": _binary(np.logical_and),
    "logical_or": _binary(np.logical_or),
    "__and__": _binary(np.bitwise_and),
    "bitwise_and": _binary(np.bitwise_and),
    "__or__": _binary(np.bitwise_or),
    "bitwise_or": _binary(np.bitwise_or),
}


def _reduction(fn: Callable[..., Any], in_fp64: bool = False) -> Function:
    def apply(self: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
        x = as_dtype(self, dtype)
        if not in_fp64:
            return np.asarray(fn(x, axis=axes_of(dim), keepdims=keepdim))
        is_float = np.issubdtype(x.dtype, np.floating)
        wide = x.astype(np.float64 if is_float else np.int64)
        out = np.asarray(fn(wide, axis=axes_of(dim), keepdims=keepdim))
        return like(x, out) if is_float else out

    return apply


FUNCTIONS |= {
    "mean": _reduction(np.mean, in_fp64=True),
    "sum": _reduction(np.sum, in_fp64=True),
    "amax": _reduction(np.max),
    "amin": _reduction(np.min),
    "any": _reduction(np.any),
    "all": _reduction(np.all),
}


@function("var")
def _var(
    self: Array,
    dim: Any = None,
    unbiased: bool = True,
    correction: float | None = None,
    keepdim: bool = False,
) -> Array:
    less = int(unbiased) if correction is None else correction
    wide = self.astype(np.float64)
    return like(self, np.asarray(wide.var(axis=axes_of(dim), ddof=less, keepdims=keepdim)))


@function("argmax")
def _argmax(self: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return np.asarray(np.argmax(self, axis=dim, keepdims=keepdim))


@function("cumsum")
def _cumsum(self: Array, dim: int, dtype: str | None = None) -> Array:
    wide = np.float64 if np.issubdtype(self.dtype, np.floating) else np.int64
    return np.cumsum(self, axis=dim, dtype=wide).astype(dtype or _sum_dtype(self))


def _sum_dtype(x: Array) -> str:
    return str(x.dtype) if np.issubdtype(x.dtype, np.floating) else "int64"
