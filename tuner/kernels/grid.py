"""Rounding to the grid of a format: natively, or in torch over cache-sized chunks."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.granularity import Granularity
from tuner.kernels.buffers import POOL
from tuner.kernels.codecs import Bound, Codec, FunctionCodec, IntegerCodec
from tuner.kernels.fused import FusedGrid, fusible
from tuner.kernels.layout import block_parameter, block_view
from tuner.kernels.native import Bounds, NativeGrid, is_plain, is_transformed, takes

_WHOLE = 128 * 1024  # values that are computed in one piece
_CHUNK = 192 * 1024  # values: more leave the cache, less cost more in calls than they save
_CHUNK_IN_PLACE = 2 * _CHUNK  # where no buffers stand beside the result
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
        bounds = Bounds(self.scale, self.low, self.high, self.inverse)
        return NativeGrid(self.granularity, bounds, self.codec)

    @cached_property
    def fused(self) -> FusedGrid:
        """The grid as the fused kernels of accelerators take it."""
        bounds = Bounds(self.scale, self.low, self.high, self.inverse)
        return FusedGrid(self.granularity, bounds, self.codec)

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
    kernels = _kernels(x, grid)
    out = None if kernels is None else kernels.snap(x)
    return _snap_in_torch(x, grid) if out is None else out


def snap_rows(x: Tensor, grid: Grid) -> Tensor:
    """Return `snap(x.contiguous())` of a tensor whose rows have gaps between them, in one pass."""
    out = grid.native.snap_rows(x) if takes(x) else None
    return snap(x.contiguous(), grid) if out is None else out


def _kernels(x: Tensor, grid: Grid) -> NativeGrid | FusedGrid | None:
    """Return what computes in one pass on the device of a tensor, None if nothing does."""
    if takes(x):
        return grid.native
    return grid.fused if fusible(x) else None


def _snap_in_torch(x: Tensor, grid: Grid) -> Tensor:
    if _is_whole(x) or isinstance(grid.codec, FunctionCodec):  # which may look at the whole tensor
        steps, low, high = _steps(x, grid)
        levels = grid.codec.round_(steps, low, high).mul(_fit(grid.scale, x, grid.granularity))
        levels = _stored(levels, x.dtype)
        # never a view: what a function of autograd returns could then not be changed in place
        return levels if levels.shape == x.shape else levels.reshape(x.shape).clone()
    out = POOL.empty_like(x)
    if out.stride() != x.stride():  # x has gaps or overlaps: go on from a dense copy
        x = out.copy_(x)
    parameters = grid.scale, grid.low, grid.high, grid.inverse
    length = _CHUNK_IN_PLACE if isinstance(grid.codec, IntegerCodec) else _CHUNK
    for (source, target), bounds in _chunks((x, out), parameters, grid.granularity, length):
        scale, low, high, inverse = bounds
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
    kernels = _kernels(x, grid)
    masked = None if kernels is None else kernels.mask(x, gradient, grid.inside)
    if masked is not None:
        return masked
    ends = inside(grid, compute_dtype(x.dtype))
    if _is_whole(x) or not x.is_contiguous() or not is_plain(gradient):
        low, high = (_fit(end, x, grid.granularity) for end in ends)
        passes = _between(block_view(x, grid.granularity), low, high)
        return torch.where(passes.reshape(x.shape), gradient, 0.0)
    gradient, out = gradient.contiguous(), POOL.empty_like(gradient)
    zero = gradient.new_zeros(())
    for parts, bounds in _chunks((x, gradient, out), ends, grid.granularity):
        values, upstream, target = parts
        torch.where(_between(values, *bounds), upstream, zero, out=target)
    return out


def _between(x: Tensor, low: Bound, high: Bound) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    return (x >= low).logical_and_(x <= high)


def _steps(x: Tensor, grid: Grid) -> tuple[Tensor, Bound, Bound]:
    bounds = grid.scale, grid.low, grid.high
    scale, low, high = (_fit(bound, x, grid.granularity) for bound in bounds)
    view = block_view(x, grid.granularity).to(compute_dtype(x.dtype))
    if grid.inverse is None:
        return torch.div(view, scale), low, high
    return view * _fit(grid.inverse, x, grid.granularity), low, high


def _fit(parameter: Bound, x: Tensor, granularity: Granularity) -> Bound:
    if isinstance(parameter, Tensor):
        return block_parameter(parameter, tuple(x.shape), granularity)
    return parameter


def _chunks(
    tensors: tuple[Tensor, ...],
    parameters: tuple[Bound | None, ...],
    granularity: Granularity,
    values: int = _CHUNK,
) -> Iterator[tuple[Any, Any]]:
    """Cut tensors of one shape, and what broadcasts against them, along the first axis.

    A chunk has so many values for each thread.
    """
    values *= torch.get_num_threads()
    x = tensors[0]
    fitted = [None if p is None else _fit(p, x, granularity) for p in parameters]
    if all(not isinstance(p, Tensor) or p.ndim == 0 for p in fitted):
        flat = (t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in tensors)
        pieces = (t.split(values) for t in flat)
        yield from zip(zip(*pieces, strict=True), itertools.repeat(fitted), strict=False)
        return
    tensors = tuple(block_view(t, granularity) for t in tensors)
    ndim, size = tensors[0].ndim, tensors[0].shape[0]
    length = max(1, values // max(tensors[0][:1].numel(), 1))
    for start in range(0, size, length):
        count = min(length, size - start)
        yield (
            [t.narrow(0, start, count) for t in tensors],
            [_narrow(p, ndim, start, count) for p in fitted],
        )


def _is_whole(x: Tensor) -> bool:
    """Whether to compute in one piece: `x` fits the cache, is on an accelerator, or transformed."""
    return x.numel() <= _WHOLE or not x.is_cpu or is_transformed()


def _narrow(value: Bound | None, ndim: int, start: int, count: int) -> Bound | None:
    if not isinstance(value, Tensor) or value.ndim < ndim or value.shape[0] == 1:
        return value
    return value.narrow(0, start, count)
