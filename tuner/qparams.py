"""Quantize, dequantize and fake-quantize a tensor; scale and zero point of the tensor itself."""

from typing import Any

import torch
from torch import Tensor

from tuner import formats
from tuner.calibrators import calibrated_range, calibrated_row_ranges
from tuner.errors import DataError, SchemeError
from tuner.granularity import PerTensor
from tuner.kernels import (
    Grid,
    block_parameter,
    block_view,
    check_floats,
    clamped_steps,
    compute_dtype,
    from_rows,
    inside,
    snap,
    to_rows,
)
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

    Non-finite values are left out. Raises DataError if `x` is not a floating-point tensor,
    SchemeError if it lacks the scheme's axis.
    """
    check_floats(x, "quantization")
    with torch.no_grad():
        low, high = _range(x.detach(), scheme)
        return qparams_from_range(low, high, scheme)


def fake_quantize(x: Tensor, scheme: TensorScheme, qparams: QParams | None = None) -> Tensor:
    """Return `x` rounded to the values that the scheme can hold, in the dtype of `x`.

    `y = (clamp(rne(x / s) + zp, qmin, qmax) − zp) · s`, with x / s in fp32 for half precision.
    Scale and zero point come from `x` when they are not given. NaN stays NaN, ±inf saturates. The
    gradient is passed straight through where `qmin <= x / s + zp <= qmax`, and is 0 elsewhere.
    Raises DataError if `x` is not a floating-point tensor, SchemeError if `qparams` do not fit it.
    """
    check_floats(x, "quantization")
    if qparams is None:
        qparams = compute_qparams(x, scheme)
    else:
        check_scale(qparams)
    return fake_quantize_on(x, grid_of(scheme, qparams, x))


def fake_quantize_on(x: Tensor, grid: Grid) -> Tensor:
    """Round to a grid; differentiable by the straight-through estimator where `x` asks for it."""
    if x.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(x, grid)  # type: ignore[no-any-return, no-untyped-call]
    return snap(x, grid)


def quantize(x: Tensor, scheme: TensorScheme, qparams: QParams) -> Tensor:
    """Return the integer codes `clamp(rne(x / s) + zp, qmin, qmax)` in `code_dtype`.

    Raises DataError if `x` is not a floating-point tensor or holds NaN, SchemeError if `qparams`
    do not fit it.
    """
    check_floats(x, "quantization")
    check_scale(qparams)
    with torch.no_grad():
        steps = clamped_steps(x.detach(), grid_of(scheme, qparams, x))
        if bool(steps.isnan().any()):
            raise DataError("NaN has no integer code: replace the NaN values before quantize()")
        fmt = formats.get(scheme.format)
        codes = steps.to(torch.int32)
        _shift(codes, scheme, qparams.zero_point, 1)
        return codes.to(code_dtype(fmt.bits, fmt.signed))


def dequantize(codes: Tensor, scheme: TensorScheme, qparams: QParams) -> Tensor:
    """Return `(code − zp) · s` in fp32 (fp64 if the scale is an fp64 tensor).

    Raises DataError if `codes` are not integers, SchemeError if `qparams` do not fit them.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise DataError(f"dequantize needs integer codes, got {codes.dtype}: use quantize() first")
    scale = qparams.scale
    double = isinstance(scale, Tensor) and scale.dtype == torch.float64
    steps = codes.to(torch.int32, copy=True)
    _shift(steps, scheme, qparams.zero_point, -1)
    values = steps.to(torch.float64 if double else torch.float32)
    view = block_view(values, scheme.granularity)
    view.mul_(_fit(scale, values, scheme))
    return values


def grid_of(scheme: TensorScheme, qparams: QParams, like: Tensor) -> Grid:
    """Return the grid of a scheme for tensors of the device and dtype of `like`."""
    dtype = compute_dtype(like.dtype)
    scale = _to(qparams.scale, like.device, dtype)
    low, high = (_to(bound, like.device, dtype) for bound in step_bounds(scheme, qparams))
    return Grid(scheme.granularity, scale, low, high)


def check_scale(qparams: QParams) -> None:
    """Raise SchemeError if a scale is not a finite number above 0."""
    scale = torch.as_tensor(qparams.scale)
    if not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise SchemeError(f"a scale must be a finite number above 0, got {qparams.scale}")


class _StraightThrough(torch.autograd.Function):
    """Round to a grid, with the gradient of the identity inside its range (Bengio et al. 2013)."""

    @staticmethod
    def forward(x: Tensor, grid: Grid) -> Tensor:
        return snap(x, grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Grid], output: Tensor) -> None:
        ctx.save_for_backward(inside(*inputs))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


def _range(x: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    x = x.to(compute_dtype(x.dtype)) if scheme.calibration != "minmax" else x
    granularity = scheme.granularity
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
    if device.type == "cpu" and (not isinstance(value, Tensor) or value.numel() == 1):
        return float(value)
    return torch.as_tensor(value, device=device).detach().to(dtype)


def _shift(codes: Tensor, scheme: TensorScheme, zero_point: Tensor | int | None, sign: int) -> None:
    if zero_point is not None:
        view = block_view(codes, scheme.granularity)
        view.add_(_fit(zero_point, codes, scheme), alpha=sign)


def _fit(value: Tensor | float, x: Tensor, scheme: TensorScheme) -> Tensor | float:
    if isinstance(value, Tensor):
        value = value.detach().to(x.device)
        return block_parameter(value, tuple(x.shape), scheme.granularity)
    return value
