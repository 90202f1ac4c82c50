"""Quantize, dequantize and fake-quantize a tensor; scale and zero point of the tensor itself."""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tuner import formats
from tuner.blocks import block_qparams, mx_scale_of
from tuner.calibrators import calibrated_range, calibrated_row_ranges
from tuner.errors import DataError, SchemeError, UnsupportedError
from tuner.granularity import PerTensor
from tuner.kernels import (
    Grid,
    block_parameter,
    block_view,
    check_floats,
    clamped_steps,
    codec_of,
    compute_dtype,
    from_rows,
    is_functional,
    is_transformed,
    masked_gradient,
    snap,
    snap_mx,
    to_rows,
)
from tuner.kernels.codecs import FunctionCodec
from tuner.packing import code_dtype
from tuner.ranges import QParams, qparams_from_range, step_bounds
from tuner.schemes import TensorScheme
from tuner.statistics import TensorStatistics

__all__ = [
    "QParams",
    "compute_qparams",
    "dequantize",
    "fake_quantize",
    "grid_of",
    "qparams_from_range",
    "quantize",
]


def compute_qparams(x: Tensor, scheme: TensorScheme) -> QParams:
    """Return scale and zero point of a tensor from its own values, by the scheme's calibration.

    Non-finite values are left out (an MX block that holds one has the scale NaN). Raises DataError
    if `x` is not a floating-point tensor, SchemeError if it lacks the scheme's axis.
    """
    check_floats(x, "quantization")
    x = x.detach()
    with torch.no_grad():
        fmt = formats.get(scheme.format)
        if not fmt.scaled:
            return QParams(1.0)
        if fmt.block is not None:
            return block_qparams(_at_least_1d(x), scheme)
        low, high = _range(x, scheme)
        return qparams_from_range(low, high, scheme)


def fake_quantize(x: Tensor, scheme: TensorScheme, qparams: QParams | None = None) -> Tensor:
    """Return `x` rounded to the values that the scheme can hold, in the dtype of `x`.

    Integers: `y = (clamp(rne(x / s) + zp, qmin, qmax) − zp) · s`; floats and codebooks: the nearest
    value to x / s, times s; x / s in fp32 for half precision. Scale and zero point come from `x`
    when they are not given. NaN stays NaN, ±inf saturates; floats keep −0. The gradient is passed
    straight through where `qmin <= x / s + zp <= qmax` (|x / s| up to the largest number of a
    float), and is 0 elsewhere; `backward_format` rounds it. torch.vmap and torch.func.grad follow.
    Raises DataError if `x` is not a floating-point tensor, SchemeError if `qparams` do not fit it;
    the backward pass raises UnsupportedError if `x` was changed in place meanwhile.
    """
    check_floats(x, "quantization")
    if x.ndim == 0 and formats.get(scheme.format).block is not None:
        return fake_quantize(x.reshape(1), scheme, qparams).reshape(())
    if qparams is not None:
        return fake_quantize_on(x, _GRIDS.grid(scheme, qparams, x))
    if not (x.requires_grad and torch.is_grad_enabled()) and (mx := mx_scale_of(scheme)):
        out = snap_mx(x, mx, codec_of(formats.get(scheme.format)))
        if out is not None:
            return out
    return fake_quantize_on(x, grid_of(scheme, compute_qparams(x, scheme), x))


def fake_quantize_on(x: Tensor, grid: Grid) -> Tensor:
    """Round to a grid; differentiable by the straight-through estimator where `x` asks for it."""
    if x.requires_grad and torch.is_grad_enabled():
        bounds = _bounds(grid) if is_functional() else ()
        return _StraightThrough.apply(x, grid, *bounds)  # type: ignore[no-any-return, no-untyped-call]
    return snap(x, grid)


def _bounds(grid: Grid) -> tuple[Tensor | float | None, ...]:
    return grid.scale, grid.low, grid.high, grid.inverse


def _with_bounds(grid: Grid, bounds: tuple[Tensor | float | None, ...], like: Tensor) -> Grid:
    """Return the grid with these bounds, where there are any: with numbers where no transform is.

    torch.func.grad calls what is inside with the plain tensors, and so with the native kernels.
    """
    if not bounds:
        return grid
    dtype = compute_dtype(like.dtype)
    scale, low, high, inverse = (b if b is None else _to(b, like.device, dtype) for b in bounds)
    assert scale is not None
    assert low is not None
    assert high is not None
    return replace(grid, scale=scale, low=low, high=high, inverse=inverse)


