"""Bias correction: put back what rounding a weight shifts the mean of its output by.

Nagel et al., ICCV 2019, section 4.2.
"""

import torch
from torch import Tensor

from tuner.errors import SchemeError
from tuner.recovery.rounding_matrix import as_matrix


@torch.no_grad()
def bias_correction(weight: Tensor, rounded: Tensor, mean: Tensor, axis: int = 0) -> Tensor:
    """Return (W − Ŵ) E[x] `[out]`, to be added to the bias: E[Ŵ x] + (W − Ŵ) E[x] = E[W x].

    `weight` and `rounded` have the weight's own shape, with the output channels on `axis`, as in
    WeightRef; `mean` is E[x] `[groups, in·k]`. Computed in fp64, returned in the dtype of the
    weight. Raises SchemeError where they do not fit each other.
    """
    if weight.shape == rounded.shape and mean.ndim == 2:
        delta = as_matrix(weight.double() - rounded.double(), mean.shape[0], axis)
        if delta.shape[-1] == mean.shape[1]:
            shift: Tensor = (delta @ mean.to(delta).unsqueeze(-1)).flatten()
            return shift.to(weight.dtype)
    raise SchemeError(
        f"weights of shape {list(weight.shape)} and {list(rounded.shape)} and a mean of shape "
        f"{list(mean.shape)} do not fit each other: give two weights of one shape and a mean "
        "[groups, in·k]"
    )
