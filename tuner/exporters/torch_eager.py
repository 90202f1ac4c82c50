"""Runs a quantized program without a compiler: oneDNN's integer kernels, called one by one.

An exported program keeps Q/DQ and int8 weights. Run as it is, it computes products of dequantized
values in FP32. `with_integer_kernels` puts oneDNN's kernels in the place of these products, with
weights packed once: faster than FP32, if less so than compiled code, which fuses what lies between.
"""

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, load, save

from tuner.errors import ExportError
from tuner.exporters.agreement import Run
from tuner.exporters.torch_spelling import Speller, aten, copied, decomposed

_onednn = torch.ops.onednn
_CHANNELS = 64
_PLAIN: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")


@cache
def saturates() -> bool:
    """Return whether sums of the largest products of 8-bit codes overflow in oneDNN's kernels.

    They do on x86 processors without VNNI, where two products are added in 16 bits (oneDNN
    developer guide, "Nuances of int8 computations").
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    ones = torch.ones(_CHANNELS)
    codes = torch.full((_CHANNELS, _CHANNELS), 127, dtype=torch.int8)
    x = torch.full((1, _CHANNELS), 255, dtype=torch.uint8)
    packed = _onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(_CHANNELS, dtype=torch.int64)
    found = _onednn.qlinear_pointwise.default(x, 1.0, 0, packed, ones, zeros, None, *_PLAIN)
    return bool(found.min() < 0.99 * 255 * 127 * _CHANNELS)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program; raises ExportError where that fails."""
    try:
        save(program, path)
    except (OSError, RuntimeError) as error:
        raise ExportError(f"cannot write {path}: {error}") from error


def load_program(path: Path) -> Run:
    """Return what runs a program on flat inputs with integer kernels.

    The file must be your own: reading an exported program can run code that is in it.
    """
    module = with_integer_kernels(load(path).module(check_guards=False))

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return tuple(module(*inputs))

    return run


def with_integer_kernels(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a module whose products of dequantized codes are integer kernels."""
    twin = copied(module)
    for node in list(twin.graph.nodes):
        if node.target is aten.linear.default:
            _replace(twin, node, _linear)
        elif node.target is aten.conv2d.default:
            _replace(twin, node, _convolution)
        elif node.target is decomposed.quantize_per_tensor.default:
            node.target = _quantized
    twin.graph.eliminate_dead_code()
    twin.recompile()
    return twin


def _quantized(
    x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """Quantize as the op does, without a tensor for each step."""
    steps = (x * (1.0 / scale)).round_()
    return steps.add_(zero_point).clamp_(low, high).to(dtype)


def _replace(module: fx.GraphModule, node: fx.Node, kernel: Any) -> None:
    x, weight = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return
    if x.target is not decomposed.dequantize_per_tensor.default:
        return
    if weight.target is not decomposed.dequantize_per_channel.default:
        return
    codes, scale = (_constant(module, value) for value in weight.args[:2])
    if codes is None or scale is None:
        return
    node.replace_all_uses_with(kernel(Speller(module, node), node, x.args, codes, scale))


def _linear(
    speller: Speller, node: fx.Node, x: Sequence[Any], codes: Tensor, scale: Tensor
) -> fx.Node:
    bias = node.args[2] if len(node.args) > 2 else None
    packed = speller.constant(f"{node.name}_packed", _onednn.qlinear_prepack(codes, None))
    scales = speller.constant(f"{node.name}_scales", scale)
    zeros = speller.constant(f"{node.name}_zeros", torch.zeros(len(scale), dtype=torch.int32))
    return speller.call(
        _onednn.qlinear_pointwise.default, *x[:3], packed, scales, zeros, bias, *_PLAIN
    )


def _convolution(
    speller: Speller, node: fx.Node, x: Sequence[Any], codes: Tensor, scale: Tensor
) -> fx.Node:
    given = node.args[2:]
    defaults: tuple[Any, ...] = (None, [1, 1], [0, 0], [1, 1], 1)
    arguments: list[Any] = [*given, *defaults[len(given) :]]
    bias, layout = arguments[0], arguments[1:]
    weight = _onednn.qconv_prepack(codes, scale, x[1], x[2], *layout, None)
    packed = speller.constant(f"{node.name}_packed", weight)
    scales = speller.constant(f"{node.name}_scales", scale)
    zeros = speller.constant(f"{node.name}_zeros", torch.zeros(len(scale), dtype=torch.int32))
    operands = packed, scales, zeros, bias, *layout
    return speller.call(_onednn.qconv_pointwise.default, *x[:3], *operands, *_PLAIN)


def _constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None
