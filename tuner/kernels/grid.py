"""Rounding to a uniform grid, in place over cache-sized chunks of one fresh output."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.granularity import Granularity
from tuner.kernels.layout import block_parameter, block_view

_CHUNK = 128 * 1024  # values a thread keeps in its cache
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, torch.float64, *_HALVES)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values `k · scale` with integer `low <= k <= high`.

    `scale`, `low` and `high` are numbers, or tensors shaped as `granularity` has it, on the device
    of the tensors to come and in the dtype of `compute_dtype`.
    """

    granularity: Granularity
    scale: float | Tensor
    low: float | Tensor
    high: float | Tensor


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
    """Return `clamp(rne(x / scale), low, high) · scale` in the dtype and memory format of `x`."""
    if x.dtype not in _HALVES and _is_small(x):
        return _snap_whole(x, grid)
    out = torch.empty_like(x)
    if out.stride() != x.stride():  # x has gaps or overlaps: go on from a dense copy
        x = out.copy_(x)
    for source, target, scale, low, high in _chunks(x, out, grid):
        if target.dtype in _HALVES:
            target.copy_(_half_levels(source, scale, low, high))
        else:
            clamp_steps(torch.div(source, scale, out=target).round_(), low, high).mul_(scale)
    return out


def _snap_whole(x: Tensor, grid: Grid) -> Tensor:
    scale, low, high = grid.scale, grid.low, grid.high
    if not isinstance(scale, Tensor) and not isinstance(low, Tensor):
        return clamp_steps(torch.div(x, scale).round_(), low, high).mul_(scale)
    steps, low, high = _steps(x, grid)
    return clamp_steps(steps.round_(), low, high).mul_(_fit(scale, x, grid)).reshape(x.shape)


def clamped_steps(x: Tensor, grid: Grid) -> Tensor:
    """Return `clamp(rne(x / scale), low, high)` in the shape of `x` and in `compute_dtype`."""
    steps, low, high = _steps(x, grid)
    return clamp_steps(steps.round_(), low, high).reshape(x.shape)


def inside(x: Tensor, grid: Grid) -> Tensor:
    """Return where `low <= x / scale <= high`: there the straight-through gradient is 1.

    The largest value of a tensor must count as inside although `amax / (amax / high)` may come out
    one rounding above `high`: the comparison allows for two roundings of fp32.
    """
    steps, low, high = _steps(x, grid)
    slack = 1 + 2.0**-22
    return ((steps >= low * slack) & (steps <= high * slack)).reshape(x.shape)


def _steps(x: Tensor, grid: Grid) -> tuple[Tensor, float | Tensor, float | Tensor]:
    scale, low, high = (_fit(p, x, grid) for p in (grid.scale, grid.low, grid.high))
    view = block_view(x, grid.granularity).to(compute_dtype(x.dtype))
    return torch.div(view, scale), low, high


def _half_levels(
    source: Tensor, scale: float | Tensor, low: float | Tensor, high: float | Tensor
) -> Tensor:
    levels = clamp_steps(source.to(torch.float32).div_(scale).round_(), low, high).mul_(scale)
    largest = torch.finfo(source.dtype).max
    return levels.clamp_(-largest, largest)


def clamp_steps(steps: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Clamp in place and return the same tensor; NaN stays."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # broadcasting, two binary operations are several times faster than one of three operands
        torch.maximum(steps, torch.as_tensor(low), out=steps)
        return torch.minimum(steps, torch.as_tensor(high), out=steps)
    return steps.clamp_(low, high)


def _fit(parameter: float | Tensor, x: Tensor, grid: Grid) -> float | Tensor:
    if isinstance(parameter, Tensor):
        return block_parameter(parameter, tuple(x.shape), grid.granularity)
    return parameter


_Chunk = tuple[Tensor, Tensor, float | Tensor, float | Tensor, float | Tensor]


def _chunks(x: Tensor, out: Tensor, grid: Grid) -> Iterator[_Chunk]:
    """Cut input, output and what broadcasts against them into chunks along the first axis."""
    parameters = [_fit(p, x, grid) for p in (grid.scale, grid.low, grid.high)]
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


def _narrow(value: float | Tensor, ndim: int, start: int, count: int) -> float | Tensor:
    if not isinstance(value, Tensor) or value.ndim < ndim or value.shape[0] == 1:
        return value
    return value.narrow(0, start, count)
