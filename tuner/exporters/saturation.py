"""Which weights overflow where products of 8-bit codes are added in 16 bits.

x86 processors without VNNI multiply codes by VPMADDUBSW, which adds two products in 16 bits and
saturates: 255 · 127 + 255 · 127 becomes 32,767. With codes of weights up to 64 the sum always fits:
2 · 255 · 64 is 32,640 (Intel oneDNN developer guide, "Nuances of int8 computations"). For depthwise
convolutions ONNX Runtime, OpenVINO and PyTorch have kernels that add in more bits.
"""

from collections.abc import Sequence

from tuner import formats
from tuner.exporters.kernel_rows import is_narrow
from tuner.schemes import TensorScheme

LARGEST = 255
"""The largest code of an activation."""

SHIFT = 128
"""By how much codes of signed activations are moved: kernels take unsigned ones."""

_SUM_BITS = 16


def overflow(smallest: int, largest: int, activation: int = LARGEST) -> bool:
    """Return whether two products of codes may not fit.

    Those of the weight lie between two numbers, those of the activation from 0 to a third.
    """
    return 2 * activation * max(-smallest, largest) >= 1 << (_SUM_BITS - 1)


def products_overflow(first: TensorScheme, second: TensorScheme) -> bool:
    """Return whether two products of codes may not fit, whatever the values.

    Kernels hold codes of the first operand from zero on, those of the second around zero.
    """
    if not is_narrow(first) or not is_narrow(second):
        return False
    low, high = second.quant_range
    largest = (high - low + 1) // 2
    shift = SHIFT if formats.get(first.format).signed else 0
    return overflow(-largest, largest, first.quant_range[1] + shift)


def is_depthwise(weight_shape: Sequence[int], in_channels: int) -> bool:
    """Return whether a convolution has one filter for each channel.

    The shape is `[C_out, C_in/groups, …]`.
    """
    out_channels, depth = weight_shape[:2]
    return len(weight_shape) > 2 and depth == 1 and out_channels == in_channels > 1


def advice(target: str) -> str:
    """Return what to do about weights that overflow on this CPU."""
    return (
        "this CPU's kernels add products of 8-bit codes in 16 bits, where they would overflow: "
        f"tune with target={target!r} on this CPU, or with reduce_range=True on the weights, which "
        "leaves them 7 bits"
    )


def warning(count: int) -> str:
    """Return what to know of a file with weights that overflow on other CPUs than this one."""
    return (
        f"x86 CPUs without VNNI overflow where they add products of 8-bit weights, {count} here: "
        "for such, tune there, or with reduce_range=True on the weights, which leaves them 7 bits"
    )
