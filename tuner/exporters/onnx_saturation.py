"""ONNX files for processors whose kernels add products of 8-bit codes in 16 bits.

Where weights overflow these sums, their codes are written as uint8 with a zero point of 128: ONNX
Runtime multiplies unsigned codes by kernels that are exact, if slower, and OpenVINO multiplies such
weights in float.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from tuner.exporters.onnx_file import OnnxModel
from tuner.exporters.onnx_graph import QdqGraph
from tuner.exporters.onnx_ops import TENSOR
from tuner.exporters.saturation import LARGEST, SHIFT, is_depthwise, overflow

_CHANNELS = 64
_OPSET = 21
PASSED = ("Unsqueeze", "Squeeze", "Transpose", "Reshape", "Slice", "Clip", "Pad")
"""Ops that move a tensor's values about, and compute nothing."""


class _Session(Protocol):
    def run(self, tensors: list[Tensor]) -> list[Tensor]: ...


def saturates(load: Callable[[bytes], _Session]) -> bool:
    """Return whether the largest codes, multiplied and summed by a runtime, give too little."""
    ones = torch.ones(1, _CHANNELS)
    (found,) = load(_largest_product().SerializeToString()).run([ones])
    return bool(found.min() < _CHANNELS * 0.99)


def _largest_product() -> onnx.ModelProto:
    """Return a product that is the number of channels for ones: of the codes 255 and 127."""
    constants = {
        "x_scale": np.float32(1 / 255),
        "x_zero": np.uint8(0),
        "weight": np.full((_CHANNELS, _CHANNELS), 127, np.int8),
        "weight_scale": np.float32(1 / 127),
        "weight_zero": np.int8(0),
        "y_scale": np.float32(_CHANNELS / 255),
        "y_zero": np.uint8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], ["x_values"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"]),
        helper.make_node("MatMul", ["x_values", "w"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "y_scale", "y_zero"], ["y_codes"]),
        helper.make_node("DequantizeLinear", ["y_codes", "y_scale", "y_zero"], ["y"]),
    ]
    shape = [1, _CHANNELS]
    graph = helper.make_graph(
        nodes,
        "largest product of 8-bit codes",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def make_exact(model: OnnxModel, graph: QdqGraph) -> tuple[str, ...]:
    """Write weights that overflow as unsigned codes, in place; return the names of their scales.

    Those are meant that multiply quantized activations, but for depthwise convolutions.
    """
    found = list(_overflowing(model, graph))
    for node in found:
        for index in (0, 2):
            node.replace_input_with(index, _unsigned(model.model.graph, _input(node, index)))
    RemoveUnusedNodesPass()(model.model)
    return tuple(str(_input(node, 1).name) for node in found)


def overflowing(model: OnnxModel, graph: QdqGraph) -> int:
    """Count the weights that `make_exact` would change."""
    return sum(1 for _ in _overflowing(model, graph))


def _overflowing(model: OnnxModel, graph: QdqGraph) -> Iterator[ir.Node]:
    """Yield what dequantizes weights that overflow."""
    ends = {pair.name: pair.spelling.codes for pair in graph.pairs}
    largest = {name: codes[1] for name, codes in ends.items() if codes is not None}
    for node in model.model.graph:
        if node.op_type != "DequantizeLinear" or _input(node, 0).dtype != ir.DataType.INT8:
            continue
        held = _input(node, 0).const_value
        if held is None:
            continue
        codes = held.numpy()
        others = (_multiplied_by(*use, largest) for use in _uses(node.outputs[0]))
        if codes.size and overflow(int(codes.min()), int(codes.max()), max(others, default=0)):
            yield node


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield what reads a value, moved about or not, and as which of its inputs."""
    for usage in value.uses():
        if usage.node.op_type in PASSED:
            yield from _uses(usage.node.outputs[0])
        else:
            yield usage.node, usage.idx


def _multiplied_by(node: ir.Node, index: int, largest: Mapping[str, int]) -> int:
    """Return the largest code that a node multiplies its input `index` with, 0 if with none."""
    if node.op_type not in ("Conv", "MatMul", "Gemm") or index > 1:
        return 0
    weight = _input(node, index).shape
    if node.op_type == "Conv" and weight is not None:
        lengths = [int(length) for length in weight.numpy()]
        if is_depthwise(lengths, lengths[1] * node.attributes.get_int("group", 1)):
            return 0
    values = _maker(_input(node, 1 - index))
    if values is None or values.op_type != "DequantizeLinear":
        return 0
    if _input(values, 0).dtype != ir.DataType.UINT8:  # of 16 bits there are no integer kernels
        return 0
    codes = _maker(_input(values, 0))
    return LARGEST if codes is None else largest.get(str(codes.metadata_props.get(TENSOR)), LARGEST)


def _maker(value: ir.Value) -> ir.Node | None:
    """Return the node that a value comes from, but for those that only move it about."""
    node = value.producer()
    while node is not None and node.op_type in PASSED:
        node = _input(node, 0).producer()
    return node


def _unsigned(graph: ir.Graph, old: ir.Value) -> ir.Value:
    """Return a constant of int8 as one of uint8."""
    assert old.const_value is not None
    name = f"{old.name}_unsigned"
    if name not in graph.initializers:
        codes = (old.const_value.numpy().astype(np.int16) + SHIFT).astype(np.uint8)
        tensor = ir.tensor(codes, name=name)
        made = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=old.shape, const_value=tensor
        )
        graph.register_initializer(made)
    return graph.initializers[name]
