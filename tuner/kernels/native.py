"""The functions of native.c on tensors: which tensors they take, and how they are called."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tuner.float_layout import FloatLayout
from tuner.granularity import Granularity, PerBlock, PerChannel, PerGroup
from tuner.kernels.buffers import POOL
from tuner.kernels.build import library
from tuner.kernels.codecs import Bound, Codec, FloatCodec, IntegerCodec
from tuner.kernels.layout import block_parameter, parameter_shape

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_TYPES = (Tensor, nn.Parameter)
_INTEGER, _BY_SUM, _BY_BITS = range(3)
_ROUNDINGS = ("floor", "ceil", "rceil", "even")
_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "snap_tensor": (_POINTER, _POINTER, _INT64, _FLOAT, _FLOAT, _FLOAT, _POINTER),
    "snap_layout": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "mask_tensor": (_POINTER, _POINTER, _POINTER, _INT64, _FLOAT, _FLOAT, _FLOAT),
    "mask_layout": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "snap_mx": (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER),
}


class _Codec(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "shift", "parity")),
        *((name, ctypes.c_int32) for name in ("subnormals", "negative_zero", "saturating")),
        *((name, _FLOAT) for name in ("limit", "largest", "overflow", "normal", "magic")),
    )


class _Layout(ctypes.Structure):
    _fields_ = tuple((name, _INT64) for name in ("outer", "n", "inner", "size", "so", "sk", "si"))


class _Parameters(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("scale", "low", "high")),
        *((name, _FLOAT) for name in ("all_low", "all_high")),
    )


class _Mx(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rounding", "emax", "mantissa", "size")),
        ("largest", _FLOAT),
    )


@dataclass(frozen=True)
class MxScale:
    """How the shared scale of an MX block follows from its largest magnitude.

    `emax` is the exponent of the element format's largest number, `mantissa` its mantissa bits and
    `largest` the number itself; `rounding` is floor, ceil, rceil or even.
    """

    size: int
    rounding: str
    emax: int
    mantissa: int
    largest: float


def takes(x: Tensor) -> bool:
    """Whether the native kernels can work on a tensor: plain, on the CPU, and not being traced."""
    if torch.compiler.is_compiling() or type(x) not in _TYPES:
        return False
    return (
        x.is_cpu
        and x.dtype in _SUFFIX
        and not x.is_neg()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and _function("snap_tensor", x.dtype) is not None
    )


def snap(
    x: Tensor, granularity: Granularity, scale: Bound, low: Bound, high: Bound, codec: Codec
) -> Tensor | None:
    """Return `x` on the grid in its own memory format; None where only torch can do it."""
    c_codec = _c_codec(codec)
    if c_codec is None:
        return None
    numbers = not isinstance(scale, Tensor) and not isinstance(low, Tensor)
    view = _dense(x, granularity, numbers)
    if view is None:
        return None
    dense, axis_moved = view
    out = POOL.empty_like(x)
    target = ctypes.addressof(c_codec)
    if numbers:
        run = _function("snap_tensor", x.dtype)
        run(dense.data_ptr(), out.data_ptr(), x.numel(), scale, low, high, target)  # type: ignore[misc]
        return out
    run = _function("snap_layout", x.dtype)
    kept = _layout_parameters(tuple(dense.shape), axis_moved, scale, low, high)
    layout, parameters = (ctypes.addressof(c) for c in kept[:2])
    run(dense.data_ptr(), out.data_ptr(), layout, parameters, target)  # type: ignore[misc]
    return out


def mask(
    x: Tensor, gradient: Tensor, granularity: Granularity, scale: Bound, low: Bound, high: Bound
) -> Tensor | None:
    """Return the gradient where `low <= x / scale <= high`, else 0; None if only torch can."""
    if gradient.dtype != x.dtype or type(gradient) not in _TYPES or not takes(x):
        return None
    numbers = not isinstance(scale, Tensor) and not isinstance(low, Tensor)
    if not x.is_contiguous():
        return None
    gradient = gradient.contiguous()
    out = POOL.empty_like(x)
    pointers = x.data_ptr(), gradient.data_ptr(), out.data_ptr()
    if numbers:
        _function("mask_tensor", x.dtype)(*pointers, x.numel(), scale, low, high)  # type: ignore[misc]
        return out
    kept = _layout_parameters(tuple(x.shape), granularity, scale, low, high)
    layout, parameters = (ctypes.addressof(c) for c in kept[:2])
    _function("mask_layout", x.dtype)(*pointers, layout, parameters)  # type: ignore[misc]
    return out


def snap_mx(x: Tensor, mx: MxScale, codec: Codec) -> Tensor | None:
    """Return `x` in an MX format, each block on its own scale; None if only torch can do it."""
    c_codec = _c_codec(codec)
    if c_codec is None or not x.is_contiguous() or not takes(x):
        return None
    c_mx = _Mx(_ROUNDINGS.index(mx.rounding), mx.emax, mx.mantissa, mx.size, mx.largest)
    out = POOL.empty_like(x)
    length = x.shape[-1]
    rows = x.numel() // length if length else 0
    addresses = ctypes.addressof(c_mx), ctypes.addressof(c_codec)
    _function("snap_mx", x.dtype)(x.data_ptr(), out.data_ptr(), rows, length, *addresses)  # type: ignore[misc]
    return out


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    loaded = library()
    function = getattr(loaded, f"{name}_{_SUFFIX[dtype]}", None)
    if function is not None:
        function.argtypes, function.restype = _ARGUMENTS[name], None
    return function


@lru_cache(maxsize=1024)
def _c_codec(codec: Codec) -> _Codec | None:
    if isinstance(codec, IntegerCodec):
        return _Codec(_INTEGER, subnormals=1, negative_zero=1, saturating=1)
    if isinstance(codec, FloatCodec) and codec.layout.mantissa_bits < 23:
        return _float_codec(codec, codec.layout)
    return None


def _float_codec(codec: FloatCodec, layout: FloatLayout) -> _Codec:
    return _Codec(
        kind=_BY_BITS if codec.by_bits else _BY_SUM,
        shift=23 - layout.mantissa_bits,
        parity=codec.parity,
        subnormals=layout.subnormals,
        negative_zero=layout.has_negative_zero,
        saturating=layout.saturating,
        limit=codec.limit,
        largest=layout.largest,
        overflow=layout.overflow,
        normal=layout.smallest_normal,
        magic=codec.magic,
    )


def _dense(x: Tensor, granularity: Granularity, numbers: bool) -> tuple[Tensor, Granularity] | None:
    """Return a contiguous view of the same memory, and the granularity in its order of axes."""
    if x.is_contiguous():
        return x, granularity
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    view = x.permute(order)
    if not view.is_contiguous():
        return None
    if numbers:
        return view, granularity
    if isinstance(granularity, PerChannel):
        return view, PerChannel(order.index(granularity.axis % x.ndim))
    return None


def _layout_parameters(
    shape: tuple[int, ...], granularity: Granularity, scale: Bound, low: Bound, high: Bound
) -> tuple[_Layout, _Parameters, list[Tensor]]:
    """Return the structures, and the tensors that must live as long as they are used."""
    expected = parameter_shape(shape, granularity)
    scales = scale if isinstance(scale, Tensor) else torch.tensor(scale)
    held = [_floats(bound, shape, expected, granularity) for bound in (scales, low, high)]
    pointers = [None if kept is None else kept.data_ptr() for kept in held]
    ends = [0.0 if isinstance(bound, Tensor) else bound for bound in (low, high)]
    layout = _layout_of(shape, granularity)
    return layout, _Parameters(*pointers, *ends), [kept for kept in held if kept is not None]


def _floats(
    bound: Bound, shape: tuple[int, ...], expected: tuple[int, ...], granularity: Granularity
) -> Tensor | None:
    if not isinstance(bound, Tensor):
        return None
    block_parameter(bound, shape, granularity)  # raises where the shape does not fit
    return bound.expand(expected).to(torch.float32).contiguous()


@lru_cache(maxsize=4096)
def _layout_of(shape: tuple[int, ...], granularity: Granularity) -> _Layout:
    axis = granularity.axis if isinstance(granularity, PerChannel | PerGroup) else -1
    axis %= len(shape)
    outer, length, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if isinstance(granularity, PerChannel):
        if inner == 1:
            return _Layout(outer, 1, length, 1, 0, 0, 1)
        return _Layout(outer, length, inner, 1, 0, 1, 0)
    size = granularity.size if isinstance(granularity, PerGroup | PerBlock) else max(length, 1)
    groups = -(-length // size)
    if inner == 1:
        return _Layout(outer, length, 1, size, groups, 1, 0)
    return _Layout(outer, length, inner, size, groups * inner, inner, 1)
