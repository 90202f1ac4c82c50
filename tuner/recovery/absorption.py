"""Constants of channels that the bias of the next layer takes over: high biases absorbed.

W₂ h + b₂ = W₂ (h − c) + (b₂ + W₂ c), and h − c costs nothing where the layer before subtracts c
from its own bias. Without a function between them that is exact for every c: half-way between the
extremes, the range of a channel becomes symmetric (Wei et al., EMNLP 2023, section 4.1). Through a
ReLU it is exact where the values are at least c: relu(y − c) = relu(y) − c for y ≥ c ≥ 0. Nagel et
al., ICCV 2019, section 4.1.3, estimate such a c as β − 3γ from the batch norm. Here it lies below
all that calibration saw of the channel, by a quarter of its range: no calibration sample is
changed, and few others are. A value below c, in data that were not seen, counts as c.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tuner.recovery.layers import on_input_channels

Offset = Literal["none", "minimum", "any"]
"""What may be taken from channels between two layers: nothing, less than all values, anything."""

_MARGIN = 0.25
"""Of a channel's range. On a digits MLP with high biases, calibrated on 64 (256) samples, values of
0.96 % (0.23 %) were below the smallest ones seen, and of 0.008 % (0 %) below that by this much; the
error of 4 to 8 bits stayed the same."""

_RECTIFIERS = frozenset({"relu", "relu_", "leaky_relu", "leaky_relu_"})
_AVERAGES = frozenset(
    {
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("mean", "interpolate"),
    }
)
_SELECTIONS = frozenset(
    {
        *("max_pool1d", "max_pool2d", "max_pool3d", "batch_norm", "contiguous"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("flatten", "view", "reshape", "squeeze", "unsqueeze"),
    }
)
"""Functions that only select values; a batch norm in a chain is folded, and selects all."""


def offset_between(
    producer: nn.Module, consumers: Sequence[nn.Module], functions: Collection[str]
) -> Offset:
    """Return what may be taken from the output of a producer, which reaches its consumers so.

    Left out are average pooling and dropout, whose zeros would have to be −c, as those of padding;
    a mean behind a ReLU, because its minimum says nothing of the values in it.
    """
    if not _has_bias(producer) or not all(map(_takes_shifts, consumers)):
        return "none"
    others = set(functions) - _SELECTIONS
    if others <= _AVERAGES:
        return "any"
    return "minimum" if others <= _RECTIFIERS else "none"


def shifts_between(offset: Offset, low: Tensor, high: Tensor) -> Tensor | None:
    """Return what is taken from channels with these extremes `[channels]`, None for nothing."""
    if offset == "none":
        return None
    below = low - _MARGIN * (high - low)
    shifts = (low + high) / 2 if offset == "any" else below.clamp_min(0)
    shifts = shifts.nan_to_num(0.0, 0.0, 0.0)
    return shifts if bool(shifts.any()) else None


def absorbed(module: nn.Module, weight: Tensor, shifts: Tensor) -> Tensor:
    """Return what the bias `[out]` of a layer takes over from its input's shifts `[in]`: W c."""
    return on_input_channels(module, weight, shifts).flatten(1).sum(1)


def _takes_shifts(module: nn.Module) -> bool:
    """Return whether every output of a layer meets all of the weights of its channel."""
    if isinstance(module, _ConvTransposeNd):
        return False
    if isinstance(module, _ConvNd) and module.padding_mode == "zeros" and _pads(module):
        return False
    return _has_bias(module)


def _pads(module: _ConvNd) -> bool:
    if isinstance(module.padding, str):
        return module.padding != "valid" and any(size > 1 for size in module.kernel_size)
    return any(module.padding)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("bias"), torch.Tensor)
