"""Leaves QuantizeLinear at inputs and DequantizeLinear at outputs out: an op alone, on codes."""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tuner.exporters.onnx_file import OnnxModel

_SEED = 0


def without_ends(model: OnnxModel) -> OnnxModel:
    """Return a model that takes and gives the codes of its quantized inputs and outputs."""
    cut = ir.from_proto(ir.to_proto(model.model))
    graph = cut.graph
    for index, value in enumerate(graph.inputs):
        users = [usage.node for usage in value.uses()]
        if len(users) == 1 and users[0].op_type == "QuantizeLinear":
            made = users[0].outputs[0]
            given = ir.Value(name=f"{value.name}_codes", type=made.type, shape=value.shape)
            made.replace_all_uses_with(given)
            graph.remove(users[0], safe=True)
            graph.inputs[index] = given
    for index, value in enumerate(graph.outputs):
        node = value.producer()
        if node is not None and node.op_type == "DequantizeLinear":
            codes = node.inputs[0]
            assert codes is not None
            codes.shape = value.shape
            graph.outputs[index] = codes
            graph.remove(node, safe=False)
    return OnnxModel(cut)


def inputs_of(model: OnnxModel, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Return inputs for a model: the tensors, and random codes where it takes codes."""
    generator = np.random.default_rng(_SEED)
    found = []
    for value, tensor in zip(model.model.graph.inputs, tensors, strict=True):
        if value.dtype in (ir.DataType.UINT8, ir.DataType.INT8):
            codes = generator.integers(0, 128, tuple(tensor.shape), dtype=np.uint8)
            tensor = torch.from_numpy(codes)
        found.append(tensor)
    return found
