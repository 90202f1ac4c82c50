"""Learned step sizes: scale and offset of a quantizer as parameters with gradients.

LSQ (Esser et al., ICLR 2020, section 2.1): with v = x / s, dy/ds = rne(v) − v inside the range,
the lowest or highest code outside; the gradient is multiplied with 1 / sqrt(N · Qp) (section 2.2).
LSQ+ (Bhalgat et al., CVPRW 2020, section 3.1): dy/dβ = 0 inside the range, 1 outside.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuner import formats
from tuner.calibrators.base import finite_ranges
from tuner.kernels import (
    Grid,
    block_parameter,
    block_view,
    check_floats,
    clamped_steps,
    compute_dtype,
    from_rows,
    masked_gradient,
    snap,
    to_rows,
)
from tuner.qparams import fake_quantize, grid_of
from tuner.ranges import QParams, qparams_from_range, symmetric_zero_point
from tuner.schemes import TensorScheme

_SMALLEST = torch.finfo(torch.float32).tiny


def can_learn(scheme: TensorScheme) -> bool:
    """Return whether the scale of a scheme can be a parameter: blocks take theirs from the data."""
    fmt = formats.get(scheme.format)
    return fmt.scaled and fmt.block is None and fmt.kind != "function"


def positive_scale(scale: Tensor, scheme: TensorScheme) -> Tensor:
    """Return the scale that a parameter stands for: its magnitude, at least fp32's least normal.

    An optimizer may step through zero: the magnitude goes on. `power_of_two_scale` takes the next
    power of two.
    """
    dtype = torch.promote_types(scale.dtype, torch.float32)
    size = scale.detach().to(dtype).abs().clamp(min=_SMALLEST)
    if not scheme.power_of_two_scale:
        return size
    mantissa, exponent = torch.frexp(size)
    return torch.ldexp(torch.where(mantissa == 0.5, 0.5, 1.0).to(dtype), exponent)


def learned_qparams(scheme: TensorScheme, scale: Tensor, offset: Tensor | None = None) -> QParams:
    """Return what is quantized with: for an offset β the zero point clamp(rne(−β / s))."""
    step = positive_scale(scale, scheme)
    if offset is not None:
        codes = _zero(step, offset).round_().clamp_(*scheme.quant_range)
        return QParams(step, codes.to(torch.int32))
    zero = symmetric_zero_point(scheme) if formats.get(scheme.format).kind == "int" else 0
    return QParams(step, torch.full_like(step, zero, dtype=torch.int32) if zero else None)


def positive_levels(scheme: TensorScheme) -> float:
    """Return Qp: the codes above zero of a symmetric scheme, all steps of an affine one.

    Of a float it is the largest magnitude.
    """
    fmt = formats.get(scheme.format)
    if fmt.kind != "int":
        return fmt.largest
    low, high = scheme.quant_range
    if not scheme.symmetric:
        return float(high - low)
    zero = symmetric_zero_point(scheme)
    return float(high - zero or zero - low)


def initial_qparams(rows: Tensor, scheme: TensorScheme) -> QParams:
    """Return s = 2 · mean|x| / sqrt(Qp) of each row of `[rows, n]`, each `[rows]`; NaN is no value.

    An affine zero point is that of the row's range. Formats that are no integers get their scale
    from the largest magnitude. A row of zeros gets 1.
    """
    rows = rows.detach().to(compute_dtype(rows.dtype))
    ranged = qparams_from_range(*finite_ranges(rows, (0.0, 0.0)), scheme)
    if formats.get(scheme.format).kind != "int":
        return ranged
    finite = torch.isfinite(rows)
    mean = rows.abs().where(finite, 0.0).sum(-1) / finite.sum(-1).clamp(min=1)
    scale = 2 * mean / math.sqrt(positive_levels(scheme))
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return QParams(positive_scale(scale, scheme), ranged.zero_point)


@dataclass(frozen=True, eq=False)
class LearnedStep:
    """How one tensor is quantized by learned parameters.

    `count` is N, how many values share a scale: of a weight its values, of an activation those of
    one sample. `zero_point` is a fixed one, where no offset is learned.
    """

    scheme: TensorScheme
    count: float
    zero_point: Tensor | None = None

    @property
    def gradient_scale(self) -> float:
        """Return 1 / sqrt(N · Qp) (LSQ, section 2.2)."""
        return 1.0 / math.sqrt(max(self.count, 1.0) * positive_levels(self.scheme))

    def qparams(self, scale: Tensor, offset: Tensor | None = None) -> QParams:
        """Return what is quantized with."""
        found = learned_qparams(self.scheme, scale, offset)
        return found if self.zero_point is None else QParams(found.scale, self.zero_point)


def learned_fake_quantize(
    x: Tensor, scale: Tensor, offset: Tensor | None, step: LearnedStep
) -> Tensor:
    """Return fake_quantize(x), differentiable in x, scale and offset.

    Scale and offset `[]`, or shaped as the scheme's granularity has it. The gradient of x passes
    where it is inside the range. An offset whose zero point is out of the codes gets a gradient
    only towards them. Raises DataError if `x` is no float tensor.
    """
    check_floats(x, "quantization")
    with torch.no_grad():
        grid = grid_of(step.scheme, step.qparams(scale, offset), x)
    learned: Tensor = _Learned.apply(x, scale, offset, grid, step)  # type: ignore[no-untyped-call]
    return learned


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid, step: LearnedStep
    ) -> Tensor:
        return snap(x.detach(), grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, offset, ctx.grid, ctx.step = inputs
        ctx.has_offset = offset is not None
        ctx.save_for_backward(x, scale, *([offset] if ctx.has_offset else []))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *rest = ctx.saved_tensors
        offset = rest[0] if ctx.has_offset else None
        fmt = ctx.step.scheme.backward_format
        if fmt is not None:
            gradient = fake_quantize(gradient, TensorScheme(format=fmt))
        gradients = _Gradients(x, gradient, ctx.grid, ctx.step)
        of_x = torch.where(gradients.passes, gradient, 0.0) if ctx.needs_input_grad[0] else None
        of_scale = gradients.of_scale(scale, offset)
        of_offset = None if offset is None else gradients.of_offset(scale, offset)
        return of_x, of_scale, of_offset, None, None


class _Gradients:
    """The gradients of one quantizer, from what flows back into it."""

    def __init__(self, x: Tensor, gradient: Tensor, grid: Grid, step: LearnedStep) -> None:
        self.passes = masked_gradient(x, torch.ones_like(x), grid) != 0
        self._x, self._grid, self._step = x, grid, step
        self._gradient = gradient.to(compute_dtype(x.dtype))

    def of_scale(self, scale: Tensor, offset: Tensor | None) -> Tensor:
        """Sum g · (rne(v) − v) inside, g · code outside; the sign is that of the parameter."""
        x = self._view(self._x.to(self._gradient.dtype))
        v = x / self._fit(self._grid.scale)
        steps = self._view(clamped_steps(self._x, self._grid))
        shift = self._fit(self._shift(scale, offset))
        slope = torch.where(self._view(self.passes), steps - v, steps + shift)
        total = self._summed(slope * self._view(self._gradient), scale)
        return torch.where(scale < 0, -total, total)

    def of_offset(self, scale: Tensor, offset: Tensor) -> Tensor:
        """Sum g outside; out of the codes only what leads back to them."""
        total = self._summed(torch.where(self.passes, 0.0, self._gradient), offset)
        low, high = self._step.scheme.quant_range
        zero = _zero(positive_scale(scale, self._step.scheme), offset)
        total = torch.where(zero < low, total.clamp(min=0.0), total)
        return torch.where(zero > high, total.clamp(max=0.0), total)

    def _shift(self, scale: Tensor, offset: Tensor | None) -> Tensor | float:
        """Return what moves with an offset outside of the range: the zero point, where free."""
        if offset is None:
            return 0.0
        low, high = self._step.scheme.quant_range
        zero = _zero(positive_scale(scale, self._step.scheme), offset)
        free = (zero >= low) & (zero <= high)
        return torch.where(free, zero.round(), 0.0).to(self._gradient.dtype)

    def _summed(self, values: Tensor, like: Tensor) -> Tensor:
        """Sum over what shares a scale, times the gradient scale, in the shape of `like`."""
        shape, reach = tuple(self._x.shape), self._grid.granularity
        rows = to_rows(values.reshape(shape), reach)
        padded = rows.numel() != self._x.numel()
        sums = rows.nansum(-1) if padded else rows.sum(-1)
        total = from_rows(sums, shape, reach).reshape(like.shape)
        return (total * self._step.gradient_scale).to(like.dtype)

    def _view(self, values: Tensor) -> Tensor:
        return block_view(values, self._grid.granularity)

    def _fit(self, value: Tensor | float) -> Tensor | float:
        if not isinstance(value, Tensor):
            return value
        return block_parameter(value, tuple(self._x.shape), self._grid.granularity)


def _zero(step: Tensor, offset: Tensor) -> Tensor:
    return -offset.detach().to(step.dtype) / step
