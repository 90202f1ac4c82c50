"""What is known of a graph's quantized tensors: enough to plan integer arithmetic."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tuner import formats
from tuner.exporters.integer_values import Array, Integers, broadcast_scale
from tuner.exporters.tracing import TracedWeight
from tuner.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from tuner.packed_tensor import stored_qparams
from tuner.packing import unpack_codes
from tuner.quantizer import Quantizer
from tuner.ranges import symmetric_zero_point
from tuner.schemes import TensorScheme

ACCUMULATOR = 32
_TURNS = ("t", "numpy_T", "mT", "transpose", "permute")


@dataclass(frozen=True, eq=False)
class Known:
    """What a node gives: codes of an activation, codes of a weight, or sums of products.

    `largest` bounds |code − zero point|; `varies` are the axes along which the scale differs, None
    where that is not known. `scale` is None where it follows from the data. `op` is the op whose
    operand it is, `axes` how many axes there are; a weight has its `integers`. Sums have the `bits`
    that they need, else 0.
    """

    op: str
    largest: int
    axes: int
    varies: frozenset[int] | None = frozenset()
    scale: Array | None = None
    zero_point: int = 0
    integers: Integers | None = None
    bits: int = 0

    @property
    def is_one_scale(self) -> bool:
        """Whether one static scale serves the whole tensor."""
        return self.scale is not None and not self.varies and self.varies is not None

    def is_constant_along(self, axis: int) -> bool:
        """Whether the scale is known to be one along an axis."""
        return self.varies is not None and axis % self.axes not in self.varies

    def moved(self, function: Any, name: str, args: dict[str, Any], axes: int) -> "Known | None":
        """Return what is known after a move that leaves `axes` axes, None where that is nothing."""
        if name in _TURNS and not self.bits and self.varies is not None:
            if self.integers is not None:
                turned = self.integers.moved(lambda x: function(x, **args))
                return known_weight(self.op, turned)
            order = function(np.empty(range(1, self.axes + 1)), **args).shape
            return replace(self, varies=frozenset(order.index(a + 1) for a in self.varies))
        if self.integers is None and not self.bits and self.varies == frozenset():
            return replace(self, axes=axes)
        return None


def is_plain(scheme: TensorScheme) -> bool:
    """Return whether a scheme is of uniform integers, with scales that are no block format's."""
    fmt = formats.get(scheme.format)
    return fmt.kind == "int" and fmt.block is None


def why_no_weight(scheme: TensorScheme) -> str | None:
    """Return why a weight cannot be written as integers, None if it can."""
    if not is_plain(scheme):
        return f"{scheme.format} is no format of uniform integers"
    if isinstance(scheme.granularity, PerToken):
        return "a weight with scales per token is not supported: use PerChannel"
    return None


def why_no_activation(scheme: TensorScheme) -> str | None:
    """Return why an activation cannot be quantized to integers by the runner, None if it can."""
    if not is_plain(scheme):
        return f"{scheme.format} is no format of uniform integers"
    if scheme.is_dynamic and not isinstance(scheme.granularity, PerTensor | PerToken):
        return f"dynamic scales of {scheme.granularity!r} are not supported"
    if scheme.is_dynamic and scheme.calibration != "minmax":
        return f"the runner takes dynamic scales from minmax alone, not {scheme.calibration}"
    return None


def weight_integers(weight: TracedWeight) -> tuple[dict[str, Array], dict[str, Any], Integers]:
    """Return the tensors of a weight by part, the fields of its node, and its integers."""
    scheme, parts, shape = weight.scheme, weight.parts, weight.shape
    fmt = formats.get(scheme.format)
    codes = unpack_codes(parts["codes"], fmt.bits, fmt.signed, shape).numpy()
    qparams = stored_qparams(parts, scheme)
    scale = torch.as_tensor(qparams.scale).numpy()
    tensors = {"codes": codes, "scale": scale}
    if qparams.zero_point is not None:
        tensors["zero_point"] = torch.as_tensor(qparams.zero_point, dtype=torch.int32).numpy()
    axis, group = _axis(scheme, len(shape))
    low, high = scheme.quant_range
    fields = {"format": scheme.format, "low": low, "high": high, "axis": axis, "group": group}
    zero_point = _zero_point(tensors, codes, axis, group)
    return (
        tensors,
        fields,
        Integers(codes, broadcast_scale(scale, codes.shape, axis, group), zero_point),
    )


def _axis(scheme: TensorScheme, axes: int) -> tuple[int | None, int | None]:
    match scheme.granularity:
        case PerChannel(axis=axis):
            return axis % axes, None
        case PerGroup(size=size, axis=axis):
            return axis % axes, size
        case PerBlock(size=size):
            return axes - 1, size
    return None, None


def _zero_point(
    tensors: dict[str, Array], codes: Array, axis: int | None, group: int | None
) -> Array:
    if "zero_point" not in tensors:
        return np.zeros((), np.int32)
    return broadcast_scale(tensors["zero_point"], codes.shape, axis, group)


def varying(integers: Integers) -> frozenset[int]:
    """Return the axes along which the scales differ."""
    scale = np.broadcast_to(integers.scale, integers.codes.shape)
    if not integers.scale.ndim or not scale.size:
        return frozenset()
    axes = range(scale.ndim)
    return frozenset(a for a in axes if bool((scale != scale.take([0], axis=a)).any()))


def known_weight(op: str, integers: Integers) -> Known:
    """Return what is known of a weight."""
    largest = int(np.abs(integers.levels).max(initial=0))
    varies = varying(integers)
    axes = integers.codes.ndim
    return Known(op, largest, axes, varies, integers.scale.astype(np.float64), 0, integers)


def known_activation(op: str, quantizer: Quantizer, axes: int) -> Known:
    """Return what is known of a quantized activation with so many axes."""
    scheme, qparams = quantizer.scheme, quantizer.qparams
    low, high = scheme.quant_range
    if qparams is None:
        varies = range(axes - 1) if isinstance(scheme.granularity, PerToken) else range(0)
        zero = symmetric_zero_point(scheme)
        largest = max(high - zero, zero - low) if scheme.symmetric else high - low
        return Known(op, largest, axes, frozenset(varies))
    zero_points = torch.as_tensor(0 if qparams.zero_point is None else qparams.zero_point)
    scale = torch.as_tensor(qparams.scale, dtype=torch.float64).numpy()
    largest = max(high - int(zero_points.min()), int(zero_points.max()) - low)
    granularity = scheme.granularity
    varies = range(0)
    if isinstance(granularity, PerChannel):
        varies = range(granularity.axis % axes, granularity.axis % axes + 1)
    one = int(zero_points) if zero_points.numel() == 1 else 0
    return Known(op, largest, axes, frozenset(varies), scale, one)
