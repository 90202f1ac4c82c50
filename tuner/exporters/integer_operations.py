"""Integer arithmetic in place of an ATen op: when it can be, its biases, and how wide its sums."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tuner import formats
from tuner.exporters.integer_known import Known
from tuner.exporters.integer_values import Array, fixed_point, rescaled
from tuner.schemes import TensorScheme

_INT32 = 1 << 31
_PRODUCT_BITS = 14
_SUM_BITS = 29
"""A bit of a signed sum of 32 is left for the bias."""


@dataclass(frozen=True, eq=False)
class Operation:
    """A node of integer arithmetic: its op, what its sums are, and what its bias is made of.

    `worst` is the largest magnitude that sums can have. `bias` is None where there is none, or
    where it is added to the floats behind (`floats_bias`). Sums are shifted left by `left_shift`
    before it is added; scale and worst are those of the shifted ones.
    """

    op: str
    scale: Array | None
    worst: int
    bias: "Bias | None"
    floats_bias: bool
    after: int
    left_shift: int = 0

    @property
    def bits(self) -> int:
        """The width of signed accumulators that hold all sums."""
        return self.worst.bit_length() + 1


@dataclass(frozen=True, eq=False)
class Bias:
    """A bias in integers; with multiplier and shift where it has a scale of its own."""

    codes: Array
    multiplier: Array | None = None
    shift: Array | None = None


def layer(
    kind: str,
    x: Known,
    weight: Known,
    bias: Tensor | None,
    scheme: TensorScheme | None,
    groups: int,
) -> Operation | str:
    """Return a Linear or convolution in integers, or why it cannot be."""
    if weight.integers is None:
        return "its weight is no constant integers"
    is_one = x.varies == frozenset() or (kind == "linear" and x.is_constant_along(-1))
    if x.bits or not is_one:
        return "its input has several scales where products are summed"
    channels = 1 if kind == "conv_transpose" else 0
    axes = weight.integers.codes.ndim
    if weight.varies is None or weight.varies - {channels}:
        return "its weight has several scales where products are summed"
    levels = np.abs(weight.integers.levels)
    reach = levels.sum(axis=tuple(a for a in range(axes) if a != channels)) * x.largest
    scales = np.broadcast_to(_per_channel(weight, channels), reach.shape)
    if kind == "conv_transpose":
        reach, scales = np.tile(reach, groups), np.tile(scales, groups)
    after = 0 if kind == "linear" else axes - 2
    steps = x.scale * scales if x.is_one_scale and x.scale is not None else None
    if bias is None or steps is None:
        codes, left = None, 0
    else:
        left = _left_shift(
            x.largest * int(levels.max(initial=0)), int(reach.max(initial=0)), scheme
        )
        steps = steps / 2.0**left
        codes = bias_codes(bias, steps, scheme)
    added = 0 if codes is None else np.abs(_in_steps(codes))
    worst = int(((reach << left) + added).max(initial=0))
    shaped = None if steps is None else steps.reshape(-1, *[1] * after)
    by_float = bias is not None and codes is None
    return Operation(kind, shaped, worst, codes, by_float, after, left)


def _left_shift(product: int, reach: int, scheme: TensorScheme | None) -> int:
    """Return by how much sums are shifted left, so that their steps are as fine as of 8 by 8 bits.

    Products of few bits have steps so coarse that a bias rounded to them moves codes behind. One
    that the plan itself counts in such steps needs nothing finer.
    """
    if scheme is not None and scheme.format == "int32":
        return 0
    return max(0, min(_PRODUCT_BITS - product.bit_length(), _SUM_BITS - reach.bit_length()))


def matmul(a: Known, b: Known, length: int) -> Operation | str:
    """Return a product of matrices in integers, or why it cannot be; `length` is summed over."""
    for known, axis in ((a, -1), (b, -2)):
        if known.axes < 2:
            return "a vector is multiplied in float"
        if known.bits or not known.is_constant_along(axis):
            return "its operands have several scales where products are summed"
    worst = a.largest * b.largest * length
    for one, other, axis in ((a, b, -1), (b, a, -2)):
        if one.integers is not None:
            sums = np.abs(one.integers.levels).sum(axis=axis) * other.largest
            worst = min(worst, int(sums.max(initial=0)))
    scale = None
    if all(known.is_one_scale or known.integers is not None for known in (a, b)):
        assert a.scale is not None
        assert b.scale is not None
        scale = _one(a.scale, -1) * _one(b.scale, -2)
    return Operation("matmul", scale, worst, None, False, 0)


def _one(scale: Array, axis: int) -> Array:
    return scale.take([0], axis=axis) if scale.ndim >= 2 else scale


def _per_channel(weight: Known, axis: int) -> Array:
    assert weight.integers is not None
    scale = weight.integers.scale.astype(np.float64)
    if not scale.ndim:
        return scale
    return scale[tuple(slice(None) if a == axis else 0 for a in range(scale.ndim))]


def bias_codes(bias: Tensor, steps: Array, scheme: TensorScheme | None) -> Bias | None:
    """Return a bias in steps of the products, or None where int32 cannot hold it.

    One whose scheme has a scale of its own keeps that scale.
    """
    values = bias.detach().double().numpy()
    own = None if scheme is None else own_scale(values, scheme)
    if own is not None:
        multiplier, shift = fixed_point(own[1] / steps)
        found = Bias(own[0], multiplier, shift)
    else:
        found = Bias(np.rint(values / steps))
    if (np.abs(_in_steps(found)) >= _INT32).any():
        return None
    largest = _INT32 - 1 if own is None else int(np.abs(own[0]).max(initial=0))
    width = np.int8 if largest < 1 << 7 else np.int16 if largest < 1 << 15 else np.int32
    return Bias(found.codes.astype(width), found.multiplier, found.shift)


def own_scale(values: Array, scheme: TensorScheme) -> tuple[Array, float] | None:
    """Return integers and the scale that values on a grid with a scale of its own have.

    None where the scheme counts in steps of products, or is of no uniform integers. A bias that is
    on a model has only its values: the largest of them is a whole number of steps, which are tried.
    """
    fmt = formats.get(scheme.format)
    if fmt.kind != "int" or fmt.block is not None or scheme.format == "int32":
        return None
    low, high = scheme.quant_range
    largest = np.abs(values).max(initial=0)
    if not largest:
        return np.zeros(values.shape), 1.0
    for steps in range(1, high - low + 1):
        scale = largest / steps
        codes = np.rint(values / scale)
        if np.abs(codes * scale - values).max() <= largest * 2.0**-22:
            return codes, float(scale)
    return None


def _in_steps(bias: Bias) -> Array:
    if bias.multiplier is None or bias.shift is None:
        return bias.codes
    return rescaled(bias.codes, bias.multiplier, bias.shift)