def quantize(x: Tensor, scheme: TensorScheme, qparams: QParams) -> Tensor:
    """Return the codes of the values that `fake_quantize` rounds to, in `code_dtype`.

    Integers: `clamp(rne(x / s) + zp, qmin, qmax)`. Floats: the bits of the format, the sign on top.
    Codebooks: the index of the entry. Raises DataError if `x` is not a floating-point tensor, holds
    a NaN that the format has no code for, or if the format is a function; SchemeError if `qparams`
    do not fit it.
    """
    check_floats(x, "quantization")
    fmt = formats.get(scheme.format)
    if x.ndim == 0 and fmt.block is not None:
        return quantize(x.reshape(1), scheme, qparams).reshape(())
    check_qparams(scheme, qparams)
    with torch.no_grad():
        grid = grid_of(scheme, qparams, x)
        codes = grid.codec.encode(clamped_steps(x.detach(), grid))
        _shift(codes, scheme, qparams.zero_point, 1)
        if fmt.kind == "int":
            codes.clamp_(*scheme.quant_range)  # fp32 cannot hold 2^31 − 1
        return codes.to(code_dtype(fmt.bits, fmt.signed and fmt.kind == "int"))


def dequantize(codes: Tensor, scheme: TensorScheme, qparams: QParams) -> Tensor:
    """Return the values of codes: `(code − zp) · s` in fp32 (fp64 if the scale is an fp64 tensor).

    Raises DataError if `codes` are not integers, SchemeError if `qparams` do not fit them.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise DataError(f"dequantize needs integer codes, got {codes.dtype}: use quantize() first")
    fmt = formats.get(scheme.format)
    if codes.ndim == 0 and fmt.block is not None:
        return dequantize(codes.reshape(1), scheme, qparams).reshape(())
    scale = qparams.scale
    double = isinstance(scale, Tensor) and scale.dtype == torch.float64
    steps = codes.to(torch.int64, copy=True)
    _shift(steps, scheme, qparams.zero_point, -1)
    values = codec_of(fmt).decode(steps).to(torch.float64 if double else torch.float32)
    view = block_view(values, scheme.reach)
    view.mul_(_fit(whole_scale(qparams), values, scheme))
    return values


def grid_of(scheme: TensorScheme, qparams: QParams, like: Tensor) -> Grid:
    """Return the grid of a scheme for tensors of the device and dtype of `like`."""
    fmt = formats.get(scheme.format)
    dtype = compute_dtype(like.dtype)
    scale = _to(whole_scale(qparams), like.device, dtype)
    ends = step_bounds(scheme, qparams)
    low, high = (_to(bound, like.device, dtype) for bound in ends)
    inverse = None
    if qparams.global_scale is not None:  # as hardware has it: x · ((1 / global) / scale)
        inverse = _to(
            1.0 / torch.as_tensor(qparams.global_scale) / qparams.scale, like.device, dtype
        )
    backward = fmt.backward, scheme.backward_format
    return Grid(scheme.reach, scale, low, high, codec_of(fmt), inverse, *backward)


def whole_scale(qparams: QParams) -> Tensor | float:
    """Return what a value of the format is multiplied with: the scale, times a global one."""
    if qparams.global_scale is None:
        return qparams.scale
    return qparams.scale * qparams.global_scale


def check_qparams(scheme: TensorScheme, qparams: QParams) -> None:
    """Raise SchemeError for a scale that is not finite and above 0, or a zero point out of range.

    The scale of an MX block may be NaN: so is the block.
    """
    scale = torch.as_tensor(whole_scale(qparams))
    is_nan = scale.isnan() if mx_scale_of(scheme) else torch.zeros_like(scale, dtype=torch.bool)
    if not bool(((scale > 0) & (scale < torch.inf) | is_nan).all()):
        raise SchemeError(f"a scale must be a finite number above 0, got {qparams.scale}")
    if qparams.zero_point is None:
        return
    zero_point = torch.as_tensor(qparams.zero_point)
    if formats.get(scheme.format).kind != "int":
        if bool((zero_point != 0).any()):
            raise SchemeError(f"{scheme.format} has no zero point, got {qparams.zero_point}")
        return
    low, high = scheme.quant_range
    if not bool(((zero_point >= low) & (zero_point <= high)).all()):
        raise SchemeError(
            f"a zero point must be one of the codes {low} to {high} of the scheme, "
            f"got {qparams.zero_point}"
        )


class _Grids:
    """The grid that each QParams gave last: parameters come again with every batch.

    One value is compared, tensors of several are known by address and version; all else is new.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[QParams, tuple[TensorScheme, tuple[object, ...], Grid]]
        self._known = WeakKeyDictionary()

    def grid(self, scheme: TensorScheme, qparams: QParams, like: Tensor) -> Grid:
        """Return the grid for tensors like this one; raises SchemeError as `check_qparams` does."""
        if is_transformed():
            return grid_of(scheme, qparams, like)
        parts = qparams.scale, qparams.zero_point, qparams.global_scale
        state = like.device, like.dtype, *map(_identity, parts)
        known = self._known.get(qparams)
        if known is not None and known[0] is scheme and known[1] == state:
            return known[2]
        check_qparams(scheme, qparams)
        grid = grid_of(scheme, qparams, like)
        self._known[qparams] = scheme, state, grid
        return grid


