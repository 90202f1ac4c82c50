"""Rounding to the grid of a format: natively, or in torch over cache-sized chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.granularity import Granularity
from tuner.kernels.buffers import POOL
from tuner.kernels.codecs import Bound, Codec, FunctionCodec
from tuner.kernels.layout import block_parameter, block_view
from tuner.kernels.native import NativeGrid, takes

_CHUNK = 128 * 1024  # values: less, and the calls cost more than the cache saves
_SLACK = 2.0**-22  # two roundings of fp32
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, torch.float64, *_HALVES)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values `v · scale` with `low <= v <= high`, v being a value of the codec's format.

    `scale`, `low` and `high` are numbers, or tensors shaped as `granularity` has it, on the device
    of the tensors to come and in the dtype of `compute_dtype`. Where `inverse` is given, values
    are multiplied with it instead of divided by the scale. `backward` turns gradients, or
    `backward_format` names what they are rounded to.
    """

    granularity: Granularity
    scale: Bound
    low: Bound
    high: Bound
    codec: Codec
    inverse: Bound | None = None
    backward: Callable[[Tensor], Tensor] | None = None
    backward_format: str | None = None

    @cached_property
    def native(self) -> NativeGrid:
        """The grid as the native kernels take it."""
        bounds = self.scale, self.low, self.high
        return NativeGrid(self.granularity, bounds, self.codec)

    @cached_property
    def inside(self) -> tuple[Bound, Bound]:
        """The ends that `inside` gives for x in fp32 or half precision."""
        return inside(self, torch.float32)


def inside(grid: Grid, dtype: torch.dtype) -> tuple[Bound, Bound]:
    """Return the least and the largest x with a gradient: `low · scale` and `high · scale`.

    The largest value of a tensor must count as inside although `amax / (amax / high)` may come out
    one rounding above `high`: the bounds allow for two roundings of fp32. ±inf is outside.
    """
    low, high = (_double(end) for end in (grid.low, grid.high))
    low, high = low - abs(low) * _SLACK, high + abs(high) * _SLACK
    if grid.inverse is None:
        scale = _double(grid.scale)
        return _finite(low * scale, dtype), _finite(high * scale, dtype)
    inverse = _double(grid.inverse)
    return _finite(low / inverse, dtype), _finite(high / inverse, dtype)


def _double(value: Bound) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _finite(end: Bound, dtype: torch.dtype) -> Bound:
    largest = torch.finfo(dtype).max
    if isinstance(end, Tensor):
        return end.clamp(-largest, largest).to(dtype)
    return max(-largest, min(end, largest))


