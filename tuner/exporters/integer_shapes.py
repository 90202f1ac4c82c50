"""What moves values around, makes constants, and counts lengths, in numpy.

What is in MOVES does the same to codes as to floats: a quantized tensor stays quantized.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tuner.exporters.integer_functions import FUNCTIONS, Function, as_dtype, axes_of, function
from tuner.exporters.integer_values import Array

MOVES: dict[str, Function] = {}
NUMBERS: dict[str, Function] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
    "pow": operator.pow,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and_": operator.and_,
    "or_": operator.or_,
    "sym_max": max,
    "sym_min": min,
    "sym_sum": sum,
    "sym_float": float,
    "sym_int": int,
    "sym_not": operator.not_,
    "ceil": math.ceil,
    "floor": math.floor,
    "trunc": math.trunc,
}
"""Arithmetic of lengths, by the names of Python's functions."""


def _move(*names: str) -> Callable[[Function], Function]:
    def enter(fn: Function) -> Function:
        MOVES.update(dict.fromkeys(names, fn))
        return fn

    return enter


@_move("view", "_unsafe_view", "reshape")
def _reshape(self: Array, size: Any = None, shape: Any = None) -> Array:
    return self.reshape(tuple(shape if size is None else size))


@_move("flatten")
def _flatten(self: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    first, last = start_dim % self.ndim, end_dim % self.ndim
    middle = math.prod(self.shape[first : last + 1])
    return self.reshape((*self.shape[:first], middle, *self.shape[last + 1 :]))


@_move("unflatten")
def _unflatten(self: Array, dim: int, sizes: Any) -> Array:
    at = dim % self.ndim
    return self.reshape((*self.shape[:at], *sizes, *self.shape[at + 1 :]))


@_move("permute")
def _permute(self: Array, dims: Any) -> Array:
    return self.transpose(tuple(dims))


@_move("transpose")
def _transpose(self: Array, dim0: int, dim1: int) -> Array:
    return self.swapaxes(dim0, dim1)


@_move("t", "numpy_T", "mT")
def _t(self: Array) -> Array:
    return self if self.ndim < 2 else self.swapaxes(-1, -2)


@_move("unsqueeze")
def _unsqueeze(self: Array, dim: int) -> Array:
    return np.expand_dims(self, dim)


@_move("squeeze")
def _squeeze(self: Array, dim: Any = None) -> Array:
    axes = axes_of(dim)
    if axes is None:
        return np.squeeze(self)
    return np.squeeze(self, axis=tuple(a for a in axes if self.shape[a] == 1))


@_move("expand")
def _expand(self: Array, size: Any, implicit: bool = False) -> Array:
    missing = len(size) - self.ndim
    lengths = [self.shape[i - missing] if n == -1 else n for i, n in enumerate(size)]
    return np.broadcast_to(self, lengths)


@_move("expand_as")
def _expand_as(self: Array, other: Any) -> Array:
    return np.broadcast_to(self, np.shape(other))


@_move("select")
def _select(self: Array, dim: int, index: int) -> Array:
    return np.asarray(self.take(index, axis=dim))


@_move("slice")
def _slice(
    self: Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Array:
    cut = [slice(None)] * self.ndim
    cut[dim] = slice(start, end, step)
    return self[tuple(cut)]


@_move("narrow")
def _narrow(self: Array, dim: int, start: int, length: int) -> Array:
    return self.take(range(start, start + length), axis=dim)


@_move("unbind")
def _unbind(self: Array, dim: int = 0) -> list[Array]:
    return list(np.moveaxis(self, dim, 0))


@_move("split", "split_with_sizes")
def _split(self: Array, split_size: Any = None, dim: int = 0, split_sizes: Any = None) -> Any:
    sizes = split_size if split_sizes is None else split_sizes
    if isinstance(sizes, int):
        sizes = [sizes] * -(-self.shape[dim] // sizes)
    return np.split(self, np.cumsum(sizes)[:-1], axis=dim)


@_move("chunk")
def _chunk(self: Array, chunks: int, dim: int = 0) -> Any:
    return _split(self, -(-self.shape[dim] // chunks), dim)


@_move("clone", "contiguous", "detach", "detach_", "alias", "lift_fresh_copy", "positive")
def _same(self: Array) -> Array:
    return self


@_move("dropout", "alpha_dropout", "feature_dropout")
def _dropout(input: Array, p: float, train: bool) -> Array:
    return input


@_move("repeat")
def _repeat(self: Array, repeats: Any) -> Array:
    return np.tile(self, tuple(repeats))


@_move("repeat_interleave")
def _repeat_interleave(self: Array, repeats: Any, dim: int | None = None, **_: Any) -> Array:
    return np.repeat(self, repeats, axis=dim)


@_move("flip")
def _flip(self: Array, dims: Any) -> Array:
    return np.flip(self, tuple(dims))


@_move("roll")
def _roll(self: Array, shifts: Any, dims: Any = ()) -> Array:
    return np.roll(self, shifts, axis=tuple(dims) or None)


@_move("pixel_shuffle")
def _pixel_shuffle(self: Array, upscale_factor: int) -> Array:
    n, c, h, w = self.shape
    r = upscale_factor
    parts = self.reshape(n, c // (r * r), r, r, h, w).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c // (r * r), h * r, w * r)


@_move("index_select")
def _index_select(self: Array, dim: int, index: Array) -> Array:
    return self.take(index, axis=dim)


@_move("index")
def _index(self: Array, indices: list[Array | None]) -> Array:
    return self[tuple(slice(None) if i is None else i for i in indices)]


@_move("gather")
def _gather(self: Array, dim: int, index: Array, sparse_grad: bool = False) -> Array:
    return np.take_along_axis(self, index, axis=dim)


@function("cat", "concat")
def _cat(tensors: list[Array], dim: int = 0) -> Array:
    kept = [t for t in tensors if t.shape != (0,)]
    return np.concatenate(kept, axis=dim)


@function("stack")
def _stack(tensors: list[Array], dim: int = 0) -> Array:
    return np.stack(tensors, axis=dim)


@function("pad", "constant_pad_nd")
def _pad(self: Array, pad: list[int], mode: str = "constant", value: float | None = None) -> Array:
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    edges = [*[(0, 0)] * (self.ndim - len(pairs)), *reversed(pairs)]
    # torch crops where padding is negative
    kept = (
        slice(max(-a, 0), size - max(-b, 0)) for (a, b), size in zip(edges, self.shape, strict=True)
    )
    self = self[tuple(kept)]
    edges = [(max(before, 0), max(after, 0)) for before, after in edges]
    if mode == "constant":
        return np.pad(self, edges, constant_values=value or 0)
    names = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return np.pad(self, edges, mode=names[mode])  # type: ignore[call-overload, no-any-return]


@function("to", "_to_copy", "type_as")
def _to(self: Array, dtype: Any = None, other: Any = None, **_: Any) -> Array:
    if other is not None:
        dtype = str(np.asarray(other).dtype)
    return np.asarray(as_dtype(self, dtype))


@function("triu")
def _triu(self: Array, diagonal: int = 0) -> Array:
    return np.triu(self, diagonal)


@function("tril")
def _tril(self: Array, diagonal: int = 0) -> Array:
    return np.tril(self, diagonal)


@function("ones", "new_ones", "ones_like")
def _ones(size: Any = None, self: Any = None, dtype: Any = None) -> Array:
    return _filled(size, self, 1, dtype)


@function("zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like")
def _zeros(size: Any = None, self: Any = None, dtype: Any = None) -> Array:
    return _filled(size, self, 0, dtype)


@function("full", "new_full", "full_like")
def _full(fill_value: Any, size: Any = None, self: Any = None, dtype: Any = None) -> Array:
    return _filled(size, self, fill_value, dtype)


def _filled(size: Any, like: Any, value: Any, dtype: Any) -> Array:
    shape = np.shape(like) if size is None else tuple(size)
    return np.full(shape, value, dtype=dtype or ("float32" if like is None else like.dtype))


@function("scalar_tensor")
def _scalar_tensor(s: Any, dtype: Any = None) -> Array:
    return np.asarray(s, dtype=dtype or "float32")


@function("arange")
def _arange(end: Any, start: Any = 0, step: Any = 1, dtype: Any = None) -> Array:
    is_whole = all(isinstance(v, int) for v in (end, start, step))
    return np.arange(start, end, step, dtype=dtype or ("int64" if is_whole else "float32"))


@function("sym_size")
def _sym_size(self: Any, dim: int) -> int:
    return int(np.shape(self)[dim])


@function("sym_numel", "numel")
def _sym_numel(self: Any) -> int:
    return int(np.size(self))


@function("upsample_nearest2d")
def _upsample_nearest2d(
    self: Any = None,
    output_size: Any = None,
    scale_factors: Any = None,
    input: Any = None,
    **_: Any,
) -> Array:
    out: Array = self if input is None else input
    for axis in (2, 3):
        length = out.shape[axis]
        if output_size is None:
            size = int(length * scale_factors[axis - 2])
            step = np.float32(1 / scale_factors[axis - 2])
        else:
            size = output_size[axis - 2]
            step = np.float32(length) / np.float32(size)
        if size == length:  # whatever the scale
            continue
        # as torch finds the sources, in fp32
        sources = np.floor(np.arange(size, dtype=np.float32) * step).astype(np.int64)
        out = out.take(np.minimum(sources, length - 1), axis=axis)
    return out


FUNCTIONS.update(MOVES)
