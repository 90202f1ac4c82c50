"""Scale and zero point, and how they follow from a range of values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner import formats
from tuner.kernels import is_transformed
from tuner.schemes import TensorScheme


@dataclass(frozen=True, eq=False)
class QParams:
    """Scale and zero point of a tensor: `value = (code − zero_point) · scale`.

    Numbers, or tensors in the shape that the scheme's granularity gives: per-tensor `[]`,
    per-channel `[C]`, per-group the tensor's shape with its axis replaced by `ceil(n / size)`,
    per-token the tensor's shape with a last axis of 1. No zero point means 0. NVFP4 has a
    `global_scale` beside the scales of its blocks: the product of both is what counts. Static
    groups of an op's input or output are `[ceil(n / size)]`, shared by all other axes.
    """

    scale: Tensor | float
    zero_point: Tensor | int | None = None
    global_scale: Tensor | float | None = None


def symmetric_zero_point(scheme: TensorScheme) -> int:
    """Return the zero point of a symmetric scheme: 0 if signed, 2^(bits−1) if not.

    Where the scheme's range of codes does not hold it, the middle of that range.
    """
    fmt = formats.get(scheme.format)
    low, high = scheme.quant_range
    zero_point = 0 if fmt.signed else 2 ** (fmt.bits - 1)
    return zero_point if low <= zero_point <= high else (low + high + 1) // 2


def qparams_from_range(low: Tensor, high: Tensor, scheme: TensorScheme) -> QParams:
    """Return scale and zero point, elementwise, for values from `low` to `high`.

    The range is extended to hold 0. Symmetric: `s = max(|low|, |high|) / n` with n the number of
    codes on the shorter side of the zero point (the longer, if the shorter has none). Affine:
    `s = (high − low) / (qmax − qmin)`, `zero_point = clamp(qmin − rne(low / s), qmin, qmax)`.
    Other formats: `s = max(|low|, |high|) / m`, m their largest magnitude; those without a scale
    (fp16, bf16, fp32) get 1. Only a range of exactly 0 is special: its scale is 1.
    """
    dtype = torch.promote_types(low.dtype, torch.float32)
    fmt = formats.get(scheme.format)
    if not fmt.scaled:
        return QParams(1.0)
    low, high = low.double(), high.double()
    if fmt.kind != "int":
        span = torch.maximum(-low, high)
        scale = _scale(span, fmt.largest, scheme)
        return QParams(_in_reach(scale, dtype, fmt.largest, fmt.largest))
    if scheme.symmetric:
        return _symmetric(torch.maximum(-low, high), dtype, scheme)
    return _affine(low.clamp(max=0.0), high.clamp(min=0.0), dtype, scheme)


def _symmetric(amax: Tensor, dtype: torch.dtype, scheme: TensorScheme) -> QParams:
    codes = scheme.quant_range
    zero = symmetric_zero_point(scheme)
    sides = codes[1] - zero, zero - codes[0]
    scale = _scale(amax, min(sides) or max(sides), scheme)
    scale = _in_reach(scale, dtype, codes[1] - codes[0], max(sides))
    zero_point = torch.full_like(scale, zero, dtype=torch.int32) if zero else None
    return QParams(scale, zero_point)


def _affine(low: Tensor, high: Tensor, dtype: torch.dtype, scheme: TensorScheme) -> QParams:
    codes = scheme.quant_range
    levels = codes[1] - codes[0]
    scale = _scale(high - low, levels, scheme)
    # low · levels / span instead of low / s keeps ties such as −127.5 exact
    steps = low / scale if scheme.power_of_two_scale else low * levels / (high - low)
    steps = steps.round_().nan_to_num_(0.0)  # 0 / 0: a range of exactly 0
    zero_point = (codes[0] - steps).clamp_(*codes).to(torch.int32)
    sides = torch.maximum(zero_point - codes[0], codes[1] - zero_point)
    return QParams(_in_reach(scale, dtype, levels, sides), zero_point)


def step_bounds(
    scheme: TensorScheme, qparams: QParams
) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """Return how far `x / scale` may go: `qmin − zero_point` to `qmax − zero_point` for integers.

    For other formats it is from their smallest value to their largest.
    """
    fmt = formats.get(scheme.format)
    if fmt.kind != "int":
        return fmt.ends
    low, high = scheme.quant_range
    zero_point = qparams.zero_point
    if isinstance(zero_point, Tensor):
        return low - zero_point, high - zero_point
    zero = zero_point or 0
    return float(low - zero), float(high - zero)


def _scale(span: Tensor, levels: float, scheme: TensorScheme) -> Tensor:
    scale = span / levels
    if scheme.power_of_two_scale:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.where(mantissa == 0.5, 0.5, 1.0).double(), exponent)
        scale = torch.where(span == 0, 0.0, scale)
    return scale


def _in_reach(scale: Tensor, dtype: torch.dtype, span: float, largest: Tensor | float) -> Tensor:
    """Keep the scale above 0 in `dtype` and every level finite; let a scale of 0 become 1.

    `largest` is the largest magnitude in units of the scale, `span` at least as much.
    """
    most_finite = torch.finfo(dtype).max * (1 - 2.0**-22)
    smallest = torch.finfo(dtype).tiny
    if scale.numel() and not is_transformed():
        least, most = (end.item() for end in torch.aminmax(scale))
        if smallest <= least and most * span <= most_finite:
            return scale.to(dtype)
    quantum = smallest * torch.finfo(dtype).eps  # of subnormal numbers: rounded up, never to 0
    scale = torch.where(scale < smallest, (scale / quantum).ceil() * quantum, scale)
    limit = torch.as_tensor(most_finite / largest, dtype=scale.dtype, device=scale.device)
    return torch.where(scale == 0, 1.0, torch.minimum(scale, limit)).to(dtype)
