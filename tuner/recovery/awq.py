"""Activation-aware scales: columns that large inputs meet are made larger before they are rounded.

Lin et al., AWQ, MLSys 2024 (arXiv 2306.00978), section 3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tuner.errors import SchemeError
from tuner.qparams import fake_quantize
from tuner.recovery.rounding_matrix import as_matrix, checked_second, output_errors
from tuner.recovery.scales import LARGEST_SCALE
from tuner.schemes import TensorScheme

_GRID = 20


@torch.no_grad()
def awq_scales(
    weights: Sequence[Tensor],
    second: Tensor,
    scheme: TensorScheme,
    mean_abs: Tensor | None = None,
    *,
    axis: int = 0,
    grid: int = _GRID,
) -> tuple[Tensor, float]:
    """Return what each input channel is divided by and the weights' columns multiplied with, and α.

    `s = E|x|^α`, divided by √(max s · min s), with α of 0, 1/grid, … 1: the one of the least output
    error tr(ΔW H ΔWᵀ), ΔW = Q(W diag(s)) diag(s)⁻¹ − W, summed over all weights. At α = 0 all
    scales are 1, so the error is never above that of plain rounding.

    Args:
        weights: all weights `[out, in]` (`[in, out]` with `axis` 1) that read this input.
        second: E[x xᵀ] `[1, in, in]`.
        scheme: how each weight is quantized.
        mean_abs: E|x| `[in]` or `[1, in]`; by default √E[x²]. A channel that is 0 gets the scale 1.

    Raises SchemeError without weights, or where moments and weights do not fit each other.
    """
    if not weights or any(weight.ndim != 2 for weight in weights) or len(second) != 1 or grid < 1:
        raise SchemeError(
            "scales need weights [out, in], moments [1, in, in] and a grid of 1 or more, got "
            f"weights of {[list(weight.shape) for weight in weights]}, moments of "
            f"{list(second.shape)} and a grid of {grid}"
        )
    for weight in weights:
        checked_second(weight, second, axis)
    magnitude = second[0].diagonal().sqrt() if mean_abs is None else mean_abs.detach().reshape(-1)
    best, best_ratio, least = torch.ones_like(magnitude), 0.0, torch.inf
    for step in range(grid + 1):
        ratio = step / grid
        scales = _scales(magnitude, ratio)
        error = sum(_error(weight, second, scheme, scales, axis) for weight in weights)
        if error < least:
            best, best_ratio, least = scales, ratio, error
    return best, best_ratio


def _scales(magnitude: Tensor, ratio: float) -> Tensor:
    live = (magnitude > 0) & magnitude.isfinite()
    scales = magnitude**ratio
    if bool(live.any()):
        scales = scales / (scales[live].max() * scales[live].min()).sqrt()
    return torch.where(live, scales.clamp(1 / LARGEST_SCALE, LARGEST_SCALE), 1.0)


def _error(
    weight: Tensor, second: Tensor, scheme: TensorScheme, scales: Tensor, axis: int
) -> float:
    exact = weight.detach()
    factors = scales.to(exact) if axis % 2 == 0 else scales.to(exact).unsqueeze(1)
    rounded = fake_quantize(exact * factors, scheme) / factors
    delta = as_matrix(rounded.float() - exact.float(), 1, axis)
    return float(output_errors(delta, second).sum())
