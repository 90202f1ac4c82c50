"""QuantizeLinear and DequantizeLinear as torch ops, and how torch.onnx.export writes them.

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


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor, name: str) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


def _dequantized(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int, stored: str
) -> Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


_library.impl("quantize_linear", _quantized, "Meta")
_library.impl("dequantize_linear", _dequantized, "Meta")

QUANTIZE = torch.ops.accutune.quantize_linear.default
DEQUANTIZE = torch.ops.accutune.dequantize_linear.default


Translations = dict[Callable[..., Any], Callable[..., Any]]


def translations(opset: int) -> Translations:
    """Return how torch.onnx.export writes both ops in an opset, 20 or 21 (where blocks begin)."""
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

    return {QUANTIZE: quantize, DEQUANTIZE: dequantize}
