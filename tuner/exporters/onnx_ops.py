"""QuantizeLinear, DequantizeLinear and others as torch ops, and how torch.onnx.export writes them.

They exist in traced graphs only: nothing computes them in torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20, opset21
from torch import Tensor

BLOCKS_FROM = 21
TENSOR = "accutune.tensor"
"""The key of a QuantizeLinear's metadata that says which tensor it quantizes."""

STORED = "accutune.stored"
"""The key of a DequantizeLinear's metadata that says how its codes are to be stored."""

_library = torch.library.Library("accutune", "FRAGMENT")
_library.define("quantize_linear(Tensor x, Tensor scale, Tensor zero_point, str name) -> Tensor")
_library.define(
    "dequantize_linear(Tensor x, Tensor scale, Tensor zero_point, int axis, int block_size,"
    " str stored) -> Tensor"
)
_library.define("sum(Tensor x, Tensor y) -> Tensor")
_library.define(
    "to_depth(Tensor x, Tensor padding, int[] before, int[] after, int block) -> Tensor"
)
_library.define("conv(Tensor x, Tensor weight, Tensor? bias, int[] before, int[] after) -> Tensor")


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, name: str) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


def _dequantized(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, stored: str
) -> Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


def _to_depth(
    x: Tensor, padding: Tensor, before: list[int], after: list[int], block: int
) -> Tensor:
    n, c, h, w = x.shape
    rows, columns = (length + b + a for length, b, a in zip((h, w), before, after, strict=True))
    return x.new_empty(n, c * block**2, rows // block, columns // block)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: list[int], after: list[int]
) -> Tensor:
    (n, _, *lengths), (channels, _, *kernel) = x.shape, weight.shape
    sides = zip(lengths, before, after, kernel, strict=True)
    return x.new_empty(n, channels, *(length + b + a - k + 1 for length, b, a, k in sides))


_library.impl("quantize_linear", _quantized, "Meta")
_library.impl("dequantize_linear", _dequantized, "Meta")
_library.impl("sum", torch.add, "Meta")
_library.impl("to_depth", _to_depth, "Meta")
_library.impl("conv", _convolved, "Meta")

QUANTIZE = torch.ops.accutune.quantize_linear.default
DEQUANTIZE = torch.ops.accutune.dequantize_linear.default

SUM = torch.ops.accutune.sum.default
"""ONNX's Sum of two tensors."""

TO_DEPTH = torch.ops.accutune.to_depth.default
"""ONNX's Pad of images [N, C, H, W] with a constant, by so much before and after, if any, then its
SpaceToDepth: channel `(row · block + column) · C + c` of the outcome."""

CONV = torch.ops.accutune.conv.default
"""ONNX's Conv without strides; unlike torch's it pads by different numbers before and after."""


Translations = dict[Callable[..., Any], Callable[..., Any]]


def translations(opset: int) -> Translations:
    """Return how torch.onnx.export writes these ops in an opset, 20 or 21 (where blocks begin)."""
    ops: Any = opset21 if opset >= BLOCKS_FROM else opset20

    def quantize(x: Any, scale: Any, zero_point: Any, name: str) -> Any:
        made = ops.QuantizeLinear(x, scale, zero_point)
        made.producer().metadata_props[TENSOR] = name
        return made

    def dequantize(
        x: Any, scale: Any, zero_point: Any, axis: int, block_size: int, stored: str
    ) -> Any:
        blocks = {"block_size": block_size} if block_size else {}
        made = ops.DequantizeLinear(x, scale, zero_point, axis=axis, **blocks)
        made.producer().metadata_props[STORED] = stored
        return made

    def total(x: Any, y: Any) -> Any:
        return ops.Sum(x, y)

    def to_depth(x: Any, padding: Any, before: Any, after: Any, block: int) -> Any:
        if any((*before, *after)):
            pads = ops.Constant(value_ints=[0, 0, *before, 0, 0, *after])
            x = ops.Pad(x, pads, padding)
        return ops.SpaceToDepth(x, blocksize=block)

    def convolve(x: Any, weight: Any, bias: Any, before: Any, after: Any) -> Any:
        return ops.Conv(x, weight, bias, pads=[*before, *after])

    return {
        QUANTIZE: quantize,
        DEQUANTIZE: dequantize,
        SUM: total,
        TO_DEPTH: to_depth,
        CONV: convolve,
    }
