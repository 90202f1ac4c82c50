"""The functions of snap.c on tensors: which tensors they take, and how they are called."""

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
from tuner.kernels.codecs import Bound, CodebookCodec, Codec, FloatCodec, IntegerCodec
from tuner.kernels.layout import Shape, block_parameter, parameter_shape

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_TYPES = (Tensor, nn.Parameter)
_MOST_LAYOUTS = 64  # that a grid keeps, one for each shape
_INTEGER, _BY_SUM, _BY_BITS, _CODEBOOK = range(4)
_MOST_ENTRIES = 256  # of a codebook: all are compared with, so more are slow
_ROUNDINGS = ("floor", "ceil", "rceil", "even")
_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "snap_tensor": (_POINTER, _POINTER, _INT64, _FLOAT, _FLOAT, _FLOAT, _POINTER),
    "snap_layout": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "snap_rows": (_POINTER, _POINTER, _POINTER, _FLOAT, _FLOAT, _FLOAT, _POINTER),
    "mask_tensor": (_POINTER, _POINTER, _POINTER, _INT64, _FLOAT, _FLOAT),
    "mask_layout": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    "amax_blocks": (_POINTER, _POINTER, _INT64, _INT64, _INT64),
    "snap_mx": (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER),
}


class _Codec(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "shift", "parity")),
        *((name, ctypes.c_int32) for name in ("subnormals", "negative_zero", "saturating")),
        *((name, _FLOAT) for name in ("limit", "largest", "overflow", "normal", "magic")),
        ("length", ctypes.c_int32),
        *((name, ctypes.POINTER(_FLOAT)) for name in ("entries", "ends")),
    )


class _Layout(ctypes.Structure):
    _fields_ = tuple((name, _INT64) for name in ("outer", "n", "inner", "size", "so", "sk", "si"))


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, _INT64 * 3) for name in ("count", "step")),
        ("length", _INT64),
    )


class _Parameters(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("scale", "inverse", "low", "high")),
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


def is_transformed() -> bool:
    """Whether torch is compiling, or tracing, or under a transform such as vmap.

    Then the values of a tensor cannot be looked at, nor written where one wants.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


def is_functional() -> bool:
    """Whether a transform of torch.func, such as vmap or grad, is on, and nothing is compiled."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def takes(x: Tensor) -> bool:
    """Whether the native kernels can work on a tensor: plain, on the CPU, and not being traced."""
    if is_transformed() or type(x) not in _TYPES:
        return False
    return x.is_cpu and x.dtype in SUFFIX and not x.is_neg() and _is_there(x.dtype)


def is_plain(gradient: Tensor) -> bool:
    """Whether a gradient has memory to read, and nobody wants the gradient of it."""
    if torch._C._functorch.is_legacy_batchedtensor(gradient):
        return False  # of torch.autograd.grad(is_grads_batched=True)
    return type(gradient) in _TYPES and not (gradient.requires_grad and torch.is_grad_enabled())


@dataclass(frozen=True, eq=False)
class Bounds:
    """Scale, low and high of a grid, and the factor that stands for division by the scale, if any.

    See `tuner.kernels.grid.Grid` for what they mean.
    """

    scale: Bound
    low: Bound
    high: Bound
    inverse: Bound | None = None

    @property
    def are_numbers(self) -> bool:
        """Whether one scale holds for the whole tensor, and values are divided by it."""
        given = self.scale, self.low, self.high, self.inverse
        return self.inverse is None and not any(isinstance(bound, Tensor) for bound in given)


