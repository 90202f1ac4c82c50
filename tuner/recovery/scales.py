"""Factors by which channels are rescaled between two ops: SmoothQuant and equalization.

Both give a channel without a range, on either side, the factor 1, and keep all factors in
1e-4…1e4: beyond, the float function itself would suffer.
"""

import torch
from torch import Tensor

from tuner.errors import SchemeError

LARGEST_SCALE = 1e4


def smooth_scales(act_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """Return what each input channel is divided by, and the weight's columns multiplied with.

    `s_j = max|X_j|^α / max|W_j|^(1−α)`: Xiao et al., SmoothQuant, ICML 2023, equation 4. Both
    arguments are `[in]`; of several weights that share the input, take the largest magnitude. At
    α = 1 the activation's ranges become equal, at 0 the weight's. Raises SchemeError for α outside
    0…1 or ranges that do not fit.
    """
    if not 0 <= alpha <= 1:
        raise SchemeError(f"alpha must be from 0 to 1, got {alpha}: 0.5 is the paper's choice")
    first, other = _checked(act_absmax, weight_absmax)
    return _safe(first**alpha / other ** (1 - alpha), first, other).to(act_absmax.dtype)


def equalize_scales(first_range: Tensor, second_range: Tensor) -> Tensor:
    """Return what each output channel of the first weight is divided by.

    The columns of the second weight that read it are multiplied with it, as the first bias is
    divided. `s_i = √(r1_i · r2_i) / r2_i` with the ranges `[channels]` of the first weight's rows
    and the second's columns makes both √(r1_i · r2_i): Nagel et al., ICCV 2019, section 4.1,
    equation 11. Raises SchemeError for ranges that do not fit.
    """
    first, second = _checked(first_range, second_range)
    return _safe((first / second).sqrt(), first, second).to(first_range.dtype)


def _checked(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.shape != second.shape or first.ndim != 1:
        raise SchemeError(
            f"the ranges of {list(first.shape)} and {list(second.shape)} channels do not fit each "
            "other: give one range for each channel of both"
        )
    for each in (first, second):
        if not bool((each >= 0).all()):
            raise SchemeError(f"ranges are magnitudes, got {float(each.min())}: use x.abs().amax()")
    return first.detach().double(), second.detach().double()


def _safe(scales: Tensor, first: Tensor, second: Tensor) -> Tensor:
    ranged = (first > 0) & (second > 0) & first.isfinite() & second.isfinite()
    return torch.where(ranged, scales.clamp(1 / LARGEST_SCALE, LARGEST_SCALE), 1.0)