def _identity(value: Tensor | float | None) -> object:
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu and value.numel() == 1:
        return value.item()
    if value.is_inference():
        return object()  # has no version
    return value.data_ptr(), value._version


_GRIDS = _Grids()


class _StraightThrough(torch.autograd.Function):
    """Round to a grid, with the gradient of the identity inside its range (Bengio et al. 2013).

    Under a transform of torch.func the `bounds` of the grid come as arguments of their own: what it
    does not see it cannot follow.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, grid: Grid, *bounds: Tensor | float | None) -> Tensor:
        return snap(x, _with_bounds(grid, bounds, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.grid, *bounds = inputs
        ctx.bounds = [None if isinstance(bound, Tensor) else bound for bound in bounds]
        ctx.places = [i for i, bound in enumerate(bounds) if isinstance(bound, Tensor)]
        ctx.save_for_backward(x, *(bounds[i] for i in ctx.places))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = _saved(ctx)
        bounds = list(ctx.bounds)
        for place, bound in zip(ctx.places, saved, strict=True):
            bounds[place] = bound
        passed = _gradient(x, gradient, _with_bounds(ctx.grid, tuple(bounds), x))
        return passed, None, *(None for _ in bounds)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise UnsupportedError(
            "a tensor that was fake-quantized was changed in place before the backward pass, which "
            "needs it as it was, to know where it was clamped: change a copy of it (x = x * 2 for "
            "x.mul_(2), F.relu(x) for F.relu_(x)), or leave the op that reads it in float"
        ) from error
    return tensors


def _gradient(x: Tensor, gradient: Tensor, grid: Grid) -> Tensor:
    if grid.backward is not None:
        return grid.backward(gradient)
    if grid.backward_format is not None:
        with torch.no_grad():
            gradient = fake_quantize(gradient, TensorScheme(format=grid.backward_format))
    if isinstance(grid.codec, FunctionCodec):
        return gradient
    return masked_gradient(x, gradient, grid)


def _at_least_1d(x: Tensor) -> Tensor:
    return x.reshape(1) if x.ndim == 0 else x


def _range(x: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    x = x.to(compute_dtype(x.dtype)) if scheme.calibration != "minmax" else x
    granularity = scheme.reach
    if isinstance(granularity, PerTensor) and scheme.calibration != "minmax":
        statistics = TensorStatistics()
        statistics.update(x)
        low, high = calibrated_range(statistics, scheme)
        return x.new_tensor(low), x.new_tensor(high)
    ranges = calibrated_row_ranges(to_rows(x, granularity), scheme)
    low_rows, high_rows = (from_rows(end, tuple(x.shape), granularity) for end in ranges)
    return low_rows, high_rows


def _to(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor | float:
    """Move a parameter; one value for all becomes a number on the CPU.

    On an accelerator it stays a tensor: division by a number is a multiplication by its
    reciprocal there, which is not the true division that the codes are defined by.
    """
    is_hidden = isinstance(value, Tensor) and is_transformed()
    is_one = not isinstance(value, Tensor) or value.numel() == 1
    if device.type == "cpu" and is_one and not is_hidden:
        return float(value)
    return torch.as_tensor(value, device=device).detach().to(dtype)


def _shift(codes: Tensor, scheme: TensorScheme, zero_point: Tensor | int | None, sign: int) -> None:
    if zero_point is not None:
        view = block_view(codes, scheme.reach)
        view.add_(_fit(zero_point, codes, scheme), alpha=sign)


def _fit(value: Tensor | float, x: Tensor, scheme: TensorScheme) -> Tensor | float:
    if isinstance(value, Tensor):
        value = value.detach().to(x.device)
        return block_parameter(value, tuple(x.shape), scheme.reach)
    return value
