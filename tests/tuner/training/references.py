"""The papers' equations, written out in float64 for one tensor and one scale."""

import torch
from torch import Tensor


def lsq(
    x: Tensor, scale: float, codes: tuple[int, int], gradient: Tensor, count: float, levels: float
) -> tuple[Tensor, Tensor, float]:
    """Return y, dL/dx and dL/ds of LSQ (Esser et al., ICLR 2020, equations 1, 2, 3 and 5).

    `codes` are −Qn and Qp, the gradient scale is 1 / sqrt(count · levels).
    """
    low, high = codes
    v = x.double() / scale
    y = torch.round(v.clamp(low, high)) * scale
    inside = (v >= low) & (v <= high)
    slope = torch.where(inside, torch.round(v) - v, torch.where(v < low, low, high).double())
    total = float((gradient.double() * slope).sum()) / (count * levels) ** 0.5
    return y, torch.where(inside, gradient.double(), 0.0), total


def lsq_plus(
    x: Tensor, scale: float, offset: float, codes: tuple[int, int], gradient: Tensor, count: float
) -> tuple[Tensor, Tensor, float, float]:
    """Return y, dL/dx, dL/ds and dL/dβ of LSQ+ (Bhalgat et al., CVPRW 2020, equations 2, 5, 6).

    β is taken at the nearest multiple of s, as an integer zero point has it.
    """
    low, high = codes
    beta = round(offset / scale) * scale
    v = (x.double() - beta) / scale
    y = torch.round(v.clamp(low, high)) * scale + beta
    inside = (v >= low) & (v <= high)
    slope = torch.where(inside, torch.round(v) - v, torch.where(v < low, low, high).double())
    factor = (count * (high - low)) ** -0.5
    of_scale = float((gradient.double() * slope).sum()) * factor
    of_offset = float(torch.where(inside, 0.0, gradient.double()).sum()) * factor
    return y, torch.where(inside, gradient.double(), 0.0), of_scale, of_offset