def check_floats(x: object, purpose: str) -> None:
    """Raise DataError unless `x` is a tensor of 16, 32 or 64 bit floats."""
    if not isinstance(x, Tensor):
        raise DataError(f"{purpose} needs a floating-point tensor, got a {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise DataError(f"{purpose} needs a floating-point tensor, got {x.dtype}: use x.float()")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which x / scale is computed: fp32 for half precision, else its own."""
    return torch.float32 if dtype in _HALVES else dtype


def snap(x: Tensor, grid: Grid) -> Tensor:
    """Return `codec(x / scale) · scale` in the dtype and memory format of `x`.

    For integers that is `clamp(rne(x / scale), low, high) · scale`.
    """
    if grid.inverse is None and takes(x):
        out = grid.native.snap(x)
        if out is not None:
            return out
    return _snap_in_torch(x, grid)


def _snap_in_torch(x: Tensor, grid: Grid) -> Tensor:
    if _is_small(x) or isinstance(grid.codec, FunctionCodec):  # which may look at the whole tensor
        steps, low, high = _steps(x, grid)
        levels = grid.codec.round_(steps, low, high).mul(_fit(grid.scale, x, grid))
        return _stored(levels, x.dtype).reshape(x.shape)
    out = POOL.empty_like(x)
    if out.stride() != x.stride():  # x has gaps or overlaps: go on from a dense copy
        x = out.copy_(x)
    for source, target, scale, low, high, inverse in _chunks(x, out, grid):
        if target.dtype in _HALVES:
            levels = _rounded(source.to(torch.float32), grid.codec, scale, low, high, inverse)
            target.copy_(_stored(levels, target.dtype))
        else:
            _rounded(source, grid.codec, scale, low, high, inverse, target)
    return out


def _stored(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to half precision: what is too large saturates, inf (of an overflow) stays."""
    if dtype not in _HALVES:
        return levels
    largest = torch.finfo(dtype).max
    return torch.where(levels.isinf(), levels, levels.clamp(-largest, largest)).to(dtype)


def _rounded(
    source: Tensor,
    codec: Codec,
    scale: Bound,
    low: Bound,
    high: Bound,
    inverse: Bound | None,
    out: Tensor | None = None,
) -> Tensor:
    steps = torch.div(source, scale, out=out) if inverse is None else source * inverse
    return torch.mul(codec.round_(steps, low, high), scale, out=steps if out is None else out)


def clamped_steps(x: Tensor, grid: Grid) -> Tensor:
    """Return `codec(x / scale)` in the shape of `x` and in `compute_dtype`."""
    steps, low, high = _steps(x, grid)
    return grid.codec.round_(steps, low, high).reshape(x.shape)


def masked_gradient(x: Tensor, gradient: Tensor, grid: Grid) -> Tensor:
    """Return the gradient where `low <= x / scale <= high`, and 0 elsewhere."""
    if takes(x):
        masked = grid.native.mask(x, gradient, grid.inside)
        if masked is not None:
            return masked
    dtype = compute_dtype(x.dtype)
    low, high = (_fit(end, x, grid) for end in inside(grid, dtype))
    view = block_view(x, grid.granularity).to(dtype)
    passes = (view >= low) & (view <= high)
    return torch.where(passes.reshape(x.shape), gradient, 0.0)


def _steps(x: Tensor, grid: Grid) -> tuple[Tensor, Bound, Bound]:
    scale, low, high = (_fit(p, x, grid) for p in (grid.scale, grid.low, grid.high))
    view = block_view(x, grid.granularity).to(compute_dtype(x.dtype))
    if grid.inverse is None:
        return torch.div(view, scale), low, high
    return view * _fit(grid.inverse, x, grid), low, high


def _fit(parameter: Bound, x: Tensor, grid: Grid) -> Bound:
    if isinstance(parameter, Tensor):
        return block_parameter(parameter, tuple(x.shape), grid.granularity)
    return parameter


_Chunk = tuple[Tensor, Tensor, Bound, Bound, Bound, Bound | None]


def _chunks(x: Tensor, out: Tensor, grid: Grid) -> Iterator[_Chunk]:
    """Cut input, output and what broadcasts against them into chunks along the first axis."""
    bounds = grid.scale, grid.low, grid.high, grid.inverse
    parameters = [None if p is None else _fit(p, x, grid) for p in bounds]
    if all(not isinstance(p, Tensor) or p.ndim == 0 for p in parameters):
        x, out = (t.as_strided((t.numel(),), (1,)) for t in (x, out))
    else:
        x, out = (block_view(t, grid.granularity) for t in (x, out))
    length = _chunk_length(x)
    if length >= x.shape[0]:
        yield x, out, *parameters  # type: ignore[misc]
        return
    for start in range(0, x.shape[0], length):
        count = min(length, x.shape[0] - start)
        tensors = (x, out, *parameters)
        yield tuple(_narrow(t, x.ndim, start, count) for t in tensors)  # type: ignore[misc]


def _is_small(x: Tensor) -> bool:
    """Whether chunks would not help: `x` fits the cache, or is on an accelerator."""
    return x.numel() <= _CHUNK or not x.is_cpu or torch.compiler.is_compiling()


def _chunk_length(x: Tensor) -> int:
    if _is_small(x):
        return x.shape[0]
    values = x[:1].numel()
    return max(1, _CHUNK * torch.get_num_threads() // max(values, 1))


def _narrow(value: Bound | None, ndim: int, start: int, count: int) -> Bound | None:
    if not isinstance(value, Tensor) or value.ndim < ndim or value.shape[0] == 1:
        return value
    return value.narrow(0, start, count)