class NativeGrid:
    """A grid as the native functions take it."""

    def __init__(self, granularity: Granularity, bounds: Bounds, codec: Codec) -> None:
        self._granularity = granularity
        self._bounds = bounds
        self._codec = _c_codec(codec)
        if bounds.inverse is not None and not _is_plain_float(self._codec):
            self._codec = None
        self._codec_address = None if self._codec is None else ctypes.addressof(self._codec)
        self._layouts: dict[object, _Prepared] = {}
        self._mask_layouts: dict[object, _Prepared] = {}
        self._numbers = (bounds.scale, bounds.low, bounds.high) if bounds.are_numbers else None

    def dense(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """Return `snap` for contiguous tensors of a dtype that `takes` takes, None if it is slower.

        Everything else that it needs to know is looked up here, once.
        """
        if self._numbers is None or self._codec_address is None or dtype not in SUFFIX:
            return None
        if not _is_there(dtype):
            return None
        run, numbers, codec = _function("snap_tensor", dtype), self._numbers, self._codec_address

        def snap_dense(x: Tensor) -> Tensor:
            out = POOL.empty_as(x)
            run(x.data_ptr(), out.data_ptr(), x.numel(), *numbers, codec)
            return out

        return snap_dense

    def snap(self, x: Tensor) -> Tensor | None:
        """Return `x` on the grid in its own memory format; None where only torch can do it."""
        if self._codec_address is None:
            return None
        if self._numbers is not None:
            dense = x if x.is_contiguous() else _in_memory_order(x)
            if dense is None:
                return None
            out = POOL.empty_like(x)
            run = _function("snap_tensor", x.dtype)
            run(dense.data_ptr(), out.data_ptr(), x.numel(), *self._numbers, self._codec_address)
            return out
        prepared = self._prepared(x, self._layouts, self._bounds)
        if prepared is None:
            return None
        out = POOL.empty_like(x)
        run = _function("snap_layout", x.dtype)
        run(x.data_ptr(), out.data_ptr(), *prepared.addresses, self._codec_address)
        return out

    def snap_rows(self, x: Tensor) -> Tensor | None:
        """Return a contiguous `snap(x)` of rows with gaps between them; None if it must be copied.

        The values of a row, on the last axis, lie side by side.
        """
        if self._codec_address is None or self._numbers is None or not x.numel():
            return None
        rows = _rows_of(tuple(x.shape), x.stride())
        if rows is None:
            return None
        out = POOL.empty_rows(x.shape, x.dtype)
        run = _function("snap_rows", x.dtype)
        addresses = x.data_ptr(), out.data_ptr(), ctypes.addressof(rows)
        run(*addresses, *self._numbers, self._codec_address)
        return out

    def mask(self, x: Tensor, gradient: Tensor, ends: tuple[Bound, Bound]) -> Tensor | None:
        """Return the gradient where x lies between the ends, else 0; None if only torch can."""
        if gradient.dtype != x.dtype or not x.is_contiguous():
            return None
        if not takes(gradient) or not is_plain(gradient):
            return None
        gradient = gradient.contiguous()
        out = POOL.empty_like(x)
        pointers = x.data_ptr(), gradient.data_ptr(), out.data_ptr()
        if self._numbers is not None:
            _function("mask_tensor", x.dtype)(*pointers, x.numel(), *ends)
            return out
        prepared = self._prepared(x, self._mask_layouts, Bounds(1.0, *ends))
        if prepared is None:
            return None
        _function("mask_layout", x.dtype)(*pointers, *prepared.addresses)
        return out

    def _prepared(
        self, x: Tensor, known: "dict[object, _Prepared]", bounds: Bounds
    ) -> "_Prepared | None":
        """Return the layout of tensors of this shape and order in memory, made once."""
        key = x.shape, x.is_contiguous() or x.stride()
        prepared = known.get(key)
        if prepared is None:
            moved = _moved(x, self._granularity)
            if moved is None:
                return None
            if len(known) >= _MOST_LAYOUTS:
                known.clear()
            prepared = known[key] = _Prepared(*moved, bounds)
        return prepared


class _Prepared:
    """The structures of one layout, with the tensors that they point to."""

    def __init__(self, shape: Shape, granularity: Granularity, bounds: Bounds) -> None:
        expected = parameter_shape(shape, granularity)
        scale = bounds.scale if isinstance(bounds.scale, Tensor) else torch.tensor(bounds.scale)
        given = scale, bounds.inverse, bounds.low, bounds.high
        self._held = [_floats(bound, shape, expected, granularity) for bound in given]
        pointers = [None if kept is None else kept.data_ptr() for kept in self._held]
        ends = [0.0 if isinstance(end, Tensor) else end for end in (bounds.low, bounds.high)]
        self._layout = _layout_of(shape, granularity)
        self._parameters = _Parameters(*pointers, *ends)
        self.addresses = ctypes.addressof(self._layout), ctypes.addressof(self._parameters)


def snap_mx(x: Tensor, mx: MxScale, codec: Codec) -> Tensor | None:
    """Return `x` in an MX format, each block on its own scale; None if only torch can do it."""
    c_codec = _c_codec(codec) if takes(x) and x.is_contiguous() else None
    if c_codec is None or c_codec.kind == _CODEBOOK:
        return None
    out = POOL.empty_like(x)
    length = x.shape[-1]
    rows = x.numel() // length if length else 0
    addresses = ctypes.addressof(_c_mx(mx)), ctypes.addressof(c_codec)
    _function("snap_mx", x.dtype)(x.data_ptr(), out.data_ptr(), rows, length, *addresses)
    return out


def block_amax(x: Tensor, size: int) -> Tensor | None:
    """Return the largest magnitude of each block of the last axis, `[…, ceil(n / size)]`, in fp32.

    It is NaN where a block holds NaN. None if only torch can do it.
    """
    if not takes(x) or not x.is_contiguous() or not x.numel():
        return None
    length = x.shape[-1]
    rows = x.numel() // length
    out = torch.empty((*x.shape[:-1], -(-length // size)))
    _function("amax_blocks", x.dtype)(x.data_ptr(), out.data_ptr(), rows, length, size)
    return out


@cache
def _is_there(dtype: torch.dtype) -> bool:
    return hasattr(library(), f"snap_tensor_{SUFFIX[dtype]}")


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    function: Callable[..., None] = getattr(library(), f"{name}_{SUFFIX[dtype]}")
    function.argtypes, function.restype = _ARGUMENTS[name], None  # type: ignore[attr-defined]
    return function


@lru_cache(maxsize=1024)
def _c_codec(codec: Codec) -> _Codec | None:
    if isinstance(codec, IntegerCodec):
        return _Codec(_INTEGER, subnormals=1, negative_zero=1, saturating=1)
    if isinstance(codec, FloatCodec) and codec.layout.mantissa_bits < 23:
        return _float_codec(codec, codec.layout)
    if isinstance(codec, CodebookCodec) and len(codec.entries) <= _MOST_ENTRIES:
        return _codebook(codec)
    return None


@lru_cache(maxsize=256)
def _c_mx(mx: MxScale) -> _Mx:
    return _Mx(_ROUNDINGS.index(mx.rounding), mx.emax, mx.mantissa, mx.size, mx.largest)


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


def _is_plain_float(codec: _Codec | None) -> bool:
    """Whether a codec rounds floats by a sum, saturating, with subnormals and −0."""
    if codec is None or codec.kind != _BY_SUM:
        return False
    return bool(codec.subnormals and codec.negative_zero and codec.saturating)


def _codebook(codec: CodebookCodec) -> _Codec:
    entries, ends = codec.entries, codec.ends(torch.float32).tolist()
    arrays = [(_FLOAT * len(values))(*values) for values in (entries, ends)]
    return _Codec(kind=_CODEBOOK, length=len(entries), entries=arrays[0], ends=arrays[1])


def _in_memory_order(x: Tensor) -> Tensor | None:
    """Return a contiguous view of a tensor without gaps, None if it has any."""
    view = x.permute(_order(x))
    return view if view.is_contiguous() else None


def _order(x: Tensor) -> list[int]:
    return sorted(range(x.ndim), key=x.stride, reverse=True)


def _moved(x: Tensor, granularity: Granularity) -> tuple[Shape, Granularity] | None:
    """Return shape and granularity in the order of memory; None where that cannot be said."""
    if x.is_contiguous():
        return tuple(x.shape), granularity
    view = _in_memory_order(x)
    if view is None or not isinstance(granularity, PerChannel):
        return None
    return tuple(view.shape), PerChannel(_order(x).index(granularity.axis % x.ndim))


def _floats(
    bound: Bound | None, shape: Shape, expected: Shape, granularity: Granularity
) -> Tensor | None:
    if not isinstance(bound, Tensor):
        return None
    block_parameter(bound, shape, granularity)  # raises where the shape does not fit
    return bound.expand(expected).to(torch.float32).contiguous()


@lru_cache(maxsize=4096)
def _rows_of(shape: Shape, strides: Shape) -> _Rows | None:
    """Return the rows of a tensor of at most four axes, the last of which is dense."""
    if not 1 <= len(shape) <= 4 or strides[-1] != 1:
        return None
    missing = 4 - len(shape)
    count, step = (1,) * missing + shape[:-1], (0,) * missing + strides[:-1]
    return _Rows((_INT64 * 3)(*count), (_INT64 * 3)(*step), shape[-1])


@lru_cache(maxsize=4096)
def _layout_of(shape: Shape, granularity: Granularity) -> _Layout:
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
